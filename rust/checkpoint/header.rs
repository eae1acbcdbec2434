//! The header of one shard: read, bounded and validated before anything else is believed.

use super::header_json::{Described, Parser};
use super::identity::FileIdentity;
use super::limits::{MOST_DIMENSIONS, MOST_TENSORS};
use super::lookup::Lookup;
use super::regular;
use super::remote::{self, RemoteFile};
use crate::error::printable;
use crate::{Error, Result};
use safetensors::tensor::Dtype;
use serde::Deserializer;
use std::fmt;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of the little-endian length in front of the header.
pub const LENGTH_BYTES: usize = 8;
/// Longest header that readers accept.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes of an object that are asked for first; most headers end before.
const FIRST_REQUEST: u64 = 64 << 10;

/// One tensor of a shard, as its header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry<'a> {
    /// Name within the checkpoint.
    pub name: &'a str,
    /// Element type on disk.
    pub dtype: Dtype,
    /// Dimensions; empty for a scalar.
    pub shape: &'a [usize],
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

impl TensorEntry<'_> {
    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        // The header was checked: this does not overflow.
        self.shape.iter().product()
    }
}

/// The validated header of a shard. A tensor costs 32 bytes, 8 for each dimension, and its name.
#[derive(Debug)]
pub struct Header {
    table: Table,
    /// Identity of the file that was read.
    pub identity: FileIdentity,
}

/// The tensors of a header, their names in one string and their dimensions in one list.
#[derive(Debug, Default)]
struct Table {
    names: String,
    dimensions: Vec<usize>,
    records: Vec<Record>,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    /// Bytes of the tensor, from the end of the header on while it is parsed, later from the start of the file.
    start: usize,
    end: usize,
    /// Where the name lies.
    name: (u32, u32),
    /// Where the dimensions begin.
    shape: u32,
    rank: u8,
    dtype: Dtype,
}

impl Header {
    /// Reads and validates the header of the file at `path`; the data is not touched.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Header`], [`Error::Unusable`], or [`Error::Length`] if the file is shorter or longer than
    /// the header says.
    pub fn read(path: &Path) -> Result<Self> {
        if remote::is_url(path) {
            return Self::read_remote(path);
        }
        let (file, metadata) = regular::open(path).map_err(|e| Error::read(path, e))?;
        let size = metadata.len();
        if regular::is_lfs_pointer(&file) {
            return Err(Error::unusable(path, regular::LFS_ADVICE));
        }
        if size < LENGTH_BYTES as u64 {
            return Err(too_short(path, size));
        }
        let mut length = [0; LENGTH_BYTES];
        file.read_exact_at(&mut length, 0).map_err(|e| Error::read(path, e))?;
        let data_start = data_start(path, size, length)?;
        let mut bytes = vec![0; data_start];
        file.read_exact_at(&mut bytes, 0).map_err(|e| Error::read(path, e))?;
        let (table, digest) = Table::checked(path, size, &bytes)?;
        Ok(Self { table, identity: FileIdentity::new(&metadata, digest) })
    }

    /// The same of an object: one request, and another if the header is long.
    fn read_remote(url: &Path) -> Result<Self> {
        let Some((seen, start)) = remote::beginning(url, FIRST_REQUEST)? else {
            return Err(too_short(url, 0));
        };
        let size = seen.size;
        if regular::begins_lfs_pointer(&start) {
            return Err(Error::unusable(url, regular::LFS_ADVICE));
        }
        let Some((length, _)) = start.split_first_chunk() else {
            return Err(too_short(url, size));
        };
        let data_start = data_start(url, size, *length)?;
        let mut bytes = start.to_vec();
        let fetched = bytes.len();
        bytes.resize(data_start, 0);
        if fetched < data_start {
            let object = RemoteFile::open(url, size, &seen.etag)?;
            object.read(fetched..data_start, &mut bytes[fetched..])?;
        }
        let (table, digest) = Table::checked(url, size, &bytes)?;
        Ok(Self { table, identity: FileIdentity::of_object(seen, digest) })
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.records.len()
    }

    /// Whether there is no tensor.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.records.is_empty()
    }

    /// The tensor with this number, in the order of their bytes, which have no holes.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn tensor(&self, number: usize) -> TensorEntry<'_> {
        self.table.entry(&self.table.records[number])
    }

    /// All tensors, in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = TensorEntry<'_>> {
        self.table.records.iter().map(|record| self.table.entry(record))
    }
}

fn too_short(path: &Path, size: u64) -> Error {
    Error::header(path, format!("it has only {size} bytes"))
}

/// Where the data of a file begins that has so many bytes and begins with this length of the header.
fn data_start(path: &Path, size: u64, length: [u8; LENGTH_BYTES]) -> Result<usize> {
    if u64::from_le_bytes(length) > LONGEST_HEADER {
        if let Some(problem) = regular::other_kind(length) {
            return Err(Error::unusable(path, problem));
        }
        let length = u64::from_le_bytes(length);
        return Err(Error::header(
            path,
            format!("it claims a header of {length} bytes, more than the {LONGEST_HEADER} allowed"),
        ));
    }
    let data_start = LENGTH_BYTES as u64 + u64::from_le_bytes(length);
    if data_start > size {
        return Err(Error::Length { path: path.to_owned(), expected: data_start, found: size });
    }
    usize::try_from(data_start)
        .map_err(|_| Error::header(path, "its header does not fit into memory"))
}

impl Table {
    /// The table of a file of so many bytes that begins with these, and their digest.
    fn checked(path: &Path, size: u64, bytes: &[u8]) -> Result<(Self, String)> {
        let table = Self::parse(path, bytes, bytes.len())?;
        let expected = table.records.last().map_or(bytes.len(), |record| record.end) as u64;
        if expected != size {
            return Err(Error::Length { path: path.to_owned(), expected, found: size });
        }
        Ok((table, blake3::hash(bytes).to_hex().to_string()))
    }

    /// Parses and checks a length field and header. What is accepted is what the crate `safetensors` accepts, except
    /// for names that stand twice (there the last counts) and the limits above.
    fn parse(path: &Path, bytes: &[u8], data_start: usize) -> Result<Self> {
        let corrupt = |problem: &dyn fmt::Display| {
            Error::header(path, format!("its header is corrupt ({problem})"))
        };
        let text = std::str::from_utf8(&bytes[LENGTH_BYTES..]).map_err(|e| corrupt(&e))?;
        let mut table = Self::default();
        let mut beyond_limit = None;
        let mut add = |name: &str, tensor: &Described| {
            beyond_limit = table.limit(name, tensor);
            beyond_limit.is_none() && table.add(name, tensor).is_some()
        };
        let mut json = serde_json::Deserializer::from_str(text);
        let parsed = json.deserialize_map(Parser(&mut add)).and_then(|()| json.end());
        if let Some(problem) = beyond_limit {
            return Err(Error::Unusable { path: path.to_owned(), problem });
        }
        parsed.map_err(|e| corrupt(&e))?;
        // Stable, so that the order of tensors without bytes is the header's.
        table.records.sort_by_key(|record| (record.start, record.end));
        table.check(data_start).map_err(|problem| corrupt(&problem))?;
        table.names.shrink_to_fit();
        table.dimensions.shrink_to_fit();
        table.records.shrink_to_fit();
        Ok(table)
    }

    /// Why no such tensor is added, if that is so.
    fn limit(&self, name: &str, tensor: &Described) -> Option<String> {
        if self.records.len() == MOST_TENSORS {
            Some(format!("it describes more than {MOST_TENSORS} tensors, the most allowed"))
        } else if tensor.shape.kept().is_none() {
            Some(format!(
                "its tensor `{}` has more than {MOST_DIMENSIONS} dimensions, the most allowed",
                printable(name)
            ))
        } else {
            None
        }
    }

    /// Adds a tensor as its header describes it; `None` if a number leaves its field, which the limits above and on
    /// the header's length exclude.
    fn add(&mut self, name: &str, tensor: &Described) -> Option<()> {
        let dimensions = tensor.shape.kept()?;
        let start = u32::try_from(self.names.len()).ok()?;
        let end = u32::try_from(self.names.len() + name.len()).ok()?;
        self.records.push(Record {
            start: tensor.data_offsets.0,
            end: tensor.data_offsets.1,
            name: (start, end),
            shape: u32::try_from(self.dimensions.len()).ok()?,
            rank: u8::try_from(dimensions.len()).ok()?,
            dtype: tensor.dtype,
        });
        self.names.push_str(name);
        self.dimensions.extend_from_slice(dimensions);
        Some(())
    }

    fn name(&self, record: &Record) -> &str {
        &self.names[record.name.0 as usize..record.name.1 as usize]
    }

    fn entry(&self, record: &Record) -> TensorEntry<'_> {
        let first = record.shape as usize;
        TensorEntry {
            name: self.name(record),
            dtype: record.dtype,
            shape: &self.dimensions[first..first + usize::from(record.rank)],
            range: record.start..record.end,
        }
    }

    /// Checks that no name stands twice, that tensors follow each other without holes, and that each has the bytes of
    /// its shape; then counts bytes from the start of the file.
    fn check(&mut self, data_start: usize) -> Result<(), String> {
        let mut lookup = Lookup::with_capacity(self.records.len());
        let name_of = |number: u32| self.name(&self.records[number as usize]);
        for (number, record) in (0..).zip(&self.records) {
            let name = self.name(record);
            if lookup.insert(name, number, name_of).is_some() {
                return Err(format!("tensor `{}` stands twice", printable(name)));
            }
        }
        let mut end = 0;
        for record in &self.records {
            let entry = self.entry(record);
            let name = || printable(entry.name);
            if record.start != end || record.end < record.start {
                return Err(format!(
                    "the offsets {} and {} of tensor `{}` leave a hole, overlap or run backwards",
                    record.start,
                    record.end,
                    name()
                ));
            }
            end = record.end;
            let elements = entry.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
            let bits = elements.and_then(|elements| elements.checked_mul(record.dtype.bitsize()));
            let bits = bits.ok_or_else(|| format!("the size of tensor `{}` overflows", name()))?;
            if !bits.is_multiple_of(8) || bits / 8 != record.end - record.start {
                return Err(format!(
                    "tensor `{}` of shape {:?} and dtype {} has {} bytes",
                    name(),
                    entry.shape,
                    record.dtype,
                    record.end - record.start
                ));
            }
        }
        if end.checked_add(data_start).is_none() {
            return Err("its offsets overflow".to_owned());
        }
        for record in &mut self.records {
            record.start += data_start;
            record.end += data_start;
        }
        Ok(())
    }
}
