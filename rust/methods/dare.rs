//! `dare_linear` and `dare_ties`: task vectors lose random elements, and the others are scaled up (Yu et al.,
//! arXiv 2311.03099).

use super::Method;
use super::random::{probability, uniforms};
use super::specification::{Base, Settings, Specification};
use super::task_vectors::{COMMON, KEEP_SCALE, RESCALE_RANDOM, SEED, Sparsify, TaskVectors};
use super::ties::masked;
use crate::kernels::Kernels;

/// `dare_linear` in the table of methods.
pub(super) const DARE_LINEAR: Specification = Specification {
    name: "dare_linear",
    title: "DARE",
    summary: "Drops random elements of each task vector, scales up the others and adds them.",
    reference: "https://arxiv.org/abs/2311.03099",
    base: Base::Required,
    operands: (1, None),
    passes: 1,
    parameters: &[COMMON, &[KEEP_SCALE, RESCALE_RANDOM, SEED]],
    make: |settings| make(settings, false),
};

/// `dare_ties` in the table of methods.
pub(super) const DARE_TIES: Specification = Specification {
    name: "dare_ties",
    title: "DARE with TIES",
    summary: "Drops random elements of each task vector, scales up the others and adds those that agree on the sign.",
    make: |settings| make(settings, true),
    ..DARE_LINEAR
};

fn make(settings: &Settings, consensus: bool) -> Result<Box<dyn Method>, String> {
    let rescale = settings.choice("rescale") == "probability";
    TaskVectors::make(settings, consensus, None, |number, density| {
        Ok(Box::new(Dropout {
            // A density is below 1, if only just.
            below: u32::try_from(probability(density)).unwrap_or(u32::MAX),
            scale: if rescale { crate::dtype::f64_to_f32(1.0 / density) } else { 1.0 },
            key: settings.key,
            stream: u32::try_from(number).unwrap_or(u32::MAX),
        }))
    })
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
    fn apply(&self, kernels: &Kernels, _: &[f64], first: usize, delta: &mut [f32]) {
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
