//! What task arithmetic and its relatives share: sparsified task vectors, summed, with or without a vote on signs.
//!
//! With `δ_i = sparse(x_i - B)` the result is `B + λ Σ w_i δ_i`, divided by `Σ w_i` if normalised. With consensus (TIES,
//! arXiv 2306.01708) an element's sign is that of `Σ w_i δ_i`, zero counting as positive; only `w_i δ_i` of that sign
//! are added, and the divisor is the sum of their weights. Zeros never vote. A divisor of zero counts as one.

use super::gram::difference;
use super::linear::WEIGHT;
use super::specification::{Default, Kind, Parameter, Scope, Settings};
use super::{Finding, Method, Request, Slice, Tally};
use crate::kernels::Kernels;
use std::fmt::Debug;
use std::sync::atomic::AtomicU32;

/// Parameters of the whole family.
pub(super) const COMMON: &[Parameter] = &[
    WEIGHT,
    Parameter {
        name: "density",
        scope: Scope::Operand,
        kind: Kind::Number(0.0, f64::INFINITY),
        default: Default::Number(1.0),
        help: "Share of the task vector's elements that are kept; 1 keeps all.",
    },
    Parameter {
        name: "lambda",
        scope: Scope::Shared,
        kind: Kind::Number(f64::NEG_INFINITY, f64::INFINITY),
        default: Default::Number(1.0),
        help: "Factor of the sum of task vectors.",
    },
];

/// Whether the sum is divided by the weights, if the method does so by default.
pub(super) const NORMALIZE: Parameter = Parameter {
    name: "normalize",
    scope: Scope::Shared,
    kind: Kind::Flag,
    default: Default::Flag(true),
    help: "Divide by the sum of the weights.",
};

/// Whether the sum is divided by the weights, if the method does not by default.
pub(super) const KEEP_SCALE: Parameter = Parameter { default: Default::Flag(false), ..NORMALIZE };

/// How a task vector that lost elements by rank is scaled.
pub(super) const RESCALE: Parameter = Parameter {
    name: "rescale",
    scope: Scope::Shared,
    kind: Kind::Choice(&["none", "l1"]),
    default: Default::Choice("none"),
    help: "l1: scale each sparse task vector back to its sum of magnitudes.",
};

/// How a task vector that lost random elements is scaled.
pub(super) const RESCALE_RANDOM: Parameter = Parameter {
    name: "rescale",
    scope: Scope::Shared,
    kind: Kind::Choice(&["probability", "l1", "none"]),
    default: Default::Choice("probability"),
    help: "probability: divide what is kept by the probability of keeping it, as the paper does; \
           l1: scale each sparse task vector back to its sum of magnitudes, as mergekit does.",
};

/// The seed of random masks.
pub(super) const SEED: Parameter = Parameter {
    name: "seed",
    scope: Scope::Shared,
    kind: Kind::Integer(0, u64::MAX),
    default: Default::Integer(0),
    help: "Seed of the random masks, which are a function of it, the tensor's name and the element.",
};

/// Takes elements out of one operand's task vector.
pub(super) trait Sparsify: Debug + Send + Sync {
    /// Observe passes at most.
    fn passes(&self) -> usize {
        0
    }

    /// What it knows before the first pass; always as many numbers.
    fn start(&self) -> Vec<f64> {
        Vec::new()
    }

    /// Counts that the next pass needs, and its stride; `None` if it needs no further pass.
    fn request(&self, _facts: &[f64]) -> Option<(usize, usize)> {
        None
    }

    /// Counts a part of the task vector.
    fn observe(&self, _kernels: &Kernels, _facts: &[f64], _delta: &[f32], _counts: &[AtomicU32]) {}

    /// Draws the conclusion of a pass.
    fn conclude(&self, facts: &[f64], _counts: &[u32]) -> Vec<f64> {
        facts.to_vec()
    }

    /// Sets elements that fall out to zero, and scales the others if it knows how. `first` is the index of the first.
    fn apply(&self, kernels: &Kernels, facts: &[f64], first: usize, delta: &mut [f32]);
}

/// Keeps everything.
#[derive(Debug)]
pub(super) struct KeepAll;

impl Sparsify for KeepAll {
    fn apply(&self, _: &Kernels, _: &[f64], _: usize, _: &mut [f32]) {}
}

/// Keeps nothing.
#[derive(Debug)]
pub(super) struct KeepNone;

impl Sparsify for KeepNone {
    fn apply(&self, _: &Kernels, _: &[f64], _: usize, delta: &mut [f32]) {
        delta.fill(0.0);
    }
}

/// The family's method.
#[derive(Debug)]
pub(super) struct TaskVectors {
    weights: Vec<f32>,
    lambda: f32,
    normalize: bool,
    consensus: bool,
    /// Whether sparse task vectors are scaled back to their sum of magnitudes.
    l1: bool,
    sparsifiers: Vec<Box<dyn Sparsify>>,
    /// Where each sparsifier's facts start; the l1 factors come last.
    places: Vec<usize>,
    row: Option<usize>,
    /// Whether any operand is sparsified.
    sparse: bool,
}

/// Below this a sum of magnitudes is not scaled to, as in mergekit.
const LEAST_SUM: f64 = 1e-7;
/// Below this a sum of weights does not divide.
const LEAST_DIVISOR: f32 = 1e-8;

impl TaskVectors {
    /// Reads the common parameters; `sparsifier` makes that of each operand from its number and density, which count as
    /// 1 where the method has no densities.
    ///
    /// # Errors
    /// A sentence if a parameter does not fit.
    pub(super) fn make(
        settings: &Settings,
        consensus: bool,
        row: Option<usize>,
        sparsifier: impl Fn(usize, f64) -> Result<Box<dyn Sparsify>, String>,
    ) -> Result<Box<dyn Method>, String> {
        let sparsifiers = settings
            .numbers("density", 1.0)
            .into_iter()
            .enumerate()
            .map(|(number, density)| {
                if density >= 1.0 {
                    Ok(Box::new(KeepAll) as Box<dyn Sparsify>)
                } else if density <= 0.0 {
                    Ok(Box::new(KeepNone) as Box<dyn Sparsify>)
                } else {
                    sparsifier(number, density)
                }
            })
            .collect::<Result<Vec<_>, _>>()?;
        let sparse = settings.numbers("density", 1.0).iter().any(|&density| density < 1.0);
        let mut places = vec![1];
        for sparsifier in &sparsifiers {
            places.push(places[places.len() - 1] + sparsifier.start().len());
        }
        Ok(Box::new(Self {
            weights: settings.weights()?,
            lambda: crate::dtype::f64_to_f32(settings.number("lambda")),
            normalize: settings.flag("normalize"),
            consensus,
            l1: settings.choice("rescale") == "l1",
            sparsifiers,
            places,
            row,
            sparse,
        }))
    }

    fn facts<'a>(&self, facts: &'a [f64], number: usize) -> &'a [f64] {
        &facts[self.places[number]..self.places[number + 1]]
    }

    /// Counts that each sparsifier needs in the next pass, and the stride of that pass.
    fn counting(&self, facts: &[f64]) -> Option<(Vec<usize>, usize)> {
        let requests: Vec<_> = self
            .sparsifiers
            .iter()
            .enumerate()
            .map(|(number, sparsifier)| sparsifier.request(self.facts(facts, number)))
            .collect();
        let stride = requests.iter().flatten().map(|&(_, stride)| stride).min()?;
        Some((
            requests.iter().map(|request| request.map_or(0, |(counts, _)| counts)).collect(),
            stride,
        ))
    }

    /// The sparsified task vector of an operand, not yet scaled by l1.
    fn sparse(
        &self,
        kernels: &Kernels,
        facts: &[f64],
        slice: &Slice<'_>,
        number: usize,
        delta: &mut [f32],
    ) {
        difference(kernels, slice.operands[number], slice.base.unwrap_or_default(), delta);
        self.sparsifiers[number].apply(kernels, self.facts(facts, number), slice.first, delta);
    }

    /// Adds up magnitudes before and after.
    fn observe_l1(&self, kernels: &Kernels, facts: &[f64], slice: &Slice<'_>, sums: &mut [f64]) {
        let mut delta = vec![0.0; slice.len()];
        for (number, sums) in sums.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            difference(kernels, slice.operands[number], slice.base.unwrap_or_default(), &mut delta);
            sums[0] += sum_of_magnitudes(kernels, &delta);
            self.sparse(kernels, facts, slice, number, &mut delta);
            sums[1] += sum_of_magnitudes(kernels, &delta);
        }
    }
}

impl Method for TaskVectors {
    fn passes(&self) -> usize {
        let counting = self.sparsifiers.iter().map(|sparsifier| sparsifier.passes()).max();
        counting.unwrap_or(0) + usize::from(self.l1)
    }

    fn row(&self) -> Option<usize> {
        self.row
    }

    fn leaves_out(&self) -> bool {
        self.sparse || self.consensus
    }

    fn start(&self) -> Vec<f64> {
        let mut facts = vec![0.0];
        facts.extend(self.sparsifiers.iter().flat_map(|sparsifier| sparsifier.start()));
        facts.extend(vec![1.0; self.weights.len()]);
        facts
    }

    fn request(&self, _: usize, facts: &[f64]) -> Request {
        match self.counting(facts) {
            Some((counts, stride)) => Request { sums: 0, counts: counts.iter().sum(), stride },
            None => Request { sums: 2 * self.weights.len(), counts: 0, stride: 1 },
        }
    }

    fn observe(
        &self,
        kernels: &Kernels,
        _: usize,
        facts: &[f64],
        slice: &Slice<'_>,
        tally: &mut Tally<'_>,
    ) {
        let Some((counts, _)) = self.counting(facts) else {
            self.observe_l1(kernels, facts, slice, tally.sums);
            return;
        };
        let mut delta = vec![0.0; slice.len()];
        let mut rest = tally.counts;
        for (number, count) in counts.into_iter().enumerate() {
            let (own, others) = rest.split_at(count);
            rest = others;
            if own.is_empty() {
                continue;
            }
            difference(kernels, slice.operands[number], slice.base.unwrap_or_default(), &mut delta);
            self.sparsifiers[number].observe(kernels, self.facts(facts, number), &delta, own);
        }
    }

    fn conclude(
        &self,
        _: usize,
        facts: &[f64],
        sums: &[f64],
        counts: &[u32],
    ) -> Result<Finding, String> {
        let mut next = facts.to_vec();
        let Some((lengths, _)) = self.counting(facts) else {
            let factors = *self.places.last().unwrap_or(&1);
            for (number, sums) in sums.as_chunks::<2>().0.iter().enumerate() {
                if sums[0] >= LEAST_SUM && sums[1] >= LEAST_SUM {
                    next[factors + number] = sums[0] / sums[1];
                }
            }
            return Ok(Finding { facts: next, settled: true });
        };
        let mut rest = counts;
        for (number, length) in lengths.into_iter().enumerate() {
            let (own, others) = rest.split_at(length);
            rest = others;
            if !own.is_empty() {
                let place = self.places[number]..self.places[number + 1];
                next[place].copy_from_slice(
                    &self.sparsifiers[number].conclude(self.facts(facts, number), own),
                );
            }
        }
        let settled = !self.l1 && self.counting(&next).is_none();
        Ok(Finding { facts: next, settled })
    }

    fn blend(
        &self,
        kernels: &Kernels,
        facts: &[f64],
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        let length = slice.len();
        let factors = &facts[*self.places.last().unwrap_or(&1)..];
        let mut deltas = vec![0.0; self.weights.len() * length];
        out.fill(0.0);
        for (number, delta) in deltas.chunks_exact_mut(length.max(1)).enumerate() {
            self.sparse(kernels, facts, slice, number, delta);
            let weight = self.weights[number];
            let factor = crate::dtype::f64_to_f32(factors[number]);
            kernels.run(
                #[inline(always)]
                || {
                    for (value, sum) in delta.iter_mut().zip(&mut *out) {
                        *value = *value * factor * weight;
                        *sum += *value;
                    }
                },
            );
        }
        let base = slice.base.unwrap_or_default();
        kernels.run(
            #[inline(always)]
            || {
                if self.consensus {
                    self.elect(&deltas, out);
                } else if self.normalize {
                    let sum: f32 = self.weights.iter().sum();
                    let divisor = if sum.abs() < LEAST_DIVISOR { 1.0 } else { sum };
                    out.iter_mut().for_each(|sum| *sum /= divisor);
                }
                for (value, base) in out.iter_mut().zip(base) {
                    *value = base + *value * self.lambda;
                }
            },
        );
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

/// Elements whose divisors are held at a time.
const PART: usize = 256;

impl TaskVectors {
    /// Replaces sums of all weighted deltas by those of the elected sign, normalised if asked for.
    #[inline(always)]
    fn elect(&self, deltas: &[f32], out: &mut [f32]) {
        let length = out.len();
        for (number, sums) in out.chunks_mut(PART).enumerate() {
            let start = number * PART;
            let mut elected = [0.0_f32; PART];
            let mut divisors = [0.0_f32; PART];
            for (sign, sum) in elected.iter_mut().zip(&*sums) {
                *sign = if *sum >= 0.0 { 1.0 } else { -1.0 };
            }
            sums.fill(0.0);
            for (delta, &weight) in deltas.chunks_exact(length).zip(&self.weights) {
                let delta = &delta[start..start + sums.len()];
                let places = sums.iter_mut().zip(&mut divisors).zip(delta.iter().zip(&elected));
                for ((sum, divisor), (value, sign)) in places {
                    let agrees = value * sign > 0.0;
                    *sum += if agrees { *value } else { 0.0 };
                    *divisor += if agrees { weight } else { 0.0 };
                }
            }
            if self.normalize {
                for (sum, divisor) in sums.iter_mut().zip(&divisors) {
                    *sum /= if *divisor == 0.0 { 1.0 } else { *divisor };
                }
            }
        }
    }
}
