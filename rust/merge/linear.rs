//! `linear`: the weighted sum of the operands.
//!
//! The sum starts at zero and takes the operands in order by fused multiply-add in f32, which is how mergekit's
//! `linear` accumulates; with `normalize` it is divided by the f32 sum of the weights afterwards.

use super::Method;
use crate::kernels::Kernels;
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    #[serde(default = "yes")]
    normalize: bool,
}

fn yes() -> bool {
    true
}

#[derive(Debug)]
struct Linear {
    weights: Vec<f32>,
    /// Divides the sum; `None` where that would be a division by one.
    divisor: Option<f32>,
}

/// Makes the method; `parameters` may hold `normalize` (default true).
///
/// # Errors
/// A sentence if there are no operands, a weight is not finite in f32, or the weights to normalise sum to zero.
pub fn build(parameters: &Map<String, Value>, weights: &[f64]) -> Result<Box<dyn Method>, String> {
    let Parameters { normalize } =
        serde_json::from_value(Value::Object(parameters.clone())).map_err(|e| e.to_string())?;
    if weights.is_empty() {
        return Err("`linear` needs at least one operand".to_owned());
    }
    let weights: Vec<f32> = weights.iter().map(|&w| crate::dtype::f64_to_f32(w)).collect();
    if let Some(weight) = weights.iter().find(|w| !w.is_finite()) {
        return Err(format!("`linear` needs finite weights, found {weight}"));
    }
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
    fn blend(&self, kernels: &Kernels, operands: &[&[f32]], out: &mut [f32]) {
        out.fill(0.0);
        for (operand, &weight) in operands.iter().zip(&self.weights) {
            kernels.multiply_add(out, operand, weight);
        }
        if let Some(divisor) = self.divisor {
            for value in out {
                *value /= divisor;
            }
        }
    }
}
