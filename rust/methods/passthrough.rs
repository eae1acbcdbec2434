//! `passthrough`: the only operand, times a scale.

use super::parameters::{FINITE, Nothing, Spec, parameters};
use super::specification::{Base, Description, Flag, Given, Rule, Target};
use super::{Method, Slice, TypedMethod};
use crate::kernels::Kernels;

parameters! {
    /// Of the one model.
    struct Scaled {
        scale: f64 = Spec::number(FINITE, 1.0, "Factor of every element."),
    }
}

/// `passthrough` with its scale, and the method itself.
#[derive(Debug, Clone)]
pub(super) struct Passthrough {
    scale: f32,
}

impl Rule for Passthrough {
    type Shared = Nothing;
    type Operand = Scaled;
    const ABOUT: Description = Description {
        name: "passthrough",
        title: "Passthrough",
        summary: "One model's tensors as they are, or scaled; for stacking layers.",
        reference: "https://github.com/arcee-ai/mergekit",
        base: Base::None,
        operands: (1, Some(1)),
        passes: 0,
        flags: &[Flag::Copies],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let scale = given.operands.first().map_or(1.0, |operand| operand.scale);
        Ok(Self { scale: crate::dtype::f64_to_f32(scale) })
    }

    fn method(&self, _: &Target<'_>) -> Result<Box<dyn Method>, String> {
        Ok(Box::new(self.clone()))
    }
}

impl TypedMethod for Passthrough {
    type Facts = ();

    fn start(&self) {}

    fn blend(
        &self,
        kernels: &Kernels,
        (): &(),
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        kernels.run(
            #[inline(always)]
            || {
                for (value, operand) in out.iter_mut().zip(slice.operands[0]) {
                    *value = operand * self.scale;
                }
            },
        );
        Ok(())
    }
}
