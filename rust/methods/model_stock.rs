//! `model_stock`: the mean of the models, pulled towards the base as far as their task vectors disagree (Jang et al.,
//! arXiv 2403.19522, equation 6).
//!
//! With `N` models and `c` the mean cosine of pairs of task vectors, `t = N c / (1 + (N-1) c)` and the result is
//! `t·mean + (1-t)·B`, of whole tensors or of each row.

use super::Method;
use super::gram::{Coefficients, Combination, Gram, Vectors};
use super::parameters::{Nothing, Spec, parameters};
use super::specification::{Base, Description, Given, Rule, Target};

parameters! {
    /// Of the merge.
    struct Shared {
        filter_wise: bool = Spec::flag(false, "Measure the disagreement of each row by itself."),
    }
}

const LEAST_PRODUCT: f64 = 1e-6;
const LEAST_DENOMINATOR: f64 = 1e-6;

/// `model_stock` with checked parameters.
#[derive(Debug)]
pub(super) struct ModelStock {
    mean: Mean,
    filter_wise: bool,
}

/// The mean of so many models.
#[derive(Debug, Clone)]
struct Mean {
    count: usize,
}

impl Rule for ModelStock {
    type Shared = Shared;
    type Operand = Nothing;
    const ABOUT: Description = Description {
        name: "model_stock",
        title: "Model Stock",
        summary: "Mean of two or more models, moved towards the base by how much their task vectors disagree.",
        reference: "https://arxiv.org/abs/2403.19522",
        base: Base::Required,
        operands: (2, None),
        passes: 1,
        flags: &[],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let mean = Mean { count: given.operands.len() };
        Ok(Self { mean, filter_wise: given.shared.filter_wise })
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        let row = if self.filter_wise { super::gram::rows(target)? } else { None };
        let (rule, operands) = (self.mean.clone(), self.mean.count);
        Ok(Box::new(Combination { rule, vectors: Vectors::Deltas, operands, row }))
    }
}

impl Coefficients for Mean {
    fn coefficients(&self, gram: &Gram<'_>) -> Result<Vec<f64>, String> {
        let count = f64::from(u32::try_from(self.count).unwrap_or(u32::MAX));
        let mut sum = 0.0;
        for i in 0..self.count {
            for j in i + 1..self.count {
                let norms = (gram.norm(i) * gram.norm(j)).max(LEAST_PRODUCT);
                sum += (gram.dot(i, j) / norms).clamp(-1.0, 1.0);
            }
        }
        let cosine = sum / (count * (count - 1.0) / 2.0);
        let denominator = 1.0 + (count - 1.0) * cosine;
        let t =
            if denominator.abs() < LEAST_DENOMINATOR { 0.0 } else { count * cosine / denominator };
        Ok(vec![t / count; self.count])
    }
}
