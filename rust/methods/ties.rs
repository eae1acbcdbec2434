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
use super::task_vectors::{DENSITY, Family, LAMBDA, NORMALIZE, Rescale, SEED, Sparsify};
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

/// Elements whose random numbers are held at a time.
const PART: usize = 256;

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

    /// Whether random numbers decide about any of the values.
    #[inline(always)]
    fn tied([outer, inner]: [Cut; 2], values: &[f32]) -> bool {
        let at_border = |found, value: &f32| {
            let bits = magnitude(*value);
            found | u32::from(outer.draws(bits)) | u32::from(inner.draws(bits))
        };
        values.iter().fold(0, at_border) != 0
    }

    /// The value, or zero if it lies outside the band.
    #[inline(always)]
    fn take([outer, inner]: [Cut; 2], value: f32, random: u32) -> f32 {
        let bits = magnitude(value);
        let taken = outer.takes(bits, random) & !inner.takes(bits, random);
        masked(value, taken)
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
                for (number, part) in delta.chunks_mut(PART).enumerate() {
                    let mut numbers = [0; PART];
                    if Self::tied(cuts, part) {
                        let numbers = &mut numbers[..part.len()];
                        tie_breakers(self.key, self.stream, first + number * PART, numbers);
                    }
                    for (value, &random) in part.iter_mut().zip(&numbers) {
                        *value = Self::take(cuts, *value, random);
                    }
                }
            },
        );
    }
}
