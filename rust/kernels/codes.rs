//! Codes of quantised tensors to f32 and back, and the scales of groups of them.
//!
//! Loops over the functions of [`crate::code`], which have no branches and are vectorised as they stand.

use super::Kernels;
use crate::code::{
    Code, e2m1_to_f32, e4m3_to_f32, e5m2_to_f32, f32_to_e2m1, f32_to_e4m3, f32_to_e5m2,
    f32_to_int4, int4_to_f32,
};

impl Kernels {
    /// The numbers of codes, exact. The first is the one with the number `first` within `bytes`, since codes of four bits
    /// may begin in the middle of a byte.
    pub fn decode(&self, code: Code, bytes: &[u8], first: usize, out: &mut [f32]) {
        let bytes = &bytes[first / code.per_byte()..];
        let middle = !first.is_multiple_of(code.per_byte());
        assert!(bytes.len() >= code.bytes(out.len() + usize::from(middle)));
        self.run(|| match code {
            Code::E4M3 => decode_bytes(bytes, out, e4m3_to_f32),
            Code::E5M2 => decode_bytes(bytes, out, e5m2_to_f32),
            Code::E2M1 => decode_nibbles(bytes, middle, out, e2m1_to_f32),
            Code::Int4 => decode_nibbles(bytes, middle, out, int4_to_f32),
        });
    }

    /// The nearest codes of values, ties to even, never beyond [`Code::most`]. Values must be finite, and there must be
    /// two for each byte where codes have four bits.
    pub fn encode(&self, code: Code, values: &[f32], out: &mut [u8]) {
        assert_eq!(values.len(), out.len() * code.per_byte());
        self.run(|| match code {
            Code::E4M3 => encode_bytes(values, out, f32_to_e4m3),
            Code::E5M2 => encode_bytes(values, out, f32_to_e5m2),
            Code::E2M1 => encode_nibbles(values, out, f32_to_e2m1),
            Code::Int4 => encode_nibbles(values, out, f32_to_int4),
        });
    }

    /// Multiplies each run of `columns` values, the last of which may be shorter, by its factor.
    pub fn scale_groups(&self, values: &mut [f32], factors: &[f32], columns: usize) {
        self.over_groups(values, factors, columns, |value, factor| value * factor);
    }

    /// Divides each run of `columns` values, the last of which may be shorter, by its factor. A product with the reciprocal
    /// would be rounded twice.
    pub fn divide_groups(&self, values: &mut [f32], factors: &[f32], columns: usize) {
        self.over_groups(values, factors, columns, |value, factor| value / factor);
    }

    /// The largest magnitude; NaN if there is one, and zero of no values.
    #[must_use]
    pub fn amax(&self, values: &[f32]) -> f32 {
        // Magnitudes are ordered as their bits are, with NaN above all: a maximum of integers, in any order.
        let largest = |values: &[f32]| {
            values.iter().fold(0, |most: u32, value| most.max(value.abs().to_bits()))
        };
        f32::from_bits(self.run(|| largest(values)))
    }

    #[inline(always)]
    fn over_groups(
        &self,
        values: &mut [f32],
        factors: &[f32],
        columns: usize,
        operation: impl Fn(f32, f32) -> f32,
    ) {
        assert_eq!(values.len().div_ceil(columns), factors.len());
        self.run(|| match columns {
            // Loops of a known length have no remainder to look after.
            16 => fixed_groups::<16>(values, factors, operation),
            32 => fixed_groups::<32>(values, factors, operation),
            _ => {
                for (group, factor) in values.chunks_mut(columns).zip(factors) {
                    group.iter_mut().for_each(|value| *value = operation(*value, *factor));
                }
            }
        });
    }
}

#[inline(always)]
fn fixed_groups<const N: usize>(
    values: &mut [f32],
    factors: &[f32],
    operation: impl Fn(f32, f32) -> f32,
) {
    let (groups, rest) = values.as_chunks_mut::<N>();
    if let (false, Some(factor)) = (rest.is_empty(), factors.get(groups.len())) {
        rest.iter_mut().for_each(|value| *value = operation(*value, *factor));
    }
    for (group, factor) in groups.iter_mut().zip(factors) {
        for value in group {
            *value = operation(*value, *factor);
        }
    }
}

#[inline(always)]
fn decode_bytes(bytes: &[u8], out: &mut [f32], number: impl Fn(u8) -> f32) {
    for (value, byte) in out.iter_mut().zip(bytes) {
        *value = number(*byte);
    }
}

#[inline(always)]
fn decode_nibbles(mut bytes: &[u8], middle: bool, mut out: &mut [f32], number: impl Fn(u8) -> f32) {
    if middle && !out.is_empty() {
        out[0] = number(bytes[0] >> 4);
        (bytes, out) = (&bytes[1..], &mut out[1..]);
    }
    let (pairs, last) = out.as_chunks_mut::<2>();
    if let [value] = last {
        *value = number(bytes[pairs.len()] & 0x0F);
    }
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = [number(byte & 0x0F), number(byte >> 4)];
    }
}

#[inline(always)]
fn encode_bytes(values: &[f32], out: &mut [u8], code: impl Fn(f32) -> u8) {
    for (byte, value) in out.iter_mut().zip(values) {
        *byte = code(*value);
    }
}

#[inline(always)]
fn encode_nibbles(values: &[f32], out: &mut [u8], code: impl Fn(f32) -> u8) {
    for (byte, [low, high]) in out.iter_mut().zip(values.as_chunks::<2>().0) {
        *byte = code(*low) | (code(*high) << 4);
    }
}
