//! Numbers of 8 and of 4 bits, and the scales that go with them, one at a time.
//!
//! As in [`crate::dtype`], these are the reference for every SIMD kernel. Widening is exact. Narrowing rounds to nearest,
//! ties to even, and never overflows: beyond the largest number it gives that.

use crate::dtype::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, f64_to_f32};

/// How one number of a quantised tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// 8 bits: 4 of the exponent, 3 of the mantissa; no infinity, one NaN of each sign.
    E4M3,
    /// 8 bits: 5 of the exponent, 2 of the mantissa; infinity and NaN as in IEEE half.
    E5M2,
    /// 4 bits: 2 of the exponent, 1 of the mantissa; two a byte, the low nibble first; no infinity, no NaN.
    E2M1,
    /// 4 bits, offset binary: the nibble less 8; two a byte, the low nibble first, thus eight in an I32.
    Int4,
}

impl Code {
    /// Bits of one number.
    #[must_use]
    pub fn bits(self) -> usize {
        match self {
            Self::E4M3 | Self::E5M2 => 8,
            Self::E2M1 | Self::Int4 => 4,
        }
    }

    /// Numbers in a byte.
    #[must_use]
    pub fn per_byte(self) -> usize {
        8 / self.bits()
    }

    /// Bytes that so many numbers fill.
    #[must_use]
    pub fn bytes(self, count: usize) -> usize {
        count.div_ceil(self.per_byte())
    }

    /// The largest magnitude that encoding uses; -8 of Int4 is read and never written.
    #[must_use]
    pub fn most(self) -> f32 {
        match self {
            Self::E4M3 => 448.0,
            Self::E5M2 => 57344.0,
            Self::E2M1 => 6.0,
            Self::Int4 => 7.0,
        }
    }

    /// Bits of its significand, the hidden one included; what is left of a difference after rounding depends on it.
    #[must_use]
    pub fn significand(self) -> u32 {
        match self {
            Self::E4M3 => 4,
            Self::E5M2 | Self::Int4 => 3,
            Self::E2M1 => 2,
        }
    }
}

/// A power of two in f32, `exponent` from -126 to 127.
const fn power(exponent: i32) -> f32 {
    f32::from_bits((exponent + 127).cast_unsigned() << 23)
}

/// The number of an E4M3 code, exact.
#[inline(always)]
#[must_use]
pub fn e4m3_to_f32(code: u8) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    let magnitude = u32::from(code & 0x7F);
    // Biases are 7 and 127. No f32 is subnormal on the way: those are slow on some processors.
    let normal = (magnitude << 20) + (120 << 23);
    let small = (f32::from(code & 0x07) * power(-9)).to_bits();
    let finite = if magnitude < 0x08 { small } else { normal };
    f32::from_bits(sign | if magnitude == 0x7F { 0x7FC0_0000 } else { finite })
}

/// The number of an E5M2 code, exact.
#[inline(always)]
#[must_use]
pub fn e5m2_to_f32(code: u8) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    let magnitude = u32::from(code & 0x7F);
    let normal = (magnitude << 21) + (112 << 23);
    let small = (f32::from(code & 0x03) * power(-16)).to_bits();
    let finite = if magnitude < 0x04 { small } else { normal };
    let special = if magnitude == 0x7C { 0x7F80_0000 } else { 0x7FC0_0000 };
    f32::from_bits(sign | if magnitude < 0x7C { finite } else { special })
}

/// The number of an E2M1 code in the low four bits, exact.
#[inline(always)]
#[must_use]
pub fn e2m1_to_f32(code: u8) -> f32 {
    let sign = u32::from(code & 0x08) << 28;
    let magnitude = u32::from(code & 0x07);
    let normal = (126 << 23) + (magnitude << 22);
    // Zero, and a half.
    let small = (magnitude & 1) * (126 << 23);
    f32::from_bits(sign | if magnitude < 2 { small } else { normal })
}

/// The number of an Int4 code in the low four bits.
#[inline(always)]
#[must_use]
pub fn int4_to_f32(code: u8) -> f32 {
    f32::from(code & 0x0F) - 8.0
}

/// A magnitude rounded to a float of `mantissa` bits whose least normal number is `2^least`, as its bits; it must not be
/// larger than that float's largest number.
#[inline(always)]
fn round_magnitude(magnitude: f32, mantissa: u32, least: i32) -> u32 {
    let bits = magnitude.to_bits();
    let shift = 23 - mantissa;
    let halfway = (1_u32 << (shift - 1)) - 1;
    let rounded = (bits + halfway + ((bits >> shift) & 1)) >> shift;
    let bias = (least + 126).cast_unsigned() << mantissa;
    // Subnormal results are multiples of 2^(least - mantissa). Where that is the spacing of f32, an addition rounds.
    let magic = power(23 - mantissa.cast_signed() + least);
    let small = (magnitude + magic).to_bits() - magic.to_bits();
    if magnitude < power(least) { small } else { rounded.wrapping_sub(bias) }
}

/// A magnitude no larger than `most`, which it also is for NaN: who has such values must look for them before.
#[inline(always)]
fn saturated(value: f32, most: f32) -> f32 {
    let magnitude = value.abs();
    if magnitude < most { magnitude } else { most }
}

/// f32 to E4M3; beyond 448 to 448.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "eight bits are left")]
pub fn f32_to_e4m3(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) & 0x80;
    (sign | round_magnitude(saturated(value, 448.0), 3, -6)) as u8
}

/// f32 to E5M2; beyond 57344 to 57344.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "eight bits are left")]
pub fn f32_to_e5m2(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) & 0x80;
    (sign | round_magnitude(saturated(value, 57344.0), 2, -14)) as u8
}

/// f32 to E2M1, in the low four bits; beyond 6 to 6.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "four bits are left")]
pub fn f32_to_e2m1(value: f32) -> u8 {
    let sign = (value.to_bits() >> 28) & 0x08;
    (sign | round_magnitude(saturated(value, 6.0), 1, 0)) as u8
}

/// f32 to Int4, in the low four bits; beyond 7 to 7, below -7 to -7.
#[inline(always)]
#[must_use]
pub fn f32_to_int4(value: f32) -> u8 {
    // Where the spacing of f32 is one, an addition rounds to integers.
    let magic = power(23);
    let magnitude = (saturated(value, 7.0) + magic).to_bits() - magic.to_bits();
    let negative = (value.to_bits() >> 31).wrapping_neg();
    // Two's complement by the sign's mask, then the offset.
    ((magnitude ^ negative).wrapping_sub(negative).wrapping_add(8) & 0x0F) as u8
}

/// The number of an E8M0 code: a power of two, or NaN.
#[inline(always)]
#[must_use]
pub fn e8m0_to_f32(code: u8) -> f32 {
    f32::from_bits(match code {
        // 2^-127 is subnormal.
        0 => 0x0040_0000,
        0xFF => 0x7FC0_0000,
        _ => u32::from(code) << 23,
    })
}

/// How a scale is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleType {
    /// IEEE single.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half.
    F16,
    /// A power of two: `2^(byte - 127)`, and 255 is NaN. Often typed U8.
    E8M0,
    /// As [`Code::E4M3`].
    E4M3,
}

impl ScaleType {
    /// Bytes of one scale.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::E8M0 | Self::E4M3 => 1,
        }
    }

    /// The scale that is stored as these bytes, of which there are [`ScaleType::size`]; NaN, which no merge lets pass, if
    /// there are others.
    #[must_use]
    pub fn load(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::BF16, &[a, b]) => bf16_to_f32(u16::from_le_bytes([a, b])),
            (Self::F16, &[a, b]) => f16_to_f32(u16::from_le_bytes([a, b])),
            (Self::E8M0, &[code]) => e8m0_to_f32(code),
            (Self::E4M3, &[code]) => e4m3_to_f32(code),
            _ => f32::NAN,
        }
    }
}

/// The scale that all scales of a tensor have in common (NVFP4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GlobalScale {
    /// The number that is stored.
    pub value: f32,
    /// Whether scales are divided by it, and not multiplied.
    pub divides: bool,
}

impl GlobalScale {
    /// What a block's codes are multiplied by, one rounding.
    #[inline(always)]
    #[must_use]
    pub fn factor(self, scale: f32) -> f32 {
        if self.divides { scale / self.value } else { scale * self.value }
    }
}

/// A scale that was chosen for a block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// Its bytes, little-endian; the first [`ScaleType::size`] count.
    pub bytes: [u8; 4],
    /// What the block's codes are multiplied by: the stored scale, and the global one.
    pub factor: f32,
}

/// The scale of a block whose largest magnitude is `amax`, which must be finite.
///
/// | codes | scales | rule |
/// |---|---|---|
/// | FP8 | F32, BF16, F16 | `amax / most`, rounded to nearest |
/// | FP8 | E8M0 | the least power of two that clips nothing |
/// | E2M1 | E8M0 | the least power of two of which `amax` is at most 7: 6 is then the nearest, or halfway |
/// | Int4 | F32, BF16, F16 | `amax / 7`, rounded to nearest |
/// | E2M1 | E4M3 | `amax / 6`, less the global scale, rounded to nearest, at most 448 |
///
/// A block of zeros gets the scale 1. No other gets the scale 0: it gets the least one that is not.
#[must_use]
pub fn scale_of(
    code: Code,
    scale_type: ScaleType,
    amax: f32,
    global: Option<GlobalScale>,
) -> Scale {
    let most = f64::from(code.most());
    let wanted = match (f64::from(amax), global) {
        (0.0, _) => 1.0,
        (amax, Some(GlobalScale { value, divides: true })) => amax / most * f64::from(value),
        (amax, Some(GlobalScale { value, divides: false })) => amax / most / f64::from(value),
        (amax, None) => amax / most,
    };
    let mut bytes = [0; 4];
    match scale_type {
        ScaleType::F32 => {
            bytes = f64_to_f32(wanted).clamp(f32::from_bits(1), f32::MAX).to_le_bytes();
        }
        ScaleType::BF16 => {
            let bits = f32_to_bf16(f64_to_f32(wanted)).clamp(1, 0x7F7F);
            bytes[..2].copy_from_slice(&bits.to_le_bytes());
        }
        ScaleType::F16 => {
            let bits = f32_to_f16(f64_to_f32(wanted)).clamp(1, 0x7BFF);
            bytes[..2].copy_from_slice(&bits.to_le_bytes());
        }
        ScaleType::E4M3 => bytes[0] = f32_to_e4m3(f64_to_f32(wanted)).max(1),
        ScaleType::E8M0 => bytes[0] = power_code(code, amax, wanted),
    }
    let stored = scale_type.load(&bytes[..scale_type.size()]);
    Scale { bytes, factor: global.map_or(stored, |global| global.factor(stored)) }
}

/// The E8M0 code of a block's scale.
fn power_code(code: Code, amax: f32, wanted: f64) -> u8 {
    // The exponent of an f64 that is no f64-subnormal, rounded down; no f32 and no quotient of it by `most` is one.
    let floor = |value: f64| i64::try_from((value.to_bits() >> 52) & 0x7FF).map_or(0, |e| e - 1023);
    // A quotient that is no power of two is not rounded to one: `amax` has 24 bits only.
    let ceiling = |value: f64| floor(value) + i64::from(value.to_bits() << 12 != 0);
    let exponent = match code {
        _ if amax == 0.0 => 0,
        // The OCP's rule, the exponent of `amax`, takes the largest number from just below 4 to 3; one that clips nothing
        // halves the precision of all others from just above 6 on. Numbers that were quantised before are 4 and 6 in every block.
        Code::E2M1 => ceiling(f64::from(amax) / 7.0),
        Code::E4M3 | Code::E5M2 | Code::Int4 => ceiling(wanted),
    };
    u8::try_from((exponent + 127).clamp(0, 254)).unwrap_or(0)
}
