//! `slerp`: along the great circle from the base to the other model (Shoemake, "Animating rotation with quaternion
//! curves", SIGGRAPH 1985).
//!
//! Whole tensors are vectors. With θ the angle between them: `sin((1-t)θ)/sin θ · B + sin(tθ)/sin θ · x`. Norms of at
//! most 1e-8 count as 1, and where |cos θ| > 0.9995 the straight line is taken, as mergekit does.

use super::Method;
use super::gram::{Coefficients, Combination, Gram, Vectors};
use super::specification::{Base, Default, Kind, Parameter, Scope, Settings, Specification};

/// `slerp` in the table of methods.
pub(super) const SLERP: Specification = Specification {
    name: "slerp",
    title: "SLERP",
    summary: "Spherical interpolation from the base to the other model.",
    reference: "https://en.wikipedia.org/wiki/Slerp",
    base: Base::Required,
    operands: (1, Some(1)),
    passes: 1,
    parameters: &[&[Parameter {
        name: "t",
        scope: Scope::Shared,
        kind: Kind::Number(f64::NEG_INFINITY, f64::INFINITY),
        default: Default::Required,
        help: "0 gives the base, 1 the other model.",
    }]],
    make,
};

const LEAST_NORM: f64 = 1e-8;
const STRAIGHT: f64 = 0.9995;

#[derive(Debug)]
struct Slerp {
    t: f64,
}

#[expect(clippy::unnecessary_wraps, reason = "the signature of all methods")]
fn make(settings: &Settings) -> Result<Box<dyn Method>, String> {
    let rule = Slerp { t: settings.number("t") };
    Ok(Box::new(Combination { rule, vectors: Vectors::BaseAndOperands, operands: 1, row: None }))
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
