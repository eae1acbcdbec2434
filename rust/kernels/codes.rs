//! Codes of quantised tensors to f32 and back, multiplied or divided by the factors of groups of them on the way.
//!
//! Loops over the functions of [`crate::code`], which have no branches, so that the compiler vectorises them as they stand.
//! It does so only where all is inlined into a function with the level's features: hence types in place of closures.

use super::generic::Half;
use crate::code::{
    Code, e2m1_to_f32, e4m3_to_f32, e5m2_to_f32, f32_to_e2m1, f32_to_e4m3, f32_to_e5m2,
    f32_to_int4, int4_to_f32,
};
use std::marker::PhantomData;

/// Runs of numbers that follow one another, and share a factor.
#[derive(Debug, Clone, Copy)]
pub struct Groups<'a> {
    /// The factor of each run.
    pub factors: &'a [f32],
    /// Numbers of the first run.
    pub first: usize,
    /// Numbers of the others; the last one may be shorter.
    pub columns: usize,
}

impl Groups<'_> {
    /// Whether there is a factor for each of so many numbers, and no more.
    pub(super) fn fit(&self, numbers: usize) -> bool {
        let rest = numbers.saturating_sub(self.first).div_ceil(self.columns.max(1));
        self.first > 0 && self.factors.len() == usize::from(numbers > 0) + rest
    }

    /// Each factor with the numbers that it belongs to.
    #[inline(always)]
    fn runs(&self, numbers: usize) -> impl Iterator<Item = (f32, std::ops::Range<usize>)> {
        let (first, columns) = (self.first, self.columns);
        self.factors.iter().enumerate().map(move |(run, &factor)| {
            let start = if run == 0 { 0 } else { first + (run - 1) * columns };
            (factor, start..numbers.min(first + run * columns))
        })
    }
}

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

/// As [`super::Kernels::decode`], from the first byte on; `middle` says that its high nibble is the first code. `H` decodes
/// E4M3 by way of halves.
#[inline(always)]
pub(super) fn decode<H: Half>(
    code: Code,
    bytes: &[u8],
    middle: bool,
    groups: Option<&Groups<'_>>,
    out: &mut [f32],
) {
    match code {
        Code::E4M3 if H::FAST => decode_all::<Halves<H>>(bytes, middle, groups, out),
        Code::E4M3 => decode_all::<Bytes<E4M3>>(bytes, middle, groups, out),
        Code::E5M2 => decode_all::<Bytes<E5M2>>(bytes, middle, groups, out),
        Code::E2M1 => decode_all::<Nibbles<E2M1>>(bytes, middle, groups, out),
        Code::Int4 => decode_all::<Nibbles<Int4>>(bytes, middle, groups, out),
    }
}

/// As [`super::Kernels::encode`].
#[inline(always)]
pub(super) fn encode(code: Code, values: &[f32], groups: Option<&Groups<'_>>, out: &mut [u8]) {
    match code {
        Code::E4M3 => encode_all::<Bytes<E4M3>>(values, groups, out),
        Code::E5M2 => encode_all::<Bytes<E5M2>>(values, groups, out),
        Code::E2M1 => encode_all::<Nibbles<E2M1>>(values, groups, out),
        Code::Int4 => encode_all::<Nibbles<Int4>>(values, groups, out),
    }
}

/// As [`super::Kernels::amax`]. Magnitudes are ordered as their bits are, with NaN above all: a maximum of integers, in
/// any order.
#[inline(always)]
pub(super) fn amax(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |most: u32, value| most.max(value.abs().to_bits())))
}

/// How codes lie in bytes. The factor is multiplied with or divided by if `SCALED`.
trait Stored {
    /// Codes in a byte.
    const PER_BYTE: usize;
    fn decode<const SCALED: bool>(bytes: &[u8], middle: bool, factor: f32, out: &mut [f32]);
    fn encode<const SCALED: bool>(values: &[f32], factor: f32, out: &mut [u8]);
}

/// A code a byte.
struct Bytes<N>(PhantomData<N>);
/// Two codes a byte, the low one first.
struct Nibbles<N>(PhantomData<N>);
/// E4M3, by way of halves: all of its numbers are halves with another bias, subnormal ones too.
struct Halves<H>(PhantomData<H>);

#[inline(always)]
fn decode_all<S: Stored>(bytes: &[u8], middle: bool, groups: Option<&Groups<'_>>, out: &mut [f32]) {
    let Some(groups) = groups else { return S::decode::<false>(bytes, middle, 1.0, out) };
    let skipped = usize::from(middle);
    for (factor, run) in groups.runs(out.len()) {
        let first = run.start + skipped;
        let bytes = &bytes[first / S::PER_BYTE..];
        S::decode::<true>(bytes, first % S::PER_BYTE != 0, factor, &mut out[run]);
    }
}

#[inline(always)]
fn encode_all<S: Stored>(values: &[f32], groups: Option<&Groups<'_>>, out: &mut [u8]) {
    let Some(groups) = groups else { return S::encode::<false>(values, 1.0, out) };
    for (factor, run) in groups.runs(values.len()) {
        let bytes = run.start / S::PER_BYTE..run.end / S::PER_BYTE;
        S::encode::<true>(&values[run], factor, &mut out[bytes]);
    }
}

/// A number from its code, scaled.
#[inline(always)]
fn load<N: Number, const SCALED: bool>(code: u8, factor: f32) -> f32 {
    if SCALED { N::load(code) * factor } else { N::load(code) }
}

/// The code of a number, scaled. A product with the reciprocal would be rounded twice.
#[inline(always)]
fn store<N: Number, const SCALED: bool>(value: f32, factor: f32) -> u8 {
    N::store(if SCALED { value / factor } else { value })
}

impl<N: Number> Stored for Bytes<N> {
    const PER_BYTE: usize = 1;

    #[inline(always)]
    fn decode<const SCALED: bool>(bytes: &[u8], _: bool, factor: f32, out: &mut [f32]) {
        for (value, byte) in out.iter_mut().zip(bytes) {
            *value = load::<N, SCALED>(*byte, factor);
        }
    }

    #[inline(always)]
    fn encode<const SCALED: bool>(values: &[f32], factor: f32, out: &mut [u8]) {
        for (byte, value) in out.iter_mut().zip(values) {
            *byte = store::<N, SCALED>(*value, factor);
        }
    }
}

impl<N: Number> Stored for Nibbles<N> {
    const PER_BYTE: usize = 2;

    #[inline(always)]
    fn decode<const SCALED: bool>(
        mut bytes: &[u8],
        middle: bool,
        factor: f32,
        mut out: &mut [f32],
    ) {
        if middle && !out.is_empty() {
            out[0] = load::<N, SCALED>(bytes[0] >> 4, factor);
            (bytes, out) = (&bytes[1..], &mut out[1..]);
        }
        let (pairs, last) = out.as_chunks_mut::<2>();
        if let [value] = last {
            *value = load::<N, SCALED>(bytes[pairs.len()] & 0x0F, factor);
        }
        for (pair, byte) in pairs.iter_mut().zip(bytes) {
            *pair = [byte & 0x0F, byte >> 4].map(|code| load::<N, SCALED>(code, factor));
        }
    }

    #[inline(always)]
    fn encode<const SCALED: bool>(values: &[f32], factor: f32, out: &mut [u8]) {
        for (byte, pair) in out.iter_mut().zip(values.as_chunks::<2>().0) {
            let [low, high] = pair.map(|value| store::<N, SCALED>(value, factor));
            *byte = low | (high << 4);
        }
    }
}

/// Codes that are made halves at a time.
const HALVES: usize = 64;

impl<H: Half> Stored for Halves<H> {
    const PER_BYTE: usize = 1;

    #[inline(always)]
    fn decode<const SCALED: bool>(bytes: &[u8], middle: bool, factor: f32, out: &mut [f32]) {
        // Biases are 7 and 15. One product instead of two: a power of two rounds nothing, unless there is no such number.
        let scale = if SCALED { factor * 256.0 } else { 256.0 };
        if !scale.is_finite() {
            return Bytes::<E4M3>::decode::<SCALED>(bytes, middle, factor, out);
        }
        let (blocks, rest) = out.as_chunks_mut::<HALVES>();
        let (codes, codes_rest) = bytes[..blocks.len() * HALVES + rest.len()].as_chunks::<HALVES>();
        for (block, codes) in blocks.iter_mut().zip(codes) {
            let halves = codes.map(|code| {
                let magnitude = u16::from(code & 0x7F);
                let bits = if magnitude == 0x7F { 0x7E00 } else { magnitude << 7 };
                (bits | (u16::from(code & 0x80) << 8)).to_le_bytes()
            });
            H::load(&halves, block);
            for value in block {
                *value *= scale;
            }
        }
        Bytes::<E4M3>::decode::<SCALED>(codes_rest, middle, factor, rest);
    }

    #[inline(always)]
    fn encode<const SCALED: bool>(values: &[f32], factor: f32, out: &mut [u8]) {
        Bytes::<E4M3>::encode::<SCALED>(values, factor, out);
    }
}
