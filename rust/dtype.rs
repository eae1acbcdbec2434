//! Floating-point dtypes and their exact conversions, one value at a time.
//!
//! These are the reference: every SIMD kernel must give the same bits. Widening is exact (F64 excepted); narrowing
//! rounds to nearest, ties to even, as IEEE 754 says. A NaN stays a NaN: its payload is cut and its quiet bit set,
//! which is also what the F16C instructions do.

use safetensors::Dtype;

/// A dtype that can be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// bfloat16: 8 exponent bits, 8 significand bits.
    BF16,
    /// IEEE half: 5 exponent bits, 11 significand bits.
    F16,
    /// IEEE single.
    F32,
    /// IEEE double; rounded to single on load, since all arithmetic is in single.
    F64,
}

impl Float {
    /// The mergeable dtype behind a safetensors one, or `None` for integers, booleans, complex and 8-bit floats.
    #[must_use]
    pub fn from_safetensors(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Self::BF16),
            Dtype::F16 => Some(Self::F16),
            Dtype::F32 => Some(Self::F32),
            Dtype::F64 => Some(Self::F64),
            _ => None,
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::BF16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The smallest positive f32 that does not round to a finite value of this dtype.
    #[must_use]
    pub fn overflow(self) -> f32 {
        match self {
            // Halfway between the largest finite value and the next power of two; the tie rounds up to infinity.
            Self::BF16 => f32::from_bits(0x7F7F_8000),
            Self::F16 => 65520.0,
            Self::F32 | Self::F64 => f32::INFINITY,
        }
    }
}

/// bfloat16 bits to f32, exact.
#[inline(always)]
#[must_use]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 to bfloat16 bits, to nearest even.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the shift leaves 16 bits")]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x0040;
    (if value.is_nan() { quiet } else { rounded }) as u16
}

/// IEEE half bits to f32, exact.
#[inline(always)]
#[must_use]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1F;
    let mantissa = u32::from(bits & 0x03FF);
    let magnitude = match exponent {
        // Zero and subnormals are multiples of 2^-24, which f32 holds exactly.
        0 => (f32::from_bits(0x3380_0000) * f32::from(bits & 0x03FF)).to_bits(),
        0x1F if mantissa == 0 => 0x7F80_0000,
        0x1F => 0x7FC0_0000 | (mantissa << 13),
        _ => ((exponent + 112) << 23) | (mantissa << 13),
    };
    f32::from_bits(sign | magnitude)
}

/// f32 to IEEE half bits, to nearest even.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "every branch leaves 16 bits")]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7FFF_FFFF;
    let half = if magnitude > 0x7F80_0000 {
        0x7E00 | ((magnitude >> 13) & 0x03FF)
    } else if magnitude >= Float::F16.overflow().to_bits() {
        0x7C00
    } else if magnitude < 0x3880_0000 {
        // Below 2^-14 the result is subnormal, a multiple of 2^-24. That is the spacing of f32 just above 0.5, so
        // adding 0.5 makes the processor round at the right bit.
        (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5_f32.to_bits()
    } else {
        (magnitude + 0x0FFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13
    };
    (sign | half) as u16
}

/// f64 to f32, to nearest even.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "rounding to single is the contract")]
pub fn f64_to_f32(value: f64) -> f32 {
    value as f32
}
