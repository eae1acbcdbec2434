//! `ties`: task vectors are trimmed to their largest elements, and elements vote on their sign (Yadav et al.,
//! arXiv 2306.01708).
//!
//! `k = max(1, ⌊density·n⌋)` elements of largest magnitude are kept, exactly; among equal magnitudes at the border
//! random numbers decide, see [`super::quantile`].

use super::quantile::{self, Cut, Search, magnitude};
use super::random::uniforms;
use super::specification::{Base, Settings, Specification};
use super::task_vectors::{COMMON, NORMALIZE, RESCALE, SEED, Sparsify, TaskVectors};
use super::{Method, random};
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

    /// Whether the element lies in the band.
    #[inline(always)]
    fn takes([outer, inner]: [Cut; 2], bits: u32, random: u32) -> bool {
        outer.takes(bits, random) && !inner.takes(bits, random)
    }
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
        Some((2 * quantile::COUNTS, stride))
    }

    #[inline(always)]
    fn observe(&self, facts: &[f64], delta: &[f32], counts: &[AtomicU32]) {
        let searches = Self::searches(facts).into_iter();
        for (search, counts) in searches.zip(counts.chunks_exact(quantile::COUNTS)) {
            search.count(delta, counts);
        }
    }

    fn conclude(&self, facts: &[f64], counts: &[u32]) -> Vec<f64> {
        let tops = [self.outer, self.inner].into_iter();
        let searches = Self::searches(facts).into_iter().zip(counts.chunks_exact(quantile::COUNTS));
        searches
            .zip(tops)
            .flat_map(|((search, counts), top)| search.conclude(counts, top, self.elements).facts())
            .collect()
    }

    #[inline(always)]
    fn apply(&self, facts: &[f64], first: usize, delta: &mut [f32]) {
        let [Search::Found(outer), Search::Found(inner)] = Self::searches(facts) else { return };
        let cuts = [outer, inner];
        for (number, part) in delta.chunks_mut(PART).enumerate() {
            let mut numbers = [0; PART];
            let tied = cuts.into_iter().filter(|cut| cut.draws()).any(|cut| {
                let equal =
                    |found, value: &f32| found | u32::from(magnitude(*value) == cut.threshold);
                part.iter().fold(0, equal) != 0
            });
            if tied {
                let numbers = &mut numbers[..part.len()];
                uniforms(self.key, self.stream, first + number * PART, numbers);
            }
            for (value, random) in part.iter_mut().zip(numbers) {
                *value = if Self::takes(cuts, magnitude(*value), random) { *value } else { 0.0 };
            }
        }
    }
}
