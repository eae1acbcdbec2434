//! Which format claims a tensor.

use super::description::Encoding;
use super::parts::Codes;
use super::{fp8, int4, mxfp4, nvfp4};
use crate::Result;
use safetensors::Dtype;

/// Whether tensors of this dtype may hold codes. Most checkpoints have none.
pub(super) fn may_hold_codes(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::U8 | Dtype::I8 | Dtype::I32)
}

/// The encoding of a tensor of codes whose scales are there; `None` if no format claims it.
pub(super) fn with_scales(codes: &Codes<'_>) -> Result<Option<Encoding>> {
    let found = match codes.dtype {
        Dtype::U8 if codes.name.ends_with("_blocks") => mxfp4::in_blocks(codes)?,
        Dtype::I32 if codes.name.ends_with(".weight_packed") => int4::packed(codes)?,
        Dtype::U8 => fp4(codes)?,
        Dtype::I8 => deepseek_fp4(codes)?,
        _ => fp8::scaled(codes)?,
    };
    found.map(|encoding| codes.check_name(encoding)).transpose()
}

/// Bytes of two 4-bit floats: the scales tell which format it is.
fn fp4(codes: &Codes<'_>) -> Result<Option<Encoding>> {
    let Some(scales) = codes.part(&format!("{}_scale", codes.logical_name())) else {
        return Ok(None);
    };
    if scales.dtype == Dtype::F8_E4M3 {
        return nvfp4::packed(codes, &scales).map(Some);
    }
    mxfp4::is_power(&scales).then(|| mxfp4::packed(codes, &scales)).transpose()
}

/// DeepSeek-V4's experts: signed bytes of two 4-bit floats, with `scale` in place of `weight`.
fn deepseek_fp4(codes: &Codes<'_>) -> Result<Option<Encoding>> {
    let scales = codes.module().and_then(|module| codes.part(&format!("{module}.scale")));
    let scales = scales.filter(mxfp4::is_power);
    scales.map(|scales| mxfp4::packed(codes, &scales)).transpose()
}
