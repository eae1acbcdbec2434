//! `linear`: the weighted sum of the operands (Wortsman et al., "Model soups", arXiv 2203.05482).
//!
//! The sum starts at zero and takes the operands in order by fused multiply-add in f32, which is how mergekit's
//! `linear` accumulates; with `normalize` it is divided by the f32 sum of the weights afterwards.

use super::parameters::{FINITE, Spec, parameters};
use super::specification::{Base, Description, Flag, Given, Rule, Target};
use super::{Method, Slice, TypedMethod};
use crate::kernels::Kernels;

/// The weight of an operand, which several methods share.
pub(super) const WEIGHT: Spec<f64> = Spec::required(FINITE, "Weight of the model.");

parameters! {
    /// Of each model.
    struct Weighted {
        weight: f64 = WEIGHT,
    }
}

parameters! {
    /// Of the mean.
    struct Shared {
        normalize: bool = Spec::flag(true, "Divide by the sum of the weights."),
    }
}

/// Weights in f32, in which merges are computed.
///
/// # Errors
/// A sentence if one is not finite in f32.
pub(super) fn weights(weights: impl Iterator<Item = f64>) -> Result<Vec<f32>, String> {
    weights
        .map(|weight| {
            let weight = crate::dtype::f64_to_f32(weight);
            weight.is_finite().then_some(weight).ok_or_else(|| {
                "a weight is too large for f32, in which merges are computed".to_owned()
            })
        })
        .collect()
}

/// `linear` with checked weights, and the method itself: every tensor is merged alike.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    weights: Vec<f32>,
    /// Divides the sum; `None` where that would be a division by one.
    divisor: Option<f32>,
}

impl Rule for Linear {
    type Shared = Shared;
    type Operand = Weighted;
    const ABOUT: Description = Description {
        name: "linear",
        title: "Linear",
        summary: "Weighted mean of the models.",
        reference: "https://arxiv.org/abs/2203.05482",
        base: Base::None,
        operands: (1, None),
        passes: 0,
        flags: &[Flag::Sums],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let weights = weights(given.operands.iter().map(|operand| operand.weight))?;
        let normalize = given.shared.normalize;
        let sum = weights.iter().fold(0.0, |sum, w| sum + w);
        if normalize && sum == 0.0 {
            return Err(
                "`linear` cannot normalise weights that sum to zero; set normalize to false"
                    .to_owned(),
            );
        }
        let divisor = (normalize && sum != 1.0).then_some(sum);
        Ok(Self { weights, divisor })
    }

    fn method(&self, _: &Target<'_>) -> Result<Box<dyn Method>, String> {
        Ok(Box::new(self.clone()))
    }
}

impl TypedMethod for Linear {
    type Facts = ();

    fn start(&self) {}

    fn blend(
        &self,
        kernels: &Kernels,
        (): &(),
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        kernels.weighted_sum(out, slice.operands, &self.weights);
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
