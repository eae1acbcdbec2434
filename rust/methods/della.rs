//! `della` and `della_linear`: task vectors lose random elements, small ones more likely (Deep et al.,
//! arXiv 2406.11617).
//!
//! Within a row of `n` elements, the one with rank `r` (0 for the smallest magnitude; of equal ones, the first) is kept
//! with probability `density - epsilon + 2·epsilon·r/(n-1)`.

use super::Method;
use super::gram::rows;
use super::quantile::magnitude;
use super::random::{probability, uniforms};
use super::specification::{Base, Default, Kind, Parameter, Scope, Settings, Specification};
use super::task_vectors::{
    COMMON, KEEP_SCALE, NORMALIZE, RESCALE_RANDOM, SEED, Sparsify, TaskVectors,
};
use crate::kernels::Kernels;

const EPSILON: Parameter = Parameter {
    name: "epsilon",
    scope: Scope::Operand,
    kind: Kind::Number(0.0, 1.0),
    default: Default::Number(0.15),
    help: "Probabilities reach from density - epsilon for the smallest element of a row to density + epsilon \
           for the largest.",
};

/// `della` in the table of methods.
pub(super) const DELLA: Specification = Specification {
    name: "della",
    title: "DELLA",
    summary: "Drops random elements of each task vector, small ones more likely, and adds those that agree on the sign.",
    reference: "https://arxiv.org/abs/2406.11617",
    base: Base::Required,
    operands: (1, None),
    passes: 1,
    parameters: &[COMMON, &[EPSILON, NORMALIZE, RESCALE_RANDOM, SEED]],
    make: |settings| make(settings, true),
};

/// `della_linear` in the table of methods.
pub(super) const DELLA_LINEAR: Specification = Specification {
    name: "della_linear",
    title: "Linear DELLA",
    summary: "Drops random elements of each task vector, small ones more likely, and adds the others.",
    parameters: &[COMMON, &[EPSILON, KEEP_SCALE, RESCALE_RANDOM, SEED]],
    make: |settings| make(settings, false),
    ..DELLA
};

fn make(settings: &Settings, consensus: bool) -> Result<Box<dyn Method>, String> {
    let rescale = settings.choice("rescale") == "probability";
    let epsilons = settings.numbers("epsilon", 0.0);
    TaskVectors::make(settings, consensus, rows(settings)?, |number, density| {
        let epsilon = epsilons[number];
        if density - epsilon <= 0.0 || density + epsilon >= 1.0 {
            return Err(format!(
                "`density` ± `epsilon` should lie between 0 and 1, not {density} ± {epsilon}"
            ));
        }
        Ok(Box::new(RankedDropout {
            density,
            epsilon,
            rescale,
            key: settings.key,
            stream: u32::try_from(number).unwrap_or(u32::MAX),
            columns: settings.columns(),
        }))
    })
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
    fn apply(&self, _: &Kernels, _: &[f64], first: usize, delta: &mut [f32]) {
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
