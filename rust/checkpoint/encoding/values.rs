//! What the bytes of small parts say: a shape, a global scale.

use super::description::Encoding;
use crate::checkpoint::header::TensorEntry;
use crate::checkpoint::stored::{Stored, TensorId};
use crate::code::GlobalScale;
use crate::error::printable;
use crate::{Error, Result};
use safetensors::Dtype;

/// Global scales beyond these powers of two leave the range of f32 together with a block's.
const USABLE: std::ops::RangeInclusive<f32> = 7.888_609e-31..=1.267_650_6e30;

/// Checks that a shape which is stored as a tensor is the one that dtypes and shapes say. An encoding of 8-bit integers
/// looks like one of twice as many 4-bit ones, but for this.
pub(in crate::checkpoint) fn check_stated_shape(
    stored: &Stored,
    encoding: &Encoding,
    read: impl Fn(TensorId, &mut [u8]) -> Result<()>,
) -> Result<()> {
    for &id in &encoding.riders {
        let (shard, TensorEntry { name, dtype, range, .. }) = stored.entry(id);
        if !name.ends_with("_shape") {
            continue;
        }
        let size = match dtype {
            Dtype::I32 => 4,
            Dtype::I64 => 8,
            _ => continue,
        };
        // Before anything is allocated.
        let mut bytes = vec![0; range.len().min(64 * size)];
        let stated: Option<Vec<usize>> = if range.len() == bytes.len() {
            read(id, &mut bytes)?;
            bytes.chunks_exact(size).map(integer).collect()
        } else {
            None
        };
        if stated.as_ref() != Some(&encoding.shape) {
            return Err(Error::unusable(
                &shard.path,
                format!(
                    "its tensor `{}` is stored for the shape {:?}, but `{}` says {}; give the checkpoint that it was \
                     made from",
                    printable(&encoding.name),
                    encoding.shape,
                    printable(name),
                    stated.map_or("something else".to_owned(), |stated| format!("{stated:?}"))
                ),
            ));
        }
    }
    Ok(())
}

/// A little-endian integer of four or eight bytes, if it can be a dimension.
fn integer(bytes: &[u8]) -> Option<usize> {
    let value = match *bytes {
        [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
        _ => i64::from_le_bytes(bytes.try_into().ok()?),
    };
    usize::try_from(value).ok()
}

/// The global scale of one matrix of a tensor, if the tensor has any.
pub(in crate::checkpoint) fn global_scale(
    stored: &Stored,
    encoding: &Encoding,
    matrix: usize,
    read: impl Fn(TensorId, &mut [u8]) -> Result<()>,
) -> Result<Option<GlobalScale>> {
    let Some(global) = encoding.global else { return Ok(None) };
    let (shard, TensorEntry { name, range, .. }) = stored.entry(global.tensor);
    let mut bytes = vec![0; range.len()];
    read(global.tensor, &mut bytes)?;
    let place = if global.each { matrix } else { 0 };
    let value = bytes.as_chunks().0.get(place).map_or(f32::NAN, |bytes| f32::from_le_bytes(*bytes));
    if USABLE.contains(&value) {
        return Ok(Some(GlobalScale { value, divides: global.divides }));
    }
    Err(Error::unusable(
        &shard.path,
        format!(
            "the global scale `{}` of its tensor `{}` should be a positive number of usual size, not {value}; download \
             the checkpoint again",
            printable(name),
            printable(&encoding.name)
        ),
    ))
}
