//! `nearswap`: the other model where it is near the base (alchemonaut, QuartetAnemoi-70B).
//!
//! With `w = min(t / max(|x - B|, 1e-6), 1)`: `w·x + (1 - w)·B`.

use super::parameters::{NOT_NEGATIVE, Nothing, Spec, parameters};
use super::specification::{Base, Description, Given, Rule, Target};
use super::{Method, Slice, TypedMethod};
use crate::kernels::Kernels;

parameters! {
    /// Of the merge.
    struct Shared {
        t: f64 = Spec::required(
            NOT_NEGATIVE,
            "Distance up to which an element is taken from the other model.",
        ),
    }
}

/// Below this, differences count as this large.
const LEAST_DIFFERENCE: f32 = 1e-6;

/// `nearswap` with its distance, and the method itself.
#[derive(Debug, Clone)]
pub(super) struct NearSwap {
    t: f32,
}

impl Rule for NearSwap {
    type Shared = Shared;
    type Operand = Nothing;
    const ABOUT: Description = Description {
        name: "nearswap",
        title: "NearSwap",
        summary: "Moves the base towards the other model where the two are near each other.",
        reference: "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        base: Base::Required,
        operands: (1, Some(1)),
        passes: 0,
        flags: &[],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        Ok(Self { t: crate::dtype::f64_to_f32(given.shared.t) })
    }

    fn method(&self, _: &Target<'_>) -> Result<Box<dyn Method>, String> {
        Ok(Box::new(self.clone()))
    }
}

impl TypedMethod for NearSwap {
    type Facts = ();

    fn start(&self) {}

    fn blend(
        &self,
        kernels: &Kernels,
        (): &(),
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
