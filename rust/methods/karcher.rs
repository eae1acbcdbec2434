//! `karcher`: the Riemannian centre of mass of the models' directions on the unit sphere (Karcher 1977; as a merge,
//! arXiv 2603.04972), times the mean of their norms.
//!
//! Every iterate lies in the span of the models, so that the iteration runs on coefficients.

use super::Method;
use super::gram::{Coefficients, Combination, Gram, Vectors};
use super::parameters::{Nothing, SHARE, Spec, parameters};
use super::specification::{Base, Description, Given, Rule, Target};

parameters! {
    /// Of the iteration.
    struct Shared {
        max_iter: u64 = Spec::integer([1, 1000], 10, "Iterations at most."),
        tol: f64 = Spec::number(SHARE, 1e-5, "Angles, and norms, below this count as zero."),
    }
}

/// Products that were summed in f64 do not tell lengths of units below this from zero, nor such angles from 0 or π.
const LEAST_LENGTH: f64 = 1e-6;

/// `karcher` with checked parameters.
#[derive(Debug, Clone)]
pub(super) struct Karcher {
    count: usize,
    iterations: u64,
    tolerance: f64,
}

impl Rule for Karcher {
    type Shared = Shared;
    type Operand = Nothing;
    const ABOUT: Description = Description {
        name: "karcher",
        title: "Karcher mean",
        summary: "Riemannian mean of the models' directions, of any number and with equal weights.",
        reference: "https://arxiv.org/abs/2603.04972",
        base: Base::None,
        operands: (1, None),
        passes: 1,
        flags: &[],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let Shared { max_iter, tol } = given.shared;
        Ok(Self { count: given.operands.len(), iterations: max_iter, tolerance: tol })
    }

    fn method(&self, _: &Target<'_>) -> Result<Box<dyn Method>, String> {
        let (rule, operands) = (self.clone(), self.count);
        Ok(Box::new(Combination { rule, vectors: Vectors::Operands, operands, row: None }))
    }
}

impl Coefficients for Karcher {
    fn coefficients(&self, gram: &Gram<'_>) -> Result<Vec<f64>, String> {
        if self.count == 1 {
            return Ok(vec![1.0]);
        }
        let norms: Vec<f64> = (0..self.count).map(|i| gram.norm(i)).collect();
        let valid: Vec<usize> = (0..self.count).filter(|&i| norms[i] > self.tolerance).collect();
        let mut coefficients = vec![0.0; self.count];
        let Some(&first) = valid.first() else { return Ok(coefficients) };
        let cosine = |i: usize, j: usize| gram.dot(i, j) / (norms[i] * norms[j]);
        // The mean as coefficients over the valid units, and its product with each of them.
        let share = 1.0 / f64::from(u32::try_from(valid.len()).unwrap_or(u32::MAX));
        let mut mean: Vec<f64> = vec![share; valid.len()];
        let dots = |vector: &[f64]| -> Vec<f64> {
            let sum = |&j: &usize| vector.iter().zip(&valid).map(|(a, &i)| a * cosine(i, j)).sum();
            valid.iter().map(sum).collect()
        };
        let length = |vector: &[f64]| -> f64 {
            vector.iter().zip(dots(vector)).map(|(a, b)| a * b).sum::<f64>().max(0.0).sqrt()
        };
        let norm = length(&mean);
        if norm < self.tolerance.max(LEAST_LENGTH) {
            mean.fill(0.0);
            mean[valid.iter().position(|&i| i == first).unwrap_or_default()] = 1.0;
        } else {
            mean.iter_mut().for_each(|value| *value /= norm);
        }
        for _ in 0..self.iterations {
            let mut tangent = vec![0.0; valid.len()];
            for (number, dot) in dots(&mean).into_iter().enumerate() {
                let dot = dot.clamp(-1.0, 1.0);
                let angle = dot.acos();
                // From a point to itself there is no way to go, and to its opposite every way is as good.
                if angle < self.tolerance || angle.sin() < LEAST_LENGTH {
                    continue;
                }
                let factor = share * angle / angle.sin();
                tangent[number] += factor;
                tangent.iter_mut().zip(&mean).for_each(|(t, m)| *t -= factor * dot * m);
            }
            let angle = length(&tangent);
            if angle <= self.tolerance {
                break;
            }
            for (mean, tangent) in mean.iter_mut().zip(&tangent) {
                *mean = angle.cos() * *mean + angle.sin() * tangent / angle;
            }
            let norm = length(&mean);
            if norm > self.tolerance {
                mean.iter_mut().for_each(|value| *value /= norm);
            }
        }
        let size =
            norms.iter().sum::<f64>() / f64::from(u32::try_from(self.count).unwrap_or(u32::MAX));
        for (&place, value) in valid.iter().zip(&mean) {
            coefficients[place] = size * value / norms[place];
        }
        Ok(coefficients)
    }
}
