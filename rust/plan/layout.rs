//! Where each tensor's bytes go in an output file, and the header that says so.
//!
//! Of 200,000 tensors a layout keeps only where they end. The header is written when its bytes are wanted; before that
//! only its length is known.

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

/// Readers accept no longer header.
const LONGEST_HEADER: usize = 100_000_000;
/// Headers are padded with spaces so that the data starts at a multiple of this.
const HEADER_ALIGNMENT: usize = 8;
/// Bytes of the little-endian length in front of the header.
const LENGTH_BYTES: usize = 8;

/// The layout of one output file.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Bytes of length field, JSON and padding: where the data starts.
    pub header: usize,
    /// Where each tensor ends within the file, in the shard's order, without holes.
    ends: Vec<usize>,
    /// Bytes of the whole file.
    pub size: usize,
}

/// What a header says of a tensor.
#[derive(Debug, Clone)]
pub(super) struct Entry<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
}

/// Gives what a header says of the tensor with this number.
pub(super) type Entries<'f, 'a> = &'f dyn Fn(usize) -> Option<Entry<'a>>;

/// Serialises in the order of the bytes, so that the same shard always gives the same header.
struct HeaderJson<'f, 'a> {
    metadata: &'f BTreeMap<String, String>,
    /// Where the data starts, and where each tensor ends, counted from the same byte.
    start: usize,
    ends: &'f [usize],
    entry: Entries<'f, 'a>,
}

impl Serialize for HeaderJson<'_, '_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("__metadata__", self.metadata)?;
        let mut start = 0;
        for (number, end) in self.ends.iter().enumerate() {
            let Some(Entry { name, dtype, shape }) = (self.entry)(number) else { break };
            let end = end - self.start;
            let info = TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (start, end) };
            map.serialize_entry(name, &info)?;
            start = end;
        }
        map.end()
    }
}

/// Counts what is written to it.
struct Counter(usize);

impl io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Layout {
    /// That of a file without tensors, until there is another.
    pub(super) fn empty() -> Self {
        Self { header: 0, ends: Vec::new(), size: 0 }
    }

    /// Lays out a shard of `count` tensors; `entry` gives what its header says of each.
    ///
    /// # Errors
    /// A sentence if a size overflows, an element type does not fill whole bytes, or the header gets too long.
    pub(super) fn of(
        file: &str,
        metadata: &BTreeMap<String, String>,
        count: usize,
        entry: Entries<'_, '_>,
    ) -> Result<Self, String> {
        let mut ends = Vec::with_capacity(count);
        let mut end = 0_usize;
        for number in 0..count {
            let Some(tensor) = entry(number) else { break };
            let bytes = tensor_bytes(&tensor);
            end = bytes.and_then(|bytes| end.checked_add(bytes)).ok_or_else(|| {
                format!(
                    "the size of tensor `{}` of shape {:?} and dtype {} overflows or does not fill whole bytes",
                    tensor.name, tensor.shape, tensor.dtype
                )
            })?;
            ends.push(end);
        }
        let mut counter = Counter(0);
        serde_json::to_writer(&mut counter, &HeaderJson { metadata, start: 0, ends: &ends, entry })
            .map_err(|e| format!("the header of {file} cannot be written: {e}"))?;
        let padded = counter.0.next_multiple_of(HEADER_ALIGNMENT);
        if padded > LONGEST_HEADER {
            return Err(format!(
                "the header of {file} would have {padded} bytes, more than readers accept; use smaller shards"
            ));
        }
        let header = LENGTH_BYTES + padded;
        let size = end.checked_add(header);
        let size = size.ok_or_else(|| format!("the size of {file} overflows"))?;
        ends.iter_mut().for_each(|end| *end += header);
        Ok(Self { header, ends, size })
    }

    /// The header's bytes; `metadata` and `entry` are those that the shard was laid out with.
    ///
    /// # Errors
    /// A sentence if they are not.
    pub(super) fn write_header(
        &self,
        metadata: &BTreeMap<String, String>,
        entry: Entries<'_, '_>,
    ) -> Result<Vec<u8>, String> {
        let mut header = ((self.header - LENGTH_BYTES) as u64).to_le_bytes().to_vec();
        header.reserve_exact(self.header - LENGTH_BYTES);
        let json = HeaderJson { metadata, start: self.header, ends: &self.ends, entry };
        serde_json::to_writer(&mut header, &json).map_err(|e| e.to_string())?;
        if header.len() > self.header || self.header - header.len() >= HEADER_ALIGNMENT {
            return Err(format!("it has {} bytes, not {}", header.len(), self.header));
        }
        header.resize(self.header, b' ');
        Ok(header)
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no tensor.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of a tensor within the file.
    #[must_use]
    pub fn range(&self, number: usize) -> Range<usize> {
        let start = number.checked_sub(1).map_or(self.header, |before| self.ends[before]);
        start..self.ends[number]
    }

    /// The first tensor that ends behind this byte of the file; the number of tensors if there is none.
    #[must_use]
    pub fn first_behind(&self, offset: usize) -> usize {
        self.ends.partition_point(|&end| end <= offset)
    }
}

/// Bytes of a tensor, or `None` if that overflows or is not a whole number.
fn tensor_bytes(tensor: &Entry<'_>) -> Option<usize> {
    let elements = tensor.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(tensor.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}
