//! `ties`: task vectors are trimmed to their largest elements, and elements vote on their sign (Yadav et al.,
//! arXiv 2306.01708).
//!
//! `k = max(1, ⌊density·n⌋)` elements of largest magnitude are kept, exactly; among equal magnitudes at the border
//! random numbers decide, see [`super::quantile`].

use super::quantile::{self, Cut, Search, magnitude};
use super::random::tie_breakers;
use super::specification::{Base, Settings, Specification};
use super::task_vectors::{COMMON, NORMALIZE, RESCALE, SEED, Sparsify, TaskVectors};
use super::{Method, random};
use crate::kernels::Kernels;
use std::sync::atomic::AtomicU32;

/// `ties` in the table of methods.
pub(super) const TIES: Specification = Specification {
    name: "ties",
    title: "TIES",
    summary: "Keeps the largest elements of each task vector and adds those that agree on the sign.",
    reference: "https://arxiv.org/abs/2306.01708",
    base: Base::Required,
    operands: (1, None),
    passes: quantile::PASSES + 1,
    parameters: &[COMMON, &[NORMALIZE, RESCALE, SEED]],
    make,
};

fn make(settings: &Settings) -> Result<Box<dyn Method>, String> {
    check_size(settings)?;
    let elements = settings.elements();
    TaskVectors::make(settings, true, None, |number, density| {
        let top = random::floor(density, elements).max(1);
        Ok(Box::new(Band::new(settings, number, top, 0)))
    })
}

/// The counters of a search hold 32 bits.
///
/// # Errors
/// A sentence if the tensor has more elements.
pub(super) fn check_size(settings: &Settings) -> Result<(), String> {
    if u32::try_from(settings.elements()).is_ok() {
        return Ok(());
    }
    Err(format!("it has {} elements; quantiles can be taken of 2^32", settings.elements()))
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
    pub(super) fn new(settings: &Settings, number: usize, outer: usize, inner: usize) -> Self {
        let stream = u32::try_from(number).unwrap_or(u32::MAX);
        Self { elements: settings.elements(), outer, inner, key: settings.key, stream }
    }

    fn searches(facts: &[f64]) -> [Search; 2] {
        [&facts[..quantile::FACTS], &facts[quantile::FACTS..]].map(Search::from_facts)
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

    fn start(&self) -> Vec<f64> {
        let searches =
            [self.outer, self.inner].map(|top| Search::start(top, self.elements).facts());
        searches.concat()
    }

    fn request(&self, facts: &[f64]) -> Option<(usize, usize)> {
        let open =
            Self::searches(facts).into_iter().filter(|search| !matches!(search, Search::Found(_)));
        let stride = open.map(Search::stride).min()?;
        Some((Self::searches(facts).into_iter().map(Search::counts).sum(), stride))
    }

    fn observe(&self, kernels: &Kernels, facts: &[f64], delta: &[f32], counts: &[AtomicU32]) {
        let mut rest = counts;
        for search in Self::searches(facts) {
            let (own, others) = rest.split_at(search.counts());
            rest = others;
            search.count(kernels, delta, own);
        }
    }

    fn conclude(&self, facts: &[f64], counts: &[u32]) -> Vec<f64> {
        let mut rest = counts;
        let searches = Self::searches(facts).into_iter().zip([self.outer, self.inner]);
        searches
            .flat_map(|(search, top)| {
                let (own, others) = rest.split_at(search.counts());
                rest = others;
                search.conclude(own, top, self.elements).facts()
            })
            .collect()
    }

    fn apply(&self, kernels: &Kernels, facts: &[f64], first: usize, delta: &mut [f32]) {
        let [Search::Found(outer), Search::Found(inner)] = Self::searches(facts) else { return };
        let cuts = [outer, inner];
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
