//! `slerp`: along the great circle from the base to the other model (Shoemake, "Animating rotation with quaternion
//! curves", SIGGRAPH 1985).
//!
//! Whole tensors are vectors. With θ the angle between them: `sin((1-t)θ)/sin θ · B + sin(tθ)/sin θ · x`. Norms of at
//! most 1e-8 count as 1, and where |cos θ| > 0.9995 the straight line is taken, as mergekit does.

use super::Method;
use super::gram::{Coefficients, Combination, Gram, Vectors};
use super::parameters::{FINITE, Nothing, Spec, parameters};
use super::specification::{Base, Description, Flag, Given, Rule, Target};

parameters! {
    /// Of the merge.
    struct Shared {
        t: f64 = Spec::required(FINITE, "0 gives the base, 1 the other model."),
    }
}

const LEAST_NORM: f64 = 1e-8;
const STRAIGHT: f64 = 0.9995;

/// `slerp` with its place on the arc.
#[derive(Debug, Clone)]
pub(super) struct Slerp {
    t: f64,
}

impl Rule for Slerp {
    type Shared = Shared;
    type Operand = Nothing;
    const ABOUT: Description = Description {
        name: "slerp",
        title: "SLERP",
        summary: "Spherical interpolation from the base to the other model.",
        reference: "https://en.wikipedia.org/wiki/Slerp",
        base: Base::Required,
        operands: (1, Some(1)),
        passes: 1,
        flags: &[Flag::Sole],
        interpolates: Some("t"),
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        Ok(Self { t: given.shared.t })
    }

    fn method(&self, _: &Target<'_>) -> Result<Box<dyn Method>, String> {
        let rule = self.clone();
        Ok(Box::new(Combination {
            rule,
            vectors: Vectors::BaseAndOperands,
            operands: 1,
            row: None,
        }))
    }
}

impl Coefficients for Slerp {
    fn coefficients(&self, gram: &Gram<'_>) -> Result<Vec<f64>, String> {
        let norm = |i| Some(gram.norm(i)).filter(|&norm| norm > LEAST_NORM).unwrap_or(1.0);
        let cosine = (gram.dot(0, 1) / (norm(0) * norm(1))).clamp(-1.0, 1.0);
        if cosine.abs() > STRAIGHT {
            return Ok(vec![1.0 - self.t, self.t]);
        }
        Ok(arc(cosine, self.t).to_vec())
    }
}

/// Coefficients of the point at `t` of the arc between two vectors whose angle has this cosine, not ±1.
pub(super) fn arc(cosine: f64, t: f64) -> [f64; 2] {
    let angle = cosine.acos();
    [((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()]
}
