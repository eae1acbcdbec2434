//! `multislerp`: the weighted mean of any number of models on a sphere, in the tangent space at their Euclidean mean
//! (Goddard, "Multi-SLERP").
//!
//! With units `u_i = v_i / (‖v_i‖ + ε)` and `m = Σ w_i u_i / ‖Σ w_i u_i‖`, the tangent `τ = Σ w_i (u_i - ⟨u_i, m⟩ m)`
//! gives `(cos(‖τ‖+ε) m + sin(‖τ‖+ε)/(‖τ‖+ε) τ) · Σ w_i ‖v_i‖`. With a base, the `v_i` are task vectors. Vectors that
//! are all zero have a mean of zero, which mergekit refuses.

use super::Method;
use super::gram::{Coefficients, Combination, Gram, Vectors};
use super::linear::WEIGHT;
use super::parameters::{SHARE, Spec, parameters};
use super::specification::{Base, Description, Given, Rule, Target};
use std::sync::Arc;

parameters! {
    /// Of each model.
    struct Weighted {
        weight: f64 = WEIGHT,
    }
}

parameters! {
    /// Of the mean.
    struct Shared {
        normalize_weights: bool = Spec::flag(true, "Divide the weights by their sum."),
        eps: f64 = Spec::number(SHARE, 1e-8, "Keeps divisions by norms finite."),
    }
}

/// Relative to the inputs' products, what of a difference of f64 sums is noise.
const NOISE: f64 = 1e-14;

/// `multislerp` with checked parameters.
#[derive(Debug)]
pub(super) struct MultiSlerp {
    mean: Mean,
    vectors: Vectors,
}

/// The weighted mean on the sphere.
#[derive(Debug, Clone)]
struct Mean {
    weights: Arc<[f64]>,
    epsilon: f64,
}

impl Rule for MultiSlerp {
    type Shared = Shared;
    type Operand = Weighted;
    const ABOUT: Description = Description {
        name: "multislerp",
        title: "Multi-SLERP",
        summary: "Barycentre of any number of models, or task vectors, on a sphere.",
        reference: "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        base: Base::Optional,
        operands: (1, None),
        passes: 1,
        flags: &[],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let Shared { normalize_weights, eps } = given.shared;
        let mut weights: Vec<f64> = given.operands.iter().map(|operand| operand.weight).collect();
        if normalize_weights {
            let sum: f64 = weights.iter().sum();
            if sum == 0.0 {
                return Err(
                    "`multislerp` cannot normalise weights that sum to zero; set normalize_weights \
                     to false"
                        .to_owned(),
                );
            }
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        let vectors = if given.base { Vectors::Deltas } else { Vectors::Operands };
        Ok(Self { mean: Mean { weights: weights.into(), epsilon: eps }, vectors })
    }

    fn method(&self, _: &Target<'_>) -> Result<Box<dyn Method>, String> {
        let (rule, vectors, operands) = (self.mean.clone(), self.vectors, self.mean.weights.len());
        Ok(Box::new(Combination { rule, vectors, operands, row: None }))
    }
}

impl Coefficients for Mean {
    fn coefficients(&self, gram: &Gram<'_>) -> Result<Vec<f64>, String> {
        let count = self.weights.len();
        if count == 1 {
            return Ok(vec![1.0]);
        }
        let lengths: Vec<f64> = (0..count).map(|i| gram.norm(i) + self.epsilon).collect();
        // A vector is given by its coefficients over the units.
        let dot = |left: &[f64], right: &[f64]| -> f64 {
            let pairs = (0..count).flat_map(|i| (0..count).map(move |j| (i, j)));
            // Without an epsilon, vectors of length zero have no unit.
            let pairs = pairs.filter(|&(i, j)| lengths[i] > 0.0 && lengths[j] > 0.0);
            pairs
                .map(|(i, j)| left[i] * right[j] * (gram.dot(i, j) / (lengths[i] * lengths[j])))
                .sum()
        };
        let mean_square = dot(&self.weights, &self.weights);
        let scale: f64 = self.weights.iter().map(|weight| weight * weight).sum();
        if (0..count).all(|i| gram.norm(i) == 0.0) {
            return Ok(vec![0.0; count]);
        }
        if mean_square <= (self.epsilon * self.epsilon).max(NOISE * scale) {
            if count == 2 {
                return Ok(self.weights.to_vec());
            }
            return Err(
                "the weighted sum of the normalised models is zero, so that `multislerp` has no \
                        direction; use other weights"
                    .to_owned(),
            );
        }
        let mean: Vec<f64> =
            self.weights.iter().map(|weight| weight / mean_square.sqrt()).collect();
        let mut tangent = self.weights.to_vec();
        let mut unit = vec![0.0; count];
        let along: f64 = (0..count)
            .map(|i| {
                unit.fill(0.0);
                unit[i] = 1.0;
                self.weights[i] * dot(&unit, &mean)
            })
            .sum();
        tangent.iter_mut().zip(&mean).for_each(|(tangent, mean)| *tangent -= along * mean);
        let angle = dot(&tangent, &tangent).max(0.0).sqrt() + self.epsilon;
        let size: f64 = (0..count).map(|i| self.weights[i] * gram.norm(i)).sum();
        let ratio = if angle > 0.0 { angle.sin() / angle } else { 1.0 };
        let coefficient = |i: usize| {
            let unit = angle.cos() * mean[i] + ratio * tangent[i];
            if lengths[i] > 0.0 { unit * size / lengths[i] } else { 0.0 }
        };
        Ok((0..count).map(coefficient).collect())
    }
}
