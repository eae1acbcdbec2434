//! `linear`: the weighted sum of the operands (Wortsman et al., "Model soups", arXiv 2203.05482).
//!
//! The sum starts at zero and takes the operands in order by fused multiply-add in f32, which is how mergekit's
//! `linear` accumulates; with `normalize` it is divided by the f32 sum of the weights afterwards.

use super::specification::{Base, Default, Kind, Parameter, Scope, Settings, Specification};
use super::{Method, Slice};
use crate::kernels::Kernels;

/// The weight of an operand, which several methods share.
pub(super) const WEIGHT: Parameter = Parameter {
    name: "weight",
    scope: Scope::Operand,
    kind: Kind::Number(f64::NEG_INFINITY, f64::INFINITY),
    default: Default::Required,
    help: "Weight of the model.",
};

const NORMALIZE: Parameter = Parameter {
    name: "normalize",
    scope: Scope::Shared,
    kind: Kind::Flag,
    default: Default::Flag(true),
    help: "Divide by the sum of the weights.",
};

/// `linear` in the table of methods.
pub(super) const LINEAR: Specification = Specification {
    name: "linear",
    title: "Linear",
    summary: "Weighted mean of the models.",
    reference: "https://arxiv.org/abs/2203.05482",
    base: Base::None,
    operands: (1, None),
    passes: 0,
    parameters: &[&[WEIGHT, NORMALIZE]],
    make,
};

#[derive(Debug)]
struct Linear {
    weights: Vec<f32>,
    /// Divides the sum; `None` where that would be a division by one.
    divisor: Option<f32>,
}

fn make(settings: &Settings) -> Result<Box<dyn Method>, String> {
    let weights = settings.weights()?;
    let normalize = settings.flag("normalize");
    let sum = weights.iter().fold(0.0, |sum, w| sum + w);
    if normalize && sum == 0.0 {
        return Err(
            "`linear` cannot normalise weights that sum to zero; set normalize to false".to_owned()
        );
    }
    let divisor = (normalize && sum != 1.0).then_some(sum);
    Ok(Box::new(Linear { weights, divisor }))
}

impl Method for Linear {
    fn blend(
        &self,
        kernels: &Kernels,
        _: &[f64],
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        out.fill(0.0);
        for (operand, &weight) in slice.operands.iter().zip(&self.weights) {
            kernels.multiply_add(out, operand, weight);
        }
        if let Some(divisor) = self.divisor {
            kernels.run(
                #[inline(always)]
                || {
                    for value in out {
                        *value /= divisor;
                    }
                },
            );
        }
        Ok(())
    }
}
