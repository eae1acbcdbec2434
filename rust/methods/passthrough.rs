//! `passthrough`: the only operand, times a scale.

use super::specification::{Base, Default, Kind, Parameter, Scope, Settings, Specification};
use super::{Method, Slice};
use crate::kernels::Kernels;

/// `passthrough` in the table of methods.
pub(super) const PASSTHROUGH: Specification = Specification {
    name: "passthrough",
    title: "Passthrough",
    summary: "One model's tensors as they are, or scaled; for stacking layers.",
    reference: "https://github.com/arcee-ai/mergekit",
    base: Base::None,
    operands: (1, Some(1)),
    passes: 0,
    parameters: &[&[Parameter {
        name: "scale",
        scope: Scope::Operand,
        kind: Kind::Number(f64::NEG_INFINITY, f64::INFINITY),
        default: Default::Number(1.0),
        help: "Factor of every element.",
    }]],
    make,
};

#[derive(Debug)]
struct Passthrough {
    scale: f32,
}

#[expect(clippy::unnecessary_wraps, reason = "the signature of all methods")]
fn make(settings: &Settings) -> Result<Box<dyn Method>, String> {
    let scale = settings.numbers("scale", 1.0).first().copied().unwrap_or(1.0);
    Ok(Box::new(Passthrough { scale: crate::dtype::f64_to_f32(scale) }))
}

impl Method for Passthrough {
    fn blend(
        &self,
        kernels: &Kernels,
        _: &[f64],
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
