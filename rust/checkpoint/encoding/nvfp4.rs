//! NVFP4: groups of 16 with an E4M3 scale, and one F32 scale for the tensor, as ModelOpt and compressed-tensors store it.

use super::description::{Encoding, Format, Global, leading};
use super::fp4::grouped;
use super::parts::{Codes, Part};
use crate::Result;
use crate::code::{Code, ScaleType};
use safetensors::Dtype;

/// Numbers that share a scale.
const GROUP: usize = 16;

/// [N, K/2] with one scale for 16 numbers. ModelOpt's second scale multiplies; that of compressed-tensors divides.
pub(super) fn packed(codes: &Codes<'_>, scales: &Part<'_>) -> Result<Encoding> {
    let name = codes.logical_name();
    let divides = name != codes.name;
    let global = codes.needed(&if divides {
        format!("{}_global_scale", name)
    } else {
        format!("{name}_scale_2")
    })?;
    let shape = codes.unpacked(2)?;
    let matrices = leading(&shape);
    let count = global.elements();
    if global.dtype != Dtype::F32 || (count != 1 && count != matrices) {
        return Err(codes.misfit(
            &global,
            &format_args!("which the global one is F32, one or one a matrix ({matrices})"),
        ));
    }
    let grouped = grouped(codes, &shape, scales, ScaleType::E4M3, GROUP)?;
    Ok(Encoding {
        format: Format::Nvfp4,
        name: name.to_owned(),
        shape,
        code: Code::E2M1,
        codes: codes.id,
        scales: Some(grouped),
        global: Some(Global { tensor: global.id, divides, each: count != 1 }),
        riders: codes.riders(),
    })
}
