//! Where each tensor's bytes go in an output file, and the header that says so.

use super::schema;
use safetensors::tensor::TensorInfo;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use std::collections::BTreeMap;
use std::ops::Range;

/// Readers accept no longer header.
const LONGEST_HEADER: usize = 100_000_000;
/// Headers are padded with spaces so that the data starts at a multiple of this.
const HEADER_ALIGNMENT: usize = 8;

/// The layout of one output file.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Length field, JSON and padding: the file's first bytes.
    pub header: Vec<u8>,
    /// Bytes of each tensor within the file, in the shard's order, without holes.
    pub ranges: Vec<Range<usize>>,
    /// Bytes of the whole file.
    pub size: usize,
}

/// Serialises in the order of the bytes, so that the same shard always gives the same header.
struct HeaderJson<'a> {
    metadata: &'a BTreeMap<String, String>,
    tensors: Vec<(&'a str, TensorInfo)>,
}

impl Serialize for HeaderJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.tensors.len() + 1))?;
        map.serialize_entry("__metadata__", self.metadata)?;
        for (name, info) in &self.tensors {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

impl Layout {
    /// Lays out a shard.
    ///
    /// # Errors
    /// A sentence if a size overflows, an element type does not fill whole bytes, or the header gets too long.
    pub fn of(shard: &schema::Shard) -> Result<Self, String> {
        let mut end = 0_usize;
        let mut tensors = Vec::with_capacity(shard.tensors.len());
        for tensor in &shard.tensors {
            let start = end;
            end = tensor_bytes(tensor).and_then(|bytes| start.checked_add(bytes)).ok_or_else(|| {
                format!(
                    "the size of tensor `{}` of shape {:?} and dtype {} overflows or does not fill whole bytes",
                    tensor.name, tensor.shape, tensor.dtype
                )
            })?;
            let info = TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                data_offsets: (start, end),
            };
            tensors.push((tensor.name.as_str(), info));
        }
        let offsets: Vec<_> = tensors.iter().map(|(_, info)| info.data_offsets).collect();
        let json = serde_json::to_vec(&HeaderJson { metadata: &shard.metadata, tensors })
            .map_err(|e| format!("the header of {} cannot be written: {e}", shard.file))?;
        let padded = json.len().next_multiple_of(HEADER_ALIGNMENT);
        if padded > LONGEST_HEADER {
            return Err(format!(
                "the header of {} would have {padded} bytes, more than readers accept; use smaller shards",
                shard.file
            ));
        }
        let mut header = (padded as u64).to_le_bytes().to_vec();
        header.extend_from_slice(&json);
        header.resize(8 + padded, b' ');
        let place = |offset: usize| {
            header
                .len()
                .checked_add(offset)
                .ok_or_else(|| format!("the size of {} overflows", shard.file))
        };
        let ranges = offsets
            .iter()
            .map(|&(start, end)| Ok(place(start)?..place(end)?))
            .collect::<Result<_, String>>()?;
        Ok(Self { size: place(end)?, header, ranges })
    }
}

/// Bytes of a tensor, or `None` if that overflows or is not a whole number.
fn tensor_bytes(tensor: &schema::Tensor) -> Option<usize> {
    let elements = tensor.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(tensor.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}
