//! The loops themselves, written so that the compiler vectorises them for whatever features the caller has.

use crate::dtype::{Float, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, f64_to_f32};

/// A span of one row of a product of two thin matrices.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// The row of the first matrix, `rank` elements.
    pub coefficients: &'a [f32],
    /// The second matrix, (rank, columns).
    pub factor: &'a [f32],
    /// Its columns.
    pub columns: usize,
    /// Column at which the span starts.
    pub start: usize,
    /// Multiplies the sum.
    pub scale: f32,
}

/// Elements that [`super::Kernels::collect_between`] may write beyond the last one found.
pub const COLLECT_MARGIN: usize = 16;

/// Conversions of IEEE half, the one thing that the compiler does not vectorise by itself.
pub(super) trait Half {
    /// Whether it takes less than calculating would.
    const FAST: bool;
    /// Half to f32.
    fn load(source: &[[u8; 2]], destination: &mut [f32]);
    /// f32 to half.
    fn store(source: &[f32], destination: &mut [[u8; 2]]);
}

/// The reference: one element at a time.
pub(super) struct Portable;

impl Half for Portable {
    const FAST: bool = false;

    #[inline(always)]
    fn load(source: &[[u8; 2]], destination: &mut [f32]) {
        for (value, bytes) in destination.iter_mut().zip(source) {
            *value = f16_to_f32(u16::from_le_bytes(*bytes));
        }
    }

    #[inline(always)]
    fn store(source: &[f32], destination: &mut [[u8; 2]]) {
        for (bytes, value) in destination.iter_mut().zip(source) {
            *bytes = f32_to_f16(*value).to_le_bytes();
        }
    }
}

#[inline(always)]
pub(super) fn load<H: Half>(dtype: Float, source: &[u8], destination: &mut [f32]) {
    match dtype {
        Float::BF16 => {
            for (value, bytes) in destination.iter_mut().zip(source.as_chunks().0) {
                *value = bf16_to_f32(u16::from_le_bytes(*bytes));
            }
        }
        Float::F16 => H::load(source.as_chunks().0, destination),
        Float::F32 => {
            for (value, bytes) in destination.iter_mut().zip(source.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Float::F64 => {
            for (value, bytes) in destination.iter_mut().zip(source.as_chunks().0) {
                *value = f64_to_f32(f64::from_le_bytes(*bytes));
            }
        }
    }
}

#[inline(always)]
pub(super) fn store<H: Half>(dtype: Float, source: &[f32], destination: &mut [u8]) -> bool {
    let limit = dtype.overflow();
    // An integer OR, not a bool `&&`: no early exit, so it vectorises. NaN fails the comparison too.
    let outside = source.iter().fold(0, |found, value| {
        let inside = value.abs() < limit;
        found | u32::from(!inside)
    });
    match dtype {
        Float::BF16 => {
            for (bytes, value) in destination.as_chunks_mut().0.iter_mut().zip(source) {
                *bytes = f32_to_bf16(*value).to_le_bytes();
            }
        }
        Float::F16 => H::store(source, destination.as_chunks_mut().0),
        Float::F32 => {
            for (bytes, value) in destination.as_chunks_mut().0.iter_mut().zip(source) {
                *bytes = value.to_le_bytes();
            }
        }
        Float::F64 => {
            for (bytes, value) in destination.as_chunks_mut().0.iter_mut().zip(source) {
                *bytes = f64::from(*value).to_le_bytes();
            }
        }
    }
    outside == 0
}

/// As [`super::Kernels::weighted_sum`]; sums stay in registers while the operands go by.
#[inline(always)]
pub(super) fn weighted_sum(out: &mut [f32], operands: &[&[f32]], weights: &[f32]) {
    let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
    let done = blocks.len() * BLOCK;
    for (number, block) in blocks.iter_mut().enumerate() {
        let mut sums = [0.0_f32; BLOCK];
        for (operand, &weight) in operands.iter().zip(weights) {
            let values = &operand[number * BLOCK..][..BLOCK];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = value.mul_add(weight, *sum);
            }
        }
        *block = sums;
    }
    for (place, sum) in rest.iter_mut().enumerate() {
        let terms = operands.iter().zip(weights);
        *sum =
            terms.fold(0.0, |sum, (operand, &weight)| operand[done + place].mul_add(weight, sum));
    }
}

#[inline(always)]
pub(super) fn multiply_add(accumulator: &mut [f32], values: &[f32], weight: f32) {
    for (sum, value) in accumulator.iter_mut().zip(values) {
        *sum = value.mul_add(weight, *sum);
    }
}

/// Sums that are kept side by side: enough to hide the latency of an addition at every level.
const LANES: usize = 32;

#[inline(always)]
pub(super) fn dot(left: &[f32], right: &[f32]) -> f64 {
    let mut sums = [0.0_f64; LANES];
    let (left_blocks, left_rest) = left.as_chunks::<LANES>();
    let (right_blocks, right_rest) = right.as_chunks::<LANES>();
    for (left, right) in left_blocks.iter().zip(right_blocks) {
        for ((sum, x), y) in sums.iter_mut().zip(left).zip(right) {
            // The product of two f32 is exact in f64, so that a fused addition would give the same bits.
            *sum += f64::from(*x) * f64::from(*y);
        }
    }
    for ((sum, x), y) in sums.iter_mut().zip(left_rest).zip(right_rest) {
        *sum += f64::from(*x) * f64::from(*y);
    }
    sums.iter().sum()
}

/// As [`super::Kernels::collect_between`] says.
#[inline(always)]
pub(super) fn collect_between(
    values: &[f32],
    base: Option<&[f32]>,
    low: u32,
    width: u32,
    found: &mut [u32],
) -> (usize, u32) {
    let (mut count, mut higher) = (0, 0);
    let mut add = |value: f32| {
        let bits = value.to_bits() & MAGNITUDE;
        let offset = bits.wrapping_sub(low);
        // No branch: where values are near the bounds, none would be predicted.
        found[count] = offset;
        count += usize::from(offset < width);
        higher += u32::from(bits >= low) & u32::from(offset >= width);
    };
    match base {
        Some(base) => values.iter().zip(base).for_each(|(value, base)| add(value - base)),
        None => values.iter().for_each(|&value| add(value)),
    }
    (count, higher)
}

/// All bits of an f32 but its sign.
pub(super) const MAGNITUDE: u32 = 0x7FFF_FFFF;

/// Columns whose sums stay in registers while the coefficients go by.
const BLOCK: usize = 64;

#[inline(always)]
pub(super) fn add_product(values: &mut [f32], product: &Product<'_>) {
    let &Product { coefficients, factor, columns, start, scale } = product;
    let rows = || coefficients.iter().zip(factor.chunks_exact(columns));
    let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
    let done = start + blocks.len() * BLOCK;
    for (number, block) in blocks.iter_mut().enumerate() {
        let mut sums = [0.0_f32; BLOCK];
        for (&coefficient, row) in rows() {
            let row = &row[start + number * BLOCK..][..BLOCK];
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum = value.mul_add(coefficient, *sum);
            }
        }
        for (value, sum) in block.iter_mut().zip(sums) {
            *value = sum.mul_add(scale, *value);
        }
    }
    for (column, value) in rest.iter_mut().enumerate() {
        let sum = rows().fold(0.0_f32, |sum, (c, row)| row[done + column].mul_add(*c, sum));
        *value = sum.mul_add(scale, *value);
    }
}
