//! Loops over elements, compiled once per SIMD level and chosen at run time.
//!
//! The loops are written once ([`generic`]) and compiled three times: for the baseline processor, with AVX2 + FMA +
//! F16C, and with AVX-512. Inside a `#[target_feature]` function the compiler vectorises them; only the conversions
//! of IEEE half, which it cannot see through, use intrinsics. All levels give the same bits: each operation is one
//! correctly rounded IEEE operation, and every sum has an order that is written down, whatever the vectors' width.

mod band;
mod codes;
mod generic;
mod thin;
mod updates;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use band::Band;
pub use codes::Groups;
pub use generic::{COLLECT_MARGIN, Product};
pub use thin::{Cross, Thin};
pub use updates::{Models, RUN, Sums};

use crate::code::Code;
use crate::dtype::Float;
use crate::{Error, Result};

/// A SIMD level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 F, BW and VL with FMA and F16C.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Whatever the compile target guarantees; the reference for the others.
    Scalar,
}

impl Level {
    /// The name that options use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Scalar => "scalar",
        }
    }

    /// The levels that this processor can run, fastest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("popcnt")
            {
                levels.push(Self::Avx512);
            }
            if avx2 {
                levels.push(Self::Avx2);
            }
        }
        levels.push(Self::Scalar);
        levels
    }
}

/// Values, base, low, width and what is found; see [`Kernels::collect_between`].
type CollectBetween = fn(&[f32], Option<&[f32]>, u32, u32, &mut [u32]) -> (usize, u32);

/// Code, bytes, whether the first code is a high nibble, groups and numbers; see [`Kernels::decode`].
type Decode = fn(Code, &[u8], bool, Option<&Groups<'_>>, &mut [f32]);

/// Models, V, Δ and their sums; see [`Kernels::updates`].
type Updates = fn(&Models<'_>, &mut [f32], &mut [f32], Option<&mut Sums>);

/// The kernels of one level. A value can only be had for a level that the processor supports.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    level: Level,
    load: fn(Float, &[u8], &mut [f32]),
    store: fn(Float, &[f32], &mut [u8]) -> bool,
    multiply_add: fn(&mut [f32], &[f32], f32),
    dot: fn(&[f32], &[f32]) -> f64,
    add_product: fn(&mut [f32], &Product<'_>),
    collect_between: CollectBetween,
    weighted_sum: fn(&mut [f32], &[&[f32]], &[f32]),
    decode: Decode,
    encode: fn(Code, &[f32], Option<&Groups<'_>>, &mut [u8]),
    amax: fn(&[f32]) -> f32,
    add_thin: fn(&mut Thin<'_>),
    add_cross: fn(&mut Cross<'_>),
    updates: Updates,
}

impl Kernels {
    /// The fastest kernels that this processor can run.
    #[must_use]
    pub fn detect() -> Self {
        Self::of(Level::available()[0])
    }

    /// The kernels of the level with this name.
    ///
    /// # Errors
    /// [`Error::Option`] if there is no such level, or not on this processor.
    pub fn named(name: &str) -> Result<Self> {
        let available = Level::available();
        available
            .iter()
            .find(|level| level.name() == name)
            .map(|&level| Self::of(level))
            .ok_or_else(|| {
                let names: Vec<_> = available.iter().map(|level| level.name()).collect();
                Error::Option(format!(
                    "SIMD level `{name}` is not available on this processor; choose one of: {}",
                    names.join(", ")
                ))
            })
    }

    /// Private, so that only [`Level::available`] decides what may run.
    fn of(level: Level) -> Self {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Self {
                level,
                load: x86::avx512::load,
                store: x86::avx512::store,
                multiply_add: x86::avx512::multiply_add,
                weighted_sum: x86::avx512::weighted_sum,
                dot: x86::avx512::dot,
                add_product: x86::avx512::add_product,
                collect_between: x86::collect_between,
                decode: x86::avx512::decode,
                encode: x86::avx512::encode,
                amax: x86::avx512::amax,
                add_thin: x86::avx512::add_thin,
                add_cross: x86::avx512::add_cross,
                updates: x86::avx512::updates,
            },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Self {
                level,
                load: x86::avx2::load,
                store: x86::avx2::store,
                multiply_add: x86::avx2::multiply_add,
                weighted_sum: x86::avx2::weighted_sum,
                dot: x86::avx2::dot,
                add_product: x86::avx2::add_product,
                collect_between: generic::collect_between,
                decode: x86::avx2::decode,
                encode: x86::avx2::encode,
                amax: x86::avx2::amax,
                add_thin: x86::avx2::add_thin,
                add_cross: x86::avx2::add_cross,
                updates: x86::avx2::updates,
            },
            _ => Self {
                level: Level::Scalar,
                load: generic::load::<generic::Portable>,
                store: generic::store::<generic::Portable>,
                multiply_add: generic::multiply_add,
                weighted_sum: generic::weighted_sum,
                dot: generic::dot,
                add_product: generic::add_product,
                collect_between: generic::collect_between,
                decode: codes::decode::<generic::Portable>,
                encode: codes::encode,
                amax: codes::amax,
                #[cfg(target_arch = "aarch64")]
                add_thin: thin::neon::add_thin,
                #[cfg(not(target_arch = "aarch64"))]
                add_thin: thin::add_scalar,
                add_cross: thin::add_cross,
                updates: updates::updates,
            },
        }
    }

    /// The level of these kernels.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }

    /// Converts little-endian elements of `dtype` to f32; `source` holds exactly `destination.len()` elements.
    pub fn load(&self, dtype: Float, source: &[u8], destination: &mut [f32]) {
        debug_assert_eq!(source.len(), destination.len() * dtype.size());
        (self.load)(dtype, source, destination);
    }

    /// Rounds f32 values to `dtype`, little-endian; returns whether every stored value is finite.
    #[must_use]
    pub fn store(&self, dtype: Float, source: &[f32], destination: &mut [u8]) -> bool {
        debug_assert_eq!(destination.len(), source.len() * dtype.size());
        (self.store)(dtype, source, destination)
    }

    /// Collects, in order, `bits - low` of the values, or of their differences from a base as long, whose magnitude has bits
    /// from `low` to `low + width`; `found` is longer than `values` by [`COLLECT_MARGIN`] at least. Returns how many there
    /// are, and how many values lie above.
    #[must_use]
    pub fn collect_between(
        &self,
        values: &[f32],
        base: Option<&[f32]>,
        low: u32,
        width: u32,
        found: &mut [u32],
    ) -> (usize, u32) {
        assert!(found.len() >= values.len() + COLLECT_MARGIN);
        assert!(base.is_none_or(|base| base.len() == values.len()));
        (self.collect_between)(values, base, low, width, found)
    }

    /// Runs loops over elements compiled for this level: what `work` calls is vectorised as far as it is inlined.
    ///
    /// The same bits come from every level, since Rust neither reorders nor fuses floating-point operations by itself.
    #[inline(always)]
    pub fn run<R>(&self, work: impl FnOnce() -> R) -> R {
        match self.level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => x86::avx512::run(work),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => x86::avx2::run(work),
            _ => work(),
        }
    }

    /// `accumulator[i] = fma(values[i], weight, accumulator[i])`, one rounding each.
    pub fn multiply_add(&self, accumulator: &mut [f32], values: &[f32], weight: f32) {
        debug_assert_eq!(accumulator.len(), values.len());
        (self.multiply_add)(accumulator, values, weight);
    }

    /// `Σ left[i] · right[i]` in f64: exact products, summed in 32 interleaved sums that are then added in order.
    #[must_use]
    pub fn dot(&self, left: &[f32], right: &[f32]) -> f64 {
        debug_assert_eq!(left.len(), right.len());
        (self.dot)(left, right)
    }

    /// `values[j] += scale · Σ_k coefficients[k] · factor[k][start + j]`. The sum runs over `k` in order by fused
    /// multiply-add from zero; one more adds it.
    pub fn add_product(&self, values: &mut [f32], product: &Product<'_>) {
        debug_assert!(product.start + values.len() <= product.columns);
        debug_assert_eq!(product.factor.len(), product.coefficients.len() * product.columns);
        (self.add_product)(values, product);
    }

    /// `out[i] = Σ_k weights[k] · operands[k][i]`: fused multiply-adds from zero, in the order of the operands.
    pub fn weighted_sum(&self, out: &mut [f32], operands: &[&[f32]], weights: &[f32]) {
        assert_eq!(operands.len(), weights.len());
        assert!(operands.iter().all(|operand| operand.len() == out.len()));
        (self.weighted_sum)(out, operands, weights);
    }

    /// The numbers of codes, exact, or multiplied by the factors of their groups, one rounding each. The first is the one
    /// with the number `first` within `bytes`, since codes of four bits may begin in the middle of a byte; a group begins
    /// at a whole byte, but for the first.
    pub fn decode(
        &self,
        code: Code,
        bytes: &[u8],
        first: usize,
        groups: Option<&Groups<'_>>,
        out: &mut [f32],
    ) {
        let bytes = &bytes[first / code.per_byte()..];
        let middle = !first.is_multiple_of(code.per_byte());
        assert!(bytes.len() >= code.bytes(out.len() + usize::from(middle)));
        assert!(groups.is_none_or(|groups| groups.fit(out.len())));
        (self.decode)(code, bytes, middle, groups, out);
    }

    /// The nearest codes of values, divided by the factors of their groups if there are any, ties to even, never beyond
    /// [`Code::most`]. Values must be finite, and there must be two for each byte where codes have four bits.
    pub fn encode(&self, code: Code, values: &[f32], groups: Option<&Groups<'_>>, out: &mut [u8]) {
        assert_eq!(values.len(), out.len() * code.per_byte());
        assert!(groups.is_none_or(|groups| groups.fit(values.len())));
        (self.encode)(code, values, groups, out);
    }

    /// The largest magnitude; NaN if there is one, and zero of no values.
    #[must_use]
    pub fn amax(&self, values: &[f32]) -> f32 {
        (self.amax)(values)
    }

    /// Adds a product with a thin matrix; each element by one chain of fused multiply-adds in the order of the terms.
    pub fn add_thin(&self, product: &mut Thin<'_>) {
        assert!(product.fits(), "a thin product reaches beyond its matrices");
        (self.add_thin)(product);
    }

    /// Adds a product of columns in f64; the sums run over the rows in order.
    pub fn add_cross(&self, product: &mut Cross<'_>) {
        assert!(product.left_columns <= product.left_step);
        assert!(product.right_columns <= product.right_step);
        assert_eq!(product.out.len(), product.left_columns * product.right_columns);
        if !product.out.is_empty() {
            (self.add_cross)(product);
        }
    }

    /// Writes V = aligned - base and Δ of a run of at most [`RUN`] elements, rounded once, and adds to their sums.
    pub fn updates(
        &self,
        models: &Models<'_>,
        v: &mut [f32],
        delta: &mut [f32],
        sums: Option<&mut Sums>,
    ) {
        let lengths =
            [models.base.len(), models.aligned.len(), models.finetuned.len(), delta.len()];
        assert!(lengths.iter().all(|&length| length == v.len()) && v.len() <= RUN);
        (self.updates)(models, v, delta, sums);
    }
}
