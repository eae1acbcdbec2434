//! What task arithmetic and its relatives share: sparsified task vectors, summed, with or without a vote on signs.
//!
//! With `δ_i = sparse(x_i - B)` the result is `B + λ Σ w_i δ_i`, divided by `Σ w_i` if normalised. With consensus (TIES,
//! arXiv 2306.01708) an element's sign is that of `Σ w_i δ_i`, zero counting as positive; only `w_i δ_i` of that sign
//! are added, and the divisor is the sum of their weights. Zeros never vote. A divisor of zero counts as one.

use super::gram::difference;
use super::linear::weights;
use super::parameters::{FINITE, NOT_NEGATIVE, Spec, choice};
use super::quantile::{Cut, Search};
use super::{Finding, Method, Request, Slice, Tally, TypedMethod};
use crate::kernels::Kernels;
use std::fmt::Debug;
use std::sync::Arc;

/// The density of an operand's task vector.
pub(super) const DENSITY: Spec<f64> = Spec::number(
    NOT_NEGATIVE,
    1.0,
    "Share of the task vector's elements that are kept; 1 keeps all.",
);

/// The factor of the sum.
pub(super) const LAMBDA: Spec<f64> =
    Spec::number(FINITE, 1.0, "Factor of the sum of task vectors.");

/// Whether the sum is divided by the weights, if the method does so by default.
pub(super) const NORMALIZE: Spec<bool> = Spec::flag(true, "Divide by the sum of the weights.");

/// Whether the sum is divided by the weights, if the method does not by default.
pub(super) const KEEP_SCALE: Spec<bool> = Spec::flag(false, "Divide by the sum of the weights.");

choice! {
    /// How a task vector that lost elements by rank is scaled.
    enum Rescale {
        /// Not at all.
        None = "none",
        /// To its former sum of magnitudes.
        L1 = "l1",
    }
}

choice! {
    /// How a task vector that lost random elements is scaled.
    enum RescaleRandom {
        /// By one over the probability of keeping an element.
        Probability = "probability",
        /// To its former sum of magnitudes.
        L1 = "l1",
        /// Not at all.
        None = "none",
    }
}

impl Rescale {
    /// The parameter.
    pub(super) const SPEC: Spec<Self> =
        Spec::choice("l1: scale each sparse task vector back to its sum of magnitudes.");
}

impl RescaleRandom {
    /// The parameter.
    pub(super) const SPEC: Spec<Self> = Spec::choice(
        "probability: divide what is kept by the probability of keeping it, as the paper does; \
         l1: scale each sparse task vector back to its sum of magnitudes, as mergekit does.",
    );
}

/// The seed of random masks.
pub(super) const SEED: Spec<u64> = Spec::integer(
    [0, u64::MAX],
    0,
    "Seed of the random masks, which are a function of it, the tensor's name and the element.",
);

/// Takes elements out of one operand's task vector.
pub(super) trait Sparsify: Debug + Send + Sync {
    /// Observe passes at most.
    fn passes(&self) -> usize {
        0
    }

    /// The magnitudes that it needs to know, if any: of the outer and of the inner border of what is kept.
    fn searches(&self) -> [Search; 2] {
        [Search::found(Cut::ALL), Search::found(Cut::NOTHING)]
    }

    /// Sets elements that fall out to zero, and scales the others if it knows how. `first` is the index of the first.
    fn apply(&self, kernels: &Kernels, cuts: [Cut; 2], first: usize, delta: &mut [f32]);

    /// Makes the sparse task vector of a part of a model, scales it and adds it to `sums`.
    fn add(&self, kernels: &Kernels, cuts: [Cut; 2], part: &Part<'_>, out: Added<'_>) {
        let Added { scaled, sums } = out;
        difference(kernels, part.model, part.base, scaled);
        self.apply(kernels, cuts, part.first, scaled);
        kernels.run(
            #[inline(always)]
            || {
                for (value, sum) in scaled.iter_mut().zip(&mut *sums) {
                    *value = part.scale(*value);
                    *sum += *value;
                }
            },
        );
    }
}

/// A part of a model, and what its task vector is multiplied by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    pub model: &'a [f32],
    pub base: &'a [f32],
    /// Index within the tensor of the first element.
    pub first: usize,
    /// What brings back the task vector's sum of magnitudes.
    pub factor: f32,
    pub weight: f32,
}

impl Part<'_> {
    /// An element of the task vector, scaled.
    #[inline(always)]
    pub(super) fn scale(&self, value: f32) -> f32 {
        value * self.factor * self.weight
    }
}

/// Where scaled task vectors go; as long as the part.
#[derive(Debug)]
pub(super) struct Added<'a> {
    /// The part's own.
    pub scaled: &'a mut [f32],
    /// The sum over all models.
    pub sums: &'a mut [f32],
}

/// Keeps everything.
#[derive(Debug)]
pub(super) struct KeepAll;

impl Sparsify for KeepAll {
    fn apply(&self, _: &Kernels, _: [Cut; 2], _: usize, _: &mut [f32]) {}
}

/// Keeps nothing.
#[derive(Debug)]
pub(super) struct KeepNone;

impl Sparsify for KeepNone {
    fn apply(&self, _: &Kernels, _: [Cut; 2], _: usize, delta: &mut [f32]) {
        delta.fill(0.0);
    }
}

/// Elements that are worked on from the difference to the result.
pub(super) const PART: usize = 256;
/// Below this a sum of magnitudes is not scaled to, as in mergekit.
const LEAST_SUM: f64 = 1e-7;

/// Checked parameters of the whole family.
#[derive(Debug, Clone)]
pub(super) struct Family {
    pub(super) weights: Arc<[f32]>,
    densities: Arc<[f64]>,
    pub(super) lambda: f32,
    pub(super) normalize: bool,
    pub(super) votes: bool,
    /// Whether sparse task vectors are scaled back to their sum of magnitudes.
    l1: bool,
}

impl Family {
    /// From the weight and density of each operand; densities count as 1 where the method has none.
    ///
    /// # Errors
    /// A sentence if a weight is not finite in f32.
    pub(super) fn new(
        operands: impl Iterator<Item = (f64, f64)> + Clone,
        lambda: f64,
        normalize: bool,
    ) -> Result<Self, String> {
        Ok(Self {
            weights: weights(operands.clone().map(|(weight, _)| weight))?.into(),
            densities: operands.map(|(_, density)| density).collect(),
            lambda: crate::dtype::f64_to_f32(lambda),
            normalize,
            votes: false,
            l1: false,
        })
    }

    /// Whether elements vote on their sign.
    pub(super) fn voting(self, votes: bool) -> Self {
        Self { votes, ..self }
    }

    /// Whether sparse task vectors are scaled back to their sum of magnitudes.
    pub(super) fn rescaled(self, l1: bool) -> Self {
        Self { l1, ..self }
    }

    /// The method; `sparsifier` makes that of each operand from its number and density.
    ///
    /// # Errors
    /// Those of `sparsifier`.
    pub(super) fn method(
        &self,
        row: Option<usize>,
        sparsifier: impl Fn(usize, f64) -> Result<Box<dyn Sparsify>, String>,
    ) -> Result<Box<dyn Method>, String> {
        let sparsifiers = self.densities.iter().enumerate().map(|(number, &density)| {
            if density >= 1.0 {
                Ok(Box::new(KeepAll) as Box<dyn Sparsify>)
            } else if density <= 0.0 {
                Ok(Box::new(KeepNone) as Box<dyn Sparsify>)
            } else {
                sparsifier(number, density)
            }
        });
        let sparsifiers = sparsifiers.collect::<Result<_, _>>()?;
        let sparse = self.densities.iter().any(|&density| density < 1.0);
        Ok(Box::new(TaskVectors { family: self.clone(), sparsifiers, row, sparse }))
    }
}

/// The family's method.
#[derive(Debug)]
struct TaskVectors {
    family: Family,
    sparsifiers: Vec<Box<dyn Sparsify>>,
    row: Option<usize>,
    /// Whether any operand is sparsified.
    sparse: bool,
}

/// What is known of one operand's task vector.
#[derive(Debug, Clone, Copy)]
struct Known {
    searches: [Search; 2],
    /// What brings back its sum of magnitudes.
    factor: f32,
}

impl Known {
    /// The cuts; before they are known, what keeps everything.
    fn cuts(&self) -> [Cut; 2] {
        let [outer, inner] = &self.searches;
        [outer.cut().unwrap_or(Cut::ALL), inner.cut().unwrap_or(Cut::NOTHING)]
    }

    /// Length of the counts of the next pass.
    fn counts(&self) -> usize {
        self.searches.iter().map(Search::counts).sum()
    }
}

impl TaskVectors {
    /// The sparsified task vector of an operand, not yet scaled by l1.
    fn sparse(
        &self,
        kernels: &Kernels,
        cuts: [Cut; 2],
        slice: &Slice<'_>,
        number: usize,
        delta: &mut [f32],
    ) {
        difference(kernels, slice.operands[number], slice.base.unwrap_or_default(), delta);
        self.sparsifiers[number].apply(kernels, cuts, slice.first, delta);
    }

    /// Adds up magnitudes before and after.
    fn observe_l1(&self, kernels: &Kernels, facts: &[Known], slice: &Slice<'_>, sums: &mut [f64]) {
        let mut delta = vec![0.0; slice.len()];
        let places = sums.as_chunks_mut::<2>().0.iter_mut().zip(facts).enumerate();
        for (number, (sums, known)) in places {
            difference(kernels, slice.operands[number], slice.base.unwrap_or_default(), &mut delta);
            sums[0] += sum_of_magnitudes(kernels, &delta);
            self.sparse(kernels, known.cuts(), slice, number, &mut delta);
            sums[1] += sum_of_magnitudes(kernels, &delta);
        }
    }
}

/// The stride of the next pass that counts; `None` if none is needed.
fn stride(facts: &[Known]) -> Option<usize> {
    facts.iter().flat_map(|known| &known.searches).filter_map(Search::stride).min()
}

impl TypedMethod for TaskVectors {
    type Facts = Vec<Known>;

    fn passes(&self) -> usize {
        let counting = self.sparsifiers.iter().map(|sparsifier| sparsifier.passes()).max();
        counting.unwrap_or(0) + usize::from(self.family.l1)
    }

    fn row(&self) -> Option<usize> {
        self.row
    }

    fn leaves_out(&self) -> bool {
        self.sparse || self.family.votes
    }

    fn start(&self) -> Vec<Known> {
        let searches = self.sparsifiers.iter().map(|sparsifier| sparsifier.searches());
        searches.map(|searches| Known { searches, factor: 1.0 }).collect()
    }

    fn request(&self, facts: &Vec<Known>) -> Request {
        match stride(facts) {
            Some(stride) => {
                Request { sums: 0, counts: facts.iter().map(Known::counts).sum(), stride }
            }
            None => Request { sums: 2 * facts.len(), counts: 0, stride: 1 },
        }
    }

    fn observe(
        &self,
        kernels: &Kernels,
        facts: &Vec<Known>,
        slice: &Slice<'_>,
        tally: &mut Tally<'_, '_>,
    ) {
        if stride(facts).is_none() {
            self.observe_l1(kernels, facts, slice, tally.sums);
            return;
        }
        let base = slice.base.unwrap_or_default();
        let mut start = 0;
        for (operand, known) in slice.operands.iter().zip(facts) {
            for search in &known.searches {
                search.count(kernels, operand, Some(base), tally.counts, start);
                // Two searches have two million bins at most.
                start += u32::try_from(search.counts()).unwrap_or(u32::MAX);
            }
        }
    }

    fn conclude(
        &self,
        facts: &Vec<Known>,
        sums: &[f64],
        counts: &[u32],
    ) -> Result<Finding<Vec<Known>>, String> {
        let mut facts = facts.clone();
        if stride(&facts).is_none() {
            for (known, sums) in facts.iter_mut().zip(sums.as_chunks::<2>().0) {
                if sums[0] >= LEAST_SUM && sums[1] >= LEAST_SUM {
                    known.factor = crate::dtype::f64_to_f32(sums[0] / sums[1]);
                }
            }
            return Ok(Finding { facts, settled: true });
        }
        let mut rest = counts;
        for search in facts.iter_mut().flat_map(|known| &mut known.searches) {
            let (own, others) = rest.split_at(search.counts());
            rest = others;
            *search = search.conclude(own);
        }
        let settled = !self.family.l1 && stride(&facts).is_none();
        Ok(Finding { facts, settled })
    }

    fn blend(
        &self,
        kernels: &Kernels,
        facts: &Vec<Known>,
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        // Parts stay in the first-level cache from the difference to the result. A method of rows gets them whole.
        let length = if self.row.is_some() { slice.len() } else { PART };
        let mut scaled = vec![0.0; self.family.weights.len() * length.min(slice.len())];
        let base = slice.base.unwrap_or_default();
        let parts = out.chunks_mut(length.max(1)).zip(base.chunks(length.max(1)));
        for (number, (out, base)) in parts.enumerate() {
            let start = number * length;
            let scaled = &mut scaled[..self.family.weights.len() * out.len()];
            out.fill(0.0);
            let each = scaled.chunks_exact_mut(out.len().max(1)).zip(facts).zip(slice.operands);
            for (number, ((scaled, known), operand)) in each.enumerate() {
                let part = Part {
                    model: &operand[start..start + out.len()],
                    base,
                    first: slice.first + start,
                    factor: known.factor,
                    weight: self.family.weights[number],
                };
                let added = Added { scaled, sums: out };
                self.sparsifiers[number].add(kernels, known.cuts(), &part, added);
            }
            kernels.run(
                #[inline(always)]
                || self.family.conclude(scaled, base, out),
            );
        }
        Ok(())
    }
}

/// Sums that are kept side by side.
const LANES: usize = 32;

/// The sum of magnitudes, in f64, in an order that no SIMD level changes.
fn sum_of_magnitudes(kernels: &Kernels, values: &[f32]) -> f64 {
    kernels.run(
        #[inline(always)]
        || {
            let mut sums = [0.0_f64; LANES];
            for block in values.chunks(LANES) {
                for (sum, value) in sums.iter_mut().zip(block) {
                    *sum += f64::from(value.abs());
                }
            }
            sums.iter().sum()
        },
    )
}
