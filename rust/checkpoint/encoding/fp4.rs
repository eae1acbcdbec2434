//! What the formats of 4-bit floats have in common: two codes a byte, scales of groups within a row.

use super::description::{Blocks, Scales, leading};
use super::parts::{Codes, Part};
use crate::code::ScaleType;
use crate::{Error, Result};

/// The scales of groups of columns, which must have the tensor's shape but for the last dimension.
pub(super) fn grouped(
    codes: &Codes<'_>,
    shape: &[usize],
    scales: &Part<'_>,
    scale_type: ScaleType,
    group: usize,
) -> Result<Scales> {
    let (&columns, leading) = shape.split_last().unwrap_or((&1, &[]));
    let across = columns / group;
    let mut expected = leading.to_vec();
    expected.push(across);
    if !columns.is_multiple_of(group) {
        return Err(codes.unusable(&format_args!(
            "has {columns} numbers a row, which groups of {group} do not divide; download the checkpoint again"
        )));
    }
    if scales.shape != expected {
        return Err(misfit(codes, shape, scales, &expected));
    }
    let down = leading.last().copied().unwrap_or(1);
    let blocks = Blocks { rows: 1, columns: group };
    Ok(Scales { tensor: scales.id, scale_type, blocks, grid: [down, across] })
}

/// The error of scales of another shape: those that kernels want are padded to tiles of 128 rows and 4 columns, in
/// another order. Where nothing is padded and the shape is kept, nobody can tell.
fn misfit(codes: &Codes<'_>, shape: &[usize], scales: &Part<'_>, expected: &[usize]) -> Error {
    if is_swizzled(shape, scales, expected) {
        return codes.unusable(&format_args!(
            "has scales `{}` of shape {:?} that are padded or swizzled for a kernel, where {expected:?} are expected; \
             export the checkpoint with plain scales",
            crate::error::printable(scales.name),
            scales.shape
        ));
    }
    codes.misfit(scales, &format_args!("shape {expected:?}"))
}

/// Whether there are as many scales as expected, or as many as there would be with padding.
pub(super) fn is_swizzled(shape: &[usize], scales: &Part<'_>, expected: &[usize]) -> bool {
    let across = expected.last().copied().unwrap_or(1);
    let down = shape.iter().rev().nth(1).copied().unwrap_or(1);
    let matrices = leading(shape);
    let padded = down
        .checked_next_multiple_of(128)
        .zip(across.checked_next_multiple_of(4))
        .and_then(|(down, across)| down.checked_mul(across)?.checked_mul(matrices));
    let count = scales.elements();
    count > 1 && (padded == Some(count) || Some(count) == checked_product(expected))
}

fn checked_product(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &side| product.checked_mul(side))
}
