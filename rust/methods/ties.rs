//! `ties`: task vectors are trimmed to their largest elements, and elements vote on their sign (Yadav et al.,
//! arXiv 2306.01708).
//!
//! `k = max(1, ⌊density·n⌋)` elements of largest magnitude are kept, exactly; among equal magnitudes at the border
//! random numbers decide, see [`super::quantile`].

use super::linear::WEIGHT;
use super::parameters::parameters;
use super::quantile::{self, Cut, Search, magnitude};
use super::random::tie_breakers;
use super::specification::{Base, Description, Flag, Given, Rule, Target};
use super::task_vectors::{
    Added, DENSITY, Family, LAMBDA, NORMALIZE, Part, Rescale, SEED, Sparsify,
};
use super::{Method, random};
use crate::kernels::Kernels;

parameters! {
    /// Of the sum.
    struct Shared {
        lambda: f64 = LAMBDA,
        normalize: bool = NORMALIZE,
        rescale: Rescale = Rescale::SPEC,
        seed: u64 = SEED,
    }
}

parameters! {
    /// Of each model.
    struct Operand {
        weight: f64 = WEIGHT,
        density: f64 = DENSITY,
    }
}

/// `ties` with checked parameters.
#[derive(Debug)]
pub(super) struct Ties {
    family: Family,
    seed: u64,
}

impl Rule for Ties {
    type Shared = Shared;
    type Operand = Operand;
    const ABOUT: Description = Description {
        name: "ties",
        title: "TIES",
        summary: "Keeps the largest elements of each task vector and adds those that agree on the sign.",
        reference: "https://arxiv.org/abs/2306.01708",
        base: Base::Required,
        operands: (1, None),
        passes: quantile::PASSES + 1,
        flags: &[Flag::Votes],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let Shared { lambda, normalize, rescale, seed } = given.shared;
        let operands = given.operands.iter().map(|operand| (operand.weight, operand.density));
        let family = Family::new(operands, lambda, normalize)?;
        Ok(Self { family: family.voting(true).rescaled(rescale == Rescale::L1), seed })
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        check_size(target)?;
        let elements = target.elements();
        let key = target.key(self.seed);
        self.family.method(None, |number, density| {
            let top = random::floor(density, elements).max(1);
            Ok(Box::new(Band::new(elements, key, number, top, 0)))
        })
    }
}

/// The counters of a search hold 32 bits.
///
/// # Errors
/// A sentence if the tensor has more elements.
pub(super) fn check_size(target: &Target<'_>) -> Result<(), String> {
    if u32::try_from(target.elements()).is_ok() {
        return Ok(());
    }
    Err(format!("it has {} elements; quantiles can be taken of 2^32", target.elements()))
}

/// Keeps the `outer` largest elements but for the `inner` largest.
#[derive(Debug)]
pub(super) struct Band {
    elements: usize,
    outer: usize,
    inner: usize,
    key: [u32; 2],
    stream: u32,
}

/// Elements that are looked at together: in few of so many does one lie at the border.
const PART: usize = 64;

impl Band {
    pub(super) fn new(
        elements: usize,
        key: [u32; 2],
        number: usize,
        outer: usize,
        inner: usize,
    ) -> Self {
        let stream = u32::try_from(number).unwrap_or(u32::MAX);
        Self { elements, outer, inner, key, stream }
    }

    /// The value, or zero if it lies outside the band.
    #[inline(always)]
    fn take([outer, inner]: [Cut; 2], value: f32, random: u32) -> f32 {
        let bits = magnitude(value);
        let taken = outer.takes(bits, random) & !inner.takes(bits, random);
        masked(value, taken)
    }

    /// 1 if random numbers decide about the value, else 0.
    #[inline(always)]
    fn draws([outer, inner]: [Cut; 2], value: f32) -> u32 {
        let bits = magnitude(value);
        u32::from(outer.draws(bits)) | u32::from(inner.draws(bits))
    }

    /// Random numbers of some elements, if they decide about any of them.
    #[inline(always)]
    fn numbers(&self, drawn: u32, first: usize, count: usize) -> [u32; PART] {
        let mut numbers = [0; PART];
        if drawn != 0 {
            tie_breakers(self.key, self.stream, first, &mut numbers[..count]);
        }
        numbers
    }

    /// As [`Sparsify::add`], of at most [`PART`] elements; so many are worked on in registers.
    #[inline(always)]
    fn add_few(&self, cuts: [Cut; 2], part: &Part<'_>, out: Added<'_>) {
        let Added { scaled, sums } = out;
        let mut drawn = 0;
        for ((value, model), base) in scaled.iter_mut().zip(part.model).zip(part.base) {
            *value = model - base;
            drawn |= Self::draws(cuts, *value);
        }
        let numbers = self.numbers(drawn, part.first, scaled.len());
        for ((value, sum), &random) in scaled.iter_mut().zip(sums).zip(&numbers) {
            *value = part.scale(Self::take(cuts, *value, random));
            *sum += *value;
        }
    }

    /// As [`Sparsify::add`].
    #[inline(always)]
    fn add_all(&self, cuts: [Cut; 2], part: &Part<'_>, out: Added<'_>) {
        let (models, model) = part.model.as_chunks::<PART>();
        let (bases, base) = part.base.as_chunks::<PART>();
        let (all_scaled, scaled) = out.scaled.as_chunks_mut::<PART>();
        let (all_sums, sums) = out.sums.as_chunks_mut::<PART>();
        let mut first = part.first;
        for ((model, base), (scaled, sums)) in
            models.iter().zip(bases).zip(all_scaled.iter_mut().zip(all_sums))
        {
            self.add_few(cuts, &Part { model, base, first, ..*part }, Added { scaled, sums });
            first += PART;
        }
        self.add_few(cuts, &Part { model, base, first, ..*part }, Added { scaled, sums });
    }
}

/// The value if `taken` is 1, zero if it is 0.
#[inline(always)]
pub(super) fn masked(value: f32, taken: u32) -> f32 {
    f32::from_bits(value.to_bits() & 0_u32.wrapping_sub(taken & 1))
}

impl Sparsify for Band {
    fn passes(&self) -> usize {
        quantile::PASSES
    }

    fn searches(&self) -> [Search; 2] {
        [self.outer, self.inner].map(|top| Search::start(top, self.elements))
    }

    fn apply(&self, kernels: &Kernels, cuts: [Cut; 2], first: usize, delta: &mut [f32]) {
        kernels.run(
            #[inline(always)]
            || {
                for (number, values) in delta.chunks_mut(PART).enumerate() {
                    let drawn = values.iter().fold(0, |any, &v| any | Self::draws(cuts, v));
                    let numbers = self.numbers(drawn, first + number * PART, values.len());
                    for (value, &random) in values.iter_mut().zip(&numbers) {
                        *value = Self::take(cuts, *value, random);
                    }
                }
            },
        );
    }

    fn add(&self, kernels: &Kernels, [outer, inner]: [Cut; 2], part: &Part<'_>, out: Added<'_>) {
        kernels.run(
            #[inline(always)]
            || {
                // Without an inner border, what compares with it is compiled away.
                if inner == Cut::NOTHING {
                    self.add_all([outer, Cut::NOTHING], part, out);
                } else {
                    self.add_all([outer, inner], part, out);
                }
            },
        );
    }
}
