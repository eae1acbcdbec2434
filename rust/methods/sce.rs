//! `sce`: elements on which the task vectors vary most, weighted by each model's energy there, without those of the
//! minority's sign (Wan et al., "FuseChat", arXiv 2408.07990).
//!
//! Of the elements whose variance over the models is not zero, `⌊select_topk·count⌋` of largest variance are selected.
//! A model's weight is the share of its mean square there (equal shares where all are tiny); the sign is that of the
//! plain sum, zero counting as positive.

use super::gram::difference;
use super::parameters::{NOT_NEGATIVE, Nothing, Spec, parameters};
use super::quantile::{Cut, Search, magnitude};
use super::random::{floor, tie_breakers};
use super::specification::{Base, Description, Given, Rule, Target};
use super::task_vectors::SEED;
use super::ties::masked;
use super::{Finding, Method, Request, Slice, Tally, TypedMethod};
use crate::kernels::Kernels;

parameters! {
    /// Of the merge.
    struct Shared {
        select_topk: f64 = Spec::number(
            NOT_NEGATIVE,
            1.0,
            "Share of the elements that differ that are selected; 1 selects all.",
        ),
        seed: u64 = SEED,
    }
}

/// Below this the sum of mean squares gives equal weights.
const LEAST_ENERGY: f64 = 1e-6;
/// Least divisor of the weighted sum.
const LEAST_DIVISOR: f32 = 1e-6;

/// `sce` with checked parameters.
#[derive(Debug)]
pub(super) struct Sce {
    count: usize,
    /// Share that is selected; `None` for all.
    share: Option<f64>,
    seed: u64,
}

impl Rule for Sce {
    type Shared = Shared;
    type Operand = Nothing;
    const ABOUT: Description = Description {
        name: "sce",
        title: "SCE",
        summary: "Selects elements on which models differ most, weighs models by their energy there, erases minority signs.",
        reference: "https://arxiv.org/abs/2408.07990",
        base: Base::Required,
        operands: (1, None),
        passes: 3,
        flags: &[],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let Shared { select_topk, seed } = given.shared;
        let share = (select_topk < 1.0).then_some(select_topk);
        Ok(Self { count: given.operands.len(), share, seed })
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        super::ties::check_size(target)?;
        let &Self { count, share, seed } = self;
        Ok(Box::new(OfTensor { count, share, elements: target.elements(), key: target.key(seed) }))
    }
}

/// The method for one tensor.
#[derive(Debug)]
struct OfTensor {
    count: usize,
    elements: usize,
    share: Option<f64>,
    key: [u32; 2],
}

/// What is known of the whole tensor.
#[derive(Debug, Clone)]
struct Known {
    /// Whether it is known how many elements are to be selected.
    counted: bool,
    search: Search,
    /// Of each model.
    weights: Vec<f32>,
}

impl OfTensor {
    fn deltas(&self, kernels: &Kernels, slice: &Slice<'_>) -> Vec<f32> {
        let length = slice.len();
        let mut deltas = vec![0.0; self.count * length];
        for (delta, operand) in deltas.chunks_exact_mut(length.max(1)).zip(slice.operands) {
            difference(kernels, operand, slice.base.unwrap_or_default(), delta);
        }
        deltas
    }

    /// The task vectors where they are selected, zero elsewhere.
    fn selected(&self, kernels: &Kernels, cut: Cut, slice: &Slice<'_>) -> Vec<f32> {
        let mut deltas = self.deltas(kernels, slice);
        if self.share.is_none() {
            return deltas;
        }
        let length = slice.len();
        let variances = variances(kernels, &deltas, self.count, length);
        let mut numbers = vec![0; length];
        if variances.iter().any(|&variance| cut.draws(magnitude(variance))) {
            tie_breakers(self.key, 0, slice.first, &mut numbers);
        }
        kernels.run(
            #[inline(always)]
            || {
                for delta in deltas.chunks_exact_mut(length.max(1)) {
                    for ((value, variance), &random) in
                        delta.iter_mut().zip(&variances).zip(&numbers)
                    {
                        *value = masked(*value, cut.takes(magnitude(*variance), random));
                    }
                }
            },
        );
        deltas
    }
}

/// The variance over the models of each element, as the mean of squared deviations, in f32.
fn variances(kernels: &Kernels, deltas: &[f32], count: usize, length: usize) -> Vec<f32> {
    let mut means = vec![0.0; length];
    let mut variances = vec![0.0; length];
    kernels.run(
        #[inline(always)]
        || {
            let share = 1.0 / f32::from(u16::try_from(count).unwrap_or(u16::MAX));
            for delta in deltas.chunks_exact(length.max(1)) {
                means.iter_mut().zip(delta).for_each(|(sum, value)| *sum += value);
            }
            means.iter_mut().for_each(|mean| *mean *= share);
            for delta in deltas.chunks_exact(length.max(1)) {
                for ((sum, value), mean) in variances.iter_mut().zip(delta).zip(&means) {
                    *sum += (value - mean) * (value - mean);
                }
            }
            variances.iter_mut().for_each(|variance| *variance *= share);
        },
    );
    variances
}

impl TypedMethod for OfTensor {
    type Facts = Known;

    fn passes(&self) -> usize {
        if self.share.is_some() { 3 } else { 1 }
    }

    fn leaves_out(&self) -> bool {
        true
    }

    fn start(&self) -> Known {
        let search = if self.share.is_some() {
            Search::of_all(self.elements)
        } else {
            Search::found(Cut::ALL)
        };
        Known { counted: false, search, weights: vec![0.0; self.count] }
    }

    fn request(&self, facts: &Known) -> Request {
        match facts.search.cut() {
            None => Request { sums: 1, counts: facts.search.counts(), stride: 1 },
            Some(_) => Request { sums: self.count, counts: 0, stride: 1 },
        }
    }

    fn observe(
        &self,
        kernels: &Kernels,
        facts: &Known,
        slice: &Slice<'_>,
        tally: &mut Tally<'_, '_>,
    ) {
        let length = slice.len();
        if let Some(cut) = facts.search.cut() {
            let deltas = self.selected(kernels, cut, slice);
            for (sum, delta) in tally.sums.iter_mut().zip(deltas.chunks_exact(length.max(1))) {
                *sum += kernels.dot(delta, delta);
            }
            return;
        }
        let deltas = self.deltas(kernels, slice);
        let variances = variances(kernels, &deltas, self.count, length);
        let differing = variances.iter().filter(|&&variance| variance != 0.0).count();
        tally.sums[0] += f64::from(u32::try_from(differing).unwrap_or(u32::MAX));
        facts.search.count(kernels, &variances, None, tally.counts, 0);
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "numbers of elements, below 2^32"
    )]
    fn conclude(
        &self,
        facts: &Known,
        sums: &[f64],
        counts: &[u32],
    ) -> Result<Finding<Known>, String> {
        let mut facts = facts.clone();
        if facts.search.cut().is_some() {
            let energies = sums.iter().map(|sum| sum / self.elements.max(1) as f64);
            let total: f64 = energies.clone().sum();
            for (weight, energy) in facts.weights.iter_mut().zip(energies) {
                let share =
                    if total < LEAST_ENERGY { 1.0 / self.count as f64 } else { energy / total };
                *weight = crate::dtype::f64_to_f32(share);
            }
            return Ok(Finding { facts, settled: true });
        }
        if !facts.counted {
            facts.counted = true;
            let top = floor(self.share.unwrap_or(1.0), sums[0] as usize);
            facts.search = facts.search.wanting(top);
        }
        facts.search = facts.search.conclude(counts);
        Ok(Finding { facts, settled: false })
    }

    fn blend(
        &self,
        kernels: &Kernels,
        facts: &Known,
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        let length = slice.len();
        let cut = facts.search.cut().unwrap_or(Cut::ALL);
        let deltas = self.selected(kernels, cut, slice);
        let mut votes = vec![0.0_f32; length];
        let mut divisors = vec![0.0_f32; length];
        kernels.run(
            #[inline(always)]
            || {
                for delta in deltas.chunks_exact(length.max(1)) {
                    votes.iter_mut().zip(delta).for_each(|(sum, value)| *sum += value);
                }
                out.fill(0.0);
                for (delta, &weight) in deltas.chunks_exact(length.max(1)).zip(&facts.weights) {
                    let places = out.iter_mut().zip(&mut divisors).zip(delta.iter().zip(&votes));
                    for ((sum, divisor), (&value, &vote)) in places {
                        let agrees = if vote >= 0.0 { value > 0.0 } else { value < 0.0 };
                        *sum += if agrees { value * weight } else { 0.0 };
                        *divisor += if agrees { weight } else { 0.0 };
                    }
                }
                for ((value, base), divisor) in
                    out.iter_mut().zip(slice.base.unwrap_or_default()).zip(&divisors)
                {
                    *value = base + *value / divisor.max(LEAST_DIVISOR);
                }
            },
        );
        Ok(())
    }
}
