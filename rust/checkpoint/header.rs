//! The header of one shard: read, bounded and validated before anything else is believed.

use crate::{Error, Result};
use safetensors::tensor::{Dtype, Metadata};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Bytes of the little-endian length in front of the header.
pub const LENGTH_BYTES: usize = 8;
/// Longest header that readers accept.
const LONGEST_HEADER: u64 = 100_000_000;

/// What tells one shard from another without reading its data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileIdentity {
    /// Bytes.
    pub size: u64,
    /// Modification time in nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// BLAKE3 of the length field and the header, hexadecimal.
    pub header_digest: String,
}

impl FileIdentity {
    pub(super) fn matches_metadata(&self, path: &Path, metadata: &std::fs::Metadata) -> Result<()> {
        let what = if metadata.len() != self.size {
            "its size differs"
        } else if modified_ns(metadata) != self.mtime_ns {
            "it was modified"
        } else {
            return Ok(());
        };
        Err(Error::InputChanged { path: path.to_owned(), what })
    }
}

/// One tensor of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name within the checkpoint.
    pub name: String,
    /// Element type on disk.
    pub dtype: Dtype,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

/// The validated header of a shard.
#[derive(Debug, Clone)]
pub struct Header {
    /// The tensors in the order of their bytes, without holes.
    pub tensors: Vec<TensorEntry>,
    /// Identity of the file that was read.
    pub identity: FileIdentity,
}

impl Header {
    /// Reads and validates the header of the file at `path`; the data is not touched.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Header`], or [`Error::Length`] if the file is shorter or longer than the header says.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::read(path, e))?;
        let metadata = file.metadata().map_err(|e| Error::read(path, e))?;
        if !metadata.is_file() {
            return Err(Error::header(path, "it is not a regular file"));
        }
        let size = metadata.len();
        if size < LENGTH_BYTES as u64 {
            return Err(Error::header(path, format!("it has only {size} bytes")));
        }
        let mut length = [0; LENGTH_BYTES];
        file.read_exact_at(&mut length, 0).map_err(|e| Error::read(path, e))?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST_HEADER {
            return Err(Error::header(
                path,
                format!(
                    "it claims a header of {length} bytes, more than the {LONGEST_HEADER} allowed"
                ),
            ));
        }
        let data_start = LENGTH_BYTES as u64 + length;
        if data_start > size {
            return Err(Error::Length { path: path.to_owned(), expected: data_start, found: size });
        }
        let data_start = usize::try_from(data_start)
            .map_err(|_| Error::header(path, "its header does not fit into memory"))?;
        let mut bytes = vec![0; data_start];
        file.read_exact_at(&mut bytes, 0).map_err(|e| Error::read(path, e))?;
        let tensors = parse(path, &bytes, data_start)?;
        let expected = tensors.last().map_or(data_start, |tensor| tensor.range.end) as u64;
        if expected != size {
            return Err(Error::Length { path: path.to_owned(), expected, found: size });
        }
        let identity = FileIdentity {
            size,
            mtime_ns: modified_ns(&metadata),
            header_digest: blake3::hash(&bytes).to_hex().to_string(),
        };
        Ok(Self { tensors, identity })
    }
}

/// Parses a length field and header; the crate `safetensors` checks shapes, dtypes, offsets and overflow.
fn parse(path: &Path, bytes: &[u8], data_start: usize) -> Result<Vec<TensorEntry>> {
    let metadata: Metadata = serde_json::from_slice(&bytes[LENGTH_BYTES..])
        .map_err(|e| Error::header(path, format!("its header is corrupt ({e})")))?;
    metadata
        .offset_keys()
        .into_iter()
        .map(|name| {
            let Some(info) = metadata.info(&name) else {
                return Err(Error::header(path, format!("tensor `{name}` has no entry")));
            };
            let (start, end) = info.data_offsets;
            let place = |offset: usize| {
                data_start.checked_add(offset).ok_or_else(|| {
                    Error::header(path, format!("the offsets of tensor `{name}` overflow"))
                })
            };
            Ok(TensorEntry {
                range: place(start)?..place(end)?,
                dtype: info.dtype,
                shape: info.shape.clone(),
                name,
            })
        })
        .collect()
}

fn modified_ns(metadata: &std::fs::Metadata) -> i64 {
    // Nanoseconds since 1970 leave 64 bits in the year 2262; a clock beyond that still gives a stable identity.
    metadata.mtime().wrapping_mul(1_000_000_000).wrapping_add(metadata.mtime_nsec())
}
