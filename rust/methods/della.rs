//! `della` and `della_linear`: task vectors lose random elements, small ones more likely (Deep et al.,
//! arXiv 2406.11617).
//!
//! Within a row of `n` elements, the one with rank `r` (0 for the smallest magnitude; of equal ones, the first) is kept
//! with probability `density - epsilon + 2·epsilon·r/(n-1)`.

use super::Method;
use super::gram::rows;
use super::linear::WEIGHT;
use super::parameters::{SHARE, Spec, parameters};
use super::quantile::{Cut, magnitude};
use super::random::{probability, uniforms};
use super::specification::{Base, Description, Flag, Given, Rule, Target};
use super::task_vectors::{
    DENSITY, Family, KEEP_SCALE, LAMBDA, NORMALIZE, RescaleRandom, SEED, Sparsify,
};
use crate::kernels::Kernels;

parameters! {
    /// Of the sum of elements that voted.
    struct Shared {
        lambda: f64 = LAMBDA,
        normalize: bool = NORMALIZE,
        rescale: RescaleRandom = RescaleRandom::SPEC,
        seed: u64 = SEED,
    }
}

parameters! {
    /// Of the plain sum.
    struct SharedLinear {
        lambda: f64 = LAMBDA,
        normalize: bool = KEEP_SCALE,
        rescale: RescaleRandom = RescaleRandom::SPEC,
        seed: u64 = SEED,
    }
}

parameters! {
    /// Of each model.
    struct Operand {
        weight: f64 = WEIGHT,
        density: f64 = DENSITY,
        epsilon: f64 = Spec::number(
            SHARE,
            0.15,
            "Probabilities reach from density - epsilon for the smallest element of a row to density + epsilon \
             for the largest.",
        ),
    }
}

const ABOUT: Description = Description {
    name: "della",
    title: "DELLA",
    summary: "Drops random elements of each task vector, small ones more likely, and adds those that agree on the sign.",
    reference: "https://arxiv.org/abs/2406.11617",
    base: Base::Required,
    operands: (1, None),
    passes: 1,
    flags: &[Flag::Votes],
    interpolates: None,
};

/// `della` with checked parameters.
#[derive(Debug)]
pub(super) struct Della(Ranked);

/// `della_linear` with checked parameters.
#[derive(Debug)]
pub(super) struct DellaLinear(Ranked);

/// What the two have in common.
#[derive(Debug)]
struct Ranked {
    family: Family,
    epsilons: Vec<f64>,
    /// Whether what is kept is divided by the probability of keeping it.
    by_probability: bool,
    seed: u64,
}

impl Rule for Della {
    type Shared = Shared;
    type Operand = Operand;
    const ABOUT: Description = ABOUT;

    fn new(given: Given<Self>) -> Result<Self, String> {
        let Shared { lambda, normalize, rescale, seed } = given.shared;
        let operands = given.operands.iter().map(|operand| (operand.weight, operand.density));
        let family = Family::new(operands, lambda, normalize)?.voting(true);
        Ok(Self(Ranked::new(family, &given.operands, rescale, seed)?))
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        self.0.method(target)
    }
}

impl Rule for DellaLinear {
    type Shared = SharedLinear;
    type Operand = Operand;
    const ABOUT: Description = Description {
        name: "della_linear",
        title: "Linear DELLA",
        summary: "Drops random elements of each task vector, small ones more likely, and adds the others.",
        flags: &[],
        ..ABOUT
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let SharedLinear { lambda, normalize, rescale, seed } = given.shared;
        let operands = given.operands.iter().map(|operand| (operand.weight, operand.density));
        let family = Family::new(operands, lambda, normalize)?;
        Ok(Self(Ranked::new(family, &given.operands, rescale, seed)?))
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        self.0.method(target)
    }
}

impl Ranked {
    fn new(
        family: Family,
        operands: &[Operand],
        rescale: RescaleRandom,
        seed: u64,
    ) -> Result<Self, String> {
        for &Operand { density, epsilon, .. } in operands {
            let sparse = density > 0.0 && density < 1.0;
            if sparse && (density - epsilon <= 0.0 || density + epsilon >= 1.0) {
                return Err(format!(
                    "`density` ± `epsilon` should lie between 0 and 1, not {density} ± {epsilon}"
                ));
            }
        }
        Ok(Self {
            family: family.rescaled(rescale == RescaleRandom::L1),
            epsilons: operands.iter().map(|operand| operand.epsilon).collect(),
            by_probability: rescale == RescaleRandom::Probability,
            seed,
        })
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        let key = target.key(self.seed);
        self.family.method(rows(target)?, |number, density| {
            Ok(Box::new(RankedDropout {
                density,
                epsilon: self.epsilons[number],
                rescale: self.by_probability,
                key,
                stream: u32::try_from(number).unwrap_or(u32::MAX),
                columns: target.columns(),
            }))
        })
    }
}

/// Keeps an element of a row with a probability that follows from its rank.
#[derive(Debug)]
struct RankedDropout {
    density: f64,
    epsilon: f64,
    rescale: bool,
    key: [u32; 2],
    stream: u32,
    columns: usize,
}

impl Sparsify for RankedDropout {
    fn apply(&self, _: &Kernels, _: [Cut; 2], first: usize, delta: &mut [f32]) {
        let mut numbers = vec![0; self.columns];
        let mut order = Vec::with_capacity(self.columns);
        for (number, row) in delta.chunks_mut(self.columns.max(1)).enumerate() {
            uniforms(self.key, self.stream, first + number * self.columns, &mut numbers);
            order.clear();
            let places = row.iter().zip(0_u64..);
            order.extend(places.map(|(value, place)| u64::from(magnitude(*value)) << 32 | place));
            order.sort_unstable();
            let last = f64::from(u32::try_from(row.len().max(2) - 1).unwrap_or(u32::MAX));
            for (rank, &entry) in (0_u32..).zip(&order) {
                let place = usize::try_from(entry & u64::from(u32::MAX)).unwrap_or_default();
                let kept =
                    self.density - self.epsilon + 2.0 * self.epsilon * f64::from(rank) / last;
                row[place] = if u64::from(numbers[place]) >= probability(kept) {
                    0.0
                } else if self.rescale {
                    crate::dtype::f64_to_f32(f64::from(row[place]) / kept)
                } else {
                    row[place]
                };
            }
        }
    }
}
