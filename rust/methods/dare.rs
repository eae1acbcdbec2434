//! `dare_linear` and `dare_ties`: task vectors lose random elements, and the others are scaled up (Yu et al.,
//! arXiv 2311.03099).

use super::Method;
use super::linear::WEIGHT;
use super::parameters::parameters;
use super::quantile::Cut;
use super::random::{probability, uniforms};
use super::specification::{Base, Description, Flag, Given, Rule, Target};
use super::task_vectors::{DENSITY, Family, KEEP_SCALE, LAMBDA, RescaleRandom, SEED, Sparsify};
use super::ties::masked;
use crate::kernels::Kernels;

parameters! {
    /// Of the sum.
    struct Shared {
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
    }
}

/// `dare_linear`, or `dare_ties` where elements vote, with checked parameters.
#[derive(Debug)]
pub(super) struct Dare<const VOTES: bool> {
    family: Family,
    /// Whether what is kept is divided by the probability of keeping it.
    by_probability: bool,
    seed: u64,
}

impl<const VOTES: bool> Rule for Dare<VOTES> {
    type Shared = Shared;
    type Operand = Operand;
    const ABOUT: Description = {
        let alone = Description {
            name: "dare_linear",
            title: "DARE",
            summary: "Drops random elements of each task vector, scales up the others and adds them.",
            reference: "https://arxiv.org/abs/2311.03099",
            base: Base::Required,
            operands: (1, None),
            passes: 1,
            flags: &[],
            interpolates: None,
        };
        if VOTES {
            Description {
                name: "dare_ties",
                title: "DARE with TIES",
                summary: "Drops random elements of each task vector, scales up the others and adds those that agree on the sign.",
                flags: &[Flag::Votes],
                ..alone
            }
        } else {
            alone
        }
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let Shared { lambda, normalize, rescale, seed } = given.shared;
        let operands = given.operands.iter().map(|operand| (operand.weight, operand.density));
        let family = Family::new(operands, lambda, normalize)?;
        let family = family.voting(VOTES).rescaled(rescale == RescaleRandom::L1);
        Ok(Self { family, by_probability: rescale == RescaleRandom::Probability, seed })
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        let key = target.key(self.seed);
        self.family.method(None, |number, density| {
            let scale = if self.by_probability { 1.0 / density } else { 1.0 };
            Ok(Box::new(Dropout {
                // A density is below 1, if only just.
                below: u32::try_from(probability(density)).unwrap_or(u32::MAX),
                scale: crate::dtype::f64_to_f32(scale),
                key,
                stream: u32::try_from(number).unwrap_or(u32::MAX),
            }))
        })
    }
}

/// Keeps an element if its random number is below a bound.
#[derive(Debug)]
struct Dropout {
    below: u32,
    scale: f32,
    key: [u32; 2],
    stream: u32,
}

/// Elements whose random numbers are held at a time.
const PART: usize = 256;

impl Sparsify for Dropout {
    fn apply(&self, kernels: &Kernels, _: [Cut; 2], first: usize, delta: &mut [f32]) {
        kernels.run(
            #[inline(always)]
            || {
                for (number, part) in delta.chunks_mut(PART).enumerate() {
                    let mut numbers = [0; PART];
                    uniforms(
                        self.key,
                        self.stream,
                        first + number * PART,
                        &mut numbers[..part.len()],
                    );
                    for (value, &random) in part.iter_mut().zip(&numbers) {
                        *value = masked(*value * self.scale, u32::from(random < self.below));
                    }
                }
            },
        );
    }
}
