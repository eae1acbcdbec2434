//! MXFP4: gpt-oss's blocks, DeepSeek-V4's bytes, compressed-tensors' packed weights.

use super::description::{Encoding, Format};
use super::fp4::grouped;
use super::parts::{Codes, Part};
use crate::Result;
use crate::code::{Code, ScaleType};
use safetensors::Dtype;

/// Numbers that share a scale.
const GROUP: usize = 32;
/// Bytes of such a group.
const GROUP_BYTES: usize = GROUP / 2;

/// gpt-oss: `X_blocks` U8 [.., K/32, 16], `X_scales` U8 [.., K/32].
pub(super) fn in_blocks(codes: &Codes<'_>) -> Result<Option<Encoding>> {
    let name = codes.logical_name();
    let Some(scales) = codes.part(&format!("{name}_scales")) else { return Ok(None) };
    if scales.scale_type() != Some(ScaleType::E8M0) {
        return Err(codes.misfit(&scales, &"dtype U8"));
    }
    let [leading @ .., groups, GROUP_BYTES] = codes.shape else {
        return Err(codes.unusable(&format_args!(
            "is in MXFP4 blocks and should have {GROUP_BYTES} as its last of at least two dimensions; download the \
             checkpoint again"
        )));
    };
    // The last two dimensions are one: numbers of a row.
    let shape = codes.checked([leading, &[*groups]].concat(), GROUP)?;
    found(codes, name, shape, &scales).map(Some)
}

/// The others: [N, K/2] with one scale for 32 numbers.
pub(super) fn packed(codes: &Codes<'_>, scales: &Part<'_>) -> Result<Encoding> {
    found(codes, codes.logical_name(), codes.unpacked(2)?, scales)
}

fn found(codes: &Codes<'_>, name: &str, shape: Vec<usize>, scales: &Part<'_>) -> Result<Encoding> {
    let grouped = grouped(codes, &shape, scales, ScaleType::E8M0, GROUP)?;
    Ok(Encoding {
        format: Format::Mxfp4,
        name: name.to_owned(),
        shape,
        code: Code::E2M1,
        codes: codes.id,
        scales: Some(grouped),
        global: None,
        riders: codes.riders(),
    })
}

/// Whether scales of this dtype are powers of two.
pub(super) fn is_power(scales: &Part<'_>) -> bool {
    matches!(scales.dtype, Dtype::F8_E8M0 | Dtype::U8)
}
