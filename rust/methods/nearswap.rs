//! `nearswap`: the other model where it is near the base (alchemonaut, QuartetAnemoi-70B).
//!
//! With `w = min(t / max(|x - B|, 1e-6), 1)`: `w·x + (1 - w)·B`.

use super::specification::{Base, Default, Kind, Parameter, Scope, Settings, Specification};
use super::{Method, Slice};
use crate::kernels::Kernels;

/// `nearswap` in the table of methods.
pub(super) const NEARSWAP: Specification = Specification {
    name: "nearswap",
    title: "NearSwap",
    summary: "Moves the base towards the other model where the two are near each other.",
    reference: "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    base: Base::Required,
    operands: (1, Some(1)),
    passes: 0,
    parameters: &[&[Parameter {
        name: "t",
        scope: Scope::Shared,
        kind: Kind::Number(0.0, f64::INFINITY),
        default: Default::Required,
        help: "Distance up to which an element is taken from the other model.",
    }]],
    make,
};

/// Below this, differences count as this large.
const LEAST_DIFFERENCE: f32 = 1e-6;

#[derive(Debug)]
struct NearSwap {
    t: f32,
}

#[expect(clippy::unnecessary_wraps, reason = "the signature of all methods")]
fn make(settings: &Settings) -> Result<Box<dyn Method>, String> {
    Ok(Box::new(NearSwap { t: crate::dtype::f64_to_f32(settings.number("t")) }))
}

impl Method for NearSwap {
    fn blend(
        &self,
        kernels: &Kernels,
        _: &[f64],
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        let (base, other) = (slice.base.unwrap_or_default(), slice.operands[0]);
        kernels.run(
            #[inline(always)]
            || {
                for ((value, &base), &other) in out.iter_mut().zip(base).zip(other) {
                    let weight = (self.t / (base - other).abs().max(LEAST_DIFFERENCE)).min(1.0);
                    *value = weight * other + (1.0 - weight) * base;
                }
            },
        );
        Ok(())
    }
}
