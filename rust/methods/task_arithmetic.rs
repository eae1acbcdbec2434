//! `task_arithmetic`: the base plus a weighted sum of task vectors (Ilharco et al., arXiv 2212.04089).

use super::Method;
use super::linear::WEIGHT;
use super::parameters::parameters;
use super::specification::{Base, Description, Given, Rule, Target};
use super::task_vectors::{Family, KEEP_SCALE, KeepAll, LAMBDA};

parameters! {
    /// Of the sum.
    struct Shared {
        lambda: f64 = LAMBDA,
        normalize: bool = KEEP_SCALE,
    }
}

parameters! {
    /// Of each model. Without a sparsifier there is no density.
    struct Operand {
        weight: f64 = WEIGHT,
    }
}

/// `task_arithmetic` with checked parameters.
#[derive(Debug)]
pub(super) struct TaskArithmetic(Family);

impl Rule for TaskArithmetic {
    type Shared = Shared;
    type Operand = Operand;
    const ABOUT: Description = Description {
        name: "task_arithmetic",
        title: "Task arithmetic",
        summary: "Base plus the weighted sum of task vectors.",
        reference: "https://arxiv.org/abs/2212.04089",
        base: Base::Required,
        operands: (1, None),
        passes: 0,
        flags: &[],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let operands = given.operands.iter().map(|operand| (operand.weight, 1.0));
        Ok(Self(Family::new(operands, given.shared.lambda, given.shared.normalize)?))
    }

    fn method(&self, _: &Target<'_>) -> Result<Box<dyn Method>, String> {
        self.0.method(None, |_, _| Ok(Box::new(KeepAll)))
    }
}
