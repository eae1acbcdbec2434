//! INT4 as compressed-tensors packs it: eight codes an I32, groups within a row, symmetric.

use super::blocks::group;
use super::description::{Blocks, Encoding, Format, Scales};
use super::parts::Codes;
use crate::Result;
use crate::code::{Code, ScaleType};

/// Codes of one word.
const PER_WORD: usize = 8;
/// Numbers that share a scale, mostly.
const USUAL: usize = 32;

/// `X.weight_packed` I32 [N, K/8], `X.weight_scale` [N, K/group], often `X.weight_shape`.
///
/// With a zero point, or with columns in another order, it is another format, and not claimed.
pub(super) fn packed(codes: &Codes<'_>) -> Result<Option<Encoding>> {
    let name = codes.logical_name();
    if ["zero_point", "g_idx"].iter().any(|end| codes.part(&format!("{name}_{end}")).is_some()) {
        return Ok(None);
    }
    let scales = codes.needed(&format!("{name}_scale"))?;
    let scale_type = match scales.scale_type() {
        Some(kind @ (ScaleType::F32 | ScaleType::BF16 | ScaleType::F16)) => kind,
        _ => return Err(codes.misfit(&scales, &"dtype BF16, F16 or F32")),
    };
    let shape = codes.unpacked(PER_WORD)?;
    let (&columns, leading) = shape.split_last().unwrap_or((&1, &[]));
    let fitting = match scales.shape.split_last() {
        Some((&across, rows)) if rows == leading => {
            group(columns, across, USUAL).map(|group| (across, group))
        }
        _ => None,
    };
    let Some((across, group)) = fitting else {
        return Err(codes.misfit(
            &scales,
            &format_args!(
                "shape {leading:?} and a number of groups that divides {columns} columns"
            ),
        ));
    };
    let down = leading.last().copied().unwrap_or(1);
    let blocks = Blocks { rows: 1, columns: group };
    let scales = Scales { tensor: scales.id, scale_type, blocks, grid: [down, across] };
    Ok(Some(Encoding {
        format: Format::Int4,
        name: name.to_owned(),
        shape,
        code: Code::Int4,
        codes: codes.id,
        scales: Some(scales),
        global: None,
        riders: codes.riders(),
    }))
}
