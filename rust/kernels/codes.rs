//! Codes of quantised tensors to f32 and back, and the scales of groups of them.
//!
//! Loops over the functions of [`crate::code`], which have no branches, so that the compiler vectorises them as they stand.
//! It does so only where all is inlined into a function with the level's features: hence types in place of closures.

use crate::code::{
    Code, e2m1_to_f32, e4m3_to_f32, e5m2_to_f32, f32_to_e2m1, f32_to_e4m3, f32_to_e5m2,
    f32_to_int4, int4_to_f32,
};

/// One number, to and from its code.
trait Number {
    fn load(code: u8) -> f32;
    fn store(value: f32) -> u8;
}

macro_rules! number {
    ($name:ident, $load:ident, $store:ident) => {
        struct $name;

        impl Number for $name {
            #[inline(always)]
            fn load(code: u8) -> f32 {
                $load(code)
            }

            #[inline(always)]
            fn store(value: f32) -> u8 {
                $store(value)
            }
        }
    };
}

number!(E4M3, e4m3_to_f32, f32_to_e4m3);
number!(E5M2, e5m2_to_f32, f32_to_e5m2);
number!(E2M1, e2m1_to_f32, f32_to_e2m1);
number!(Int4, int4_to_f32, f32_to_int4);

/// As [`super::Kernels::decode`], from the first byte on; `middle` says that its high nibble is the first code.
#[inline(always)]
pub(super) fn decode(code: Code, bytes: &[u8], middle: bool, out: &mut [f32]) {
    match code {
        Code::E4M3 => decode_bytes::<E4M3>(bytes, out),
        Code::E5M2 => decode_bytes::<E5M2>(bytes, out),
        Code::E2M1 => decode_nibbles::<E2M1>(bytes, middle, out),
        Code::Int4 => decode_nibbles::<Int4>(bytes, middle, out),
    }
}

/// As [`super::Kernels::encode`].
#[inline(always)]
pub(super) fn encode(code: Code, values: &[f32], out: &mut [u8]) {
    match code {
        Code::E4M3 => encode_bytes::<E4M3>(values, out),
        Code::E5M2 => encode_bytes::<E5M2>(values, out),
        Code::E2M1 => encode_nibbles::<E2M1>(values, out),
        Code::Int4 => encode_nibbles::<Int4>(values, out),
    }
}

/// As [`super::Kernels::divide_groups`] or [`super::Kernels::scale_groups`].
///
/// The length of a run is not made a constant, though few are usual: for AVX-512 the compiler then goes through many runs
/// at once by gathers and scatters, twenty times slower.
#[inline(always)]
pub(super) fn over_groups(values: &mut [f32], factors: &[f32], columns: usize, divides: bool) {
    if divides {
        each_group::<true>(values, factors, columns);
    } else {
        each_group::<false>(values, factors, columns);
    }
}

/// As [`super::Kernels::amax`]. Magnitudes are ordered as their bits are, with NaN above all: a maximum of integers, in
/// any order.
#[inline(always)]
pub(super) fn amax(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |most: u32, value| most.max(value.abs().to_bits())))
}

#[inline(always)]
fn each_group<const DIVIDES: bool>(values: &mut [f32], factors: &[f32], columns: usize) {
    for (group, &factor) in values.chunks_mut(columns).zip(factors) {
        for value in group {
            *value = if DIVIDES { *value / factor } else { *value * factor };
        }
    }
}

#[inline(always)]
fn decode_bytes<N: Number>(bytes: &[u8], out: &mut [f32]) {
    for (value, byte) in out.iter_mut().zip(bytes) {
        *value = N::load(*byte);
    }
}

#[inline(always)]
fn decode_nibbles<N: Number>(mut bytes: &[u8], middle: bool, mut out: &mut [f32]) {
    if middle && !out.is_empty() {
        out[0] = N::load(bytes[0] >> 4);
        (bytes, out) = (&bytes[1..], &mut out[1..]);
    }
    let (pairs, last) = out.as_chunks_mut::<2>();
    if let [value] = last {
        *value = N::load(bytes[pairs.len()] & 0x0F);
    }
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = [N::load(byte & 0x0F), N::load(byte >> 4)];
    }
}

#[inline(always)]
fn encode_bytes<N: Number>(values: &[f32], out: &mut [u8]) {
    for (byte, value) in out.iter_mut().zip(values) {
        *byte = N::store(*value);
    }
}

#[inline(always)]
fn encode_nibbles<N: Number>(values: &[f32], out: &mut [u8]) {
    for (byte, [low, high]) in out.iter_mut().zip(values.as_chunks::<2>().0) {
        *byte = N::store(*low) | (N::store(*high) << 4);
    }
}
