//! 8-bit floats: in blocks, a scale a row, one scale, MXFP8, or none.

use super::blocks::{self, group};
use super::description::{Blocks, Encoding, Format, Scales};
use super::fp4::is_swizzled;
use super::parts::{Codes, Part};
use crate::Result;
use crate::code::{Code, ScaleType};
use crate::error::printable;
use safetensors::Dtype;

/// Numbers that share a scale in MXFP8.
const MX_GROUP: usize = 32;

/// Names that the scales of a tensor may have.
fn scale_names(codes: &Codes<'_>) -> impl Iterator<Item = String> {
    let name = codes.name;
    // DeepSeek-V4's ending stands in place of `weight`.
    let bare = codes.module().map(|module| format!("{module}.scale"));
    [Some(format!("{name}_scale_inv")), Some(format!("{name}_scale")), bare].into_iter().flatten()
}

fn code_of(dtype: Dtype) -> Option<Code> {
    match dtype {
        Dtype::F8_E4M3 => Some(Code::E4M3),
        Dtype::F8_E5M2 => Some(Code::E5M2),
        _ => None,
    }
}

/// A tensor whose scales are there.
pub(super) fn scaled(codes: &Codes<'_>) -> Result<Option<Encoding>> {
    let Some(code) = code_of(codes.dtype) else { return Ok(None) };
    let mut found = scale_names(codes).filter_map(|name| codes.part(&name));
    let Some(scales) = found.next() else { return Ok(None) };
    if let Some(second) = found.next() {
        return Err(codes.unusable(&format_args!(
            "has two tensors of scales, `{}` and `{}`, and nothing says which counts; remove one",
            printable(scales.name),
            printable(second.name)
        )));
    }
    if codes.part(&format!("{}_zero_point", codes.name)).is_some() {
        return Ok(None);
    }
    let scale_type = match scales.scale_type() {
        Some(ScaleType::E4M3) | None => {
            return Err(codes.misfit(&scales, &"dtype F32, BF16, F16, F8_E8M0 or U8"));
        }
        Some(scale_type) => scale_type,
    };
    let Some((format, blocks, grid)) = geometry(codes, &scales, scale_type) else {
        return Err(misfit(codes, &scales));
    };
    let scales = Scales { tensor: scales.id, scale_type, blocks, grid };
    Ok(Some(described(codes, code, format, Some(scales))))
}

/// A tensor without scales, in a checkpoint where nothing has any.
pub(super) fn plain(codes: &Codes<'_>) -> Option<Encoding> {
    // Scales that are left without what they scale are no numbers by themselves.
    let alone = ["_scale", "_scale_inv", ".scale", "_scales"];
    let code = code_of(codes.dtype).filter(|_| !alone.iter().any(|end| codes.name.ends_with(end)));
    code.map(|code| described(codes, code, Format::Fp8, None))
}

/// The error of a tensor without scales, in a checkpoint where others have some of this name.
pub(super) fn missing(codes: &Codes<'_>, example: &str) -> crate::Error {
    let name = codes.name;
    let expected = match codes.module() {
        Some(module) if example.ends_with(".scale") => format!("{module}.scale"),
        _ if example.ends_with("_scale_inv") => format!("{name}_scale_inv"),
        _ => format!("{name}_scale"),
    };
    codes.unusable(&format_args!(
        "has no scales though others have (`{}`): `{}` is expected; download the checkpoint again",
        printable(example),
        printable(&expected)
    ))
}

fn described(codes: &Codes<'_>, code: Code, format: Format, scales: Option<Scales>) -> Encoding {
    Encoding {
        format,
        name: codes.name.to_owned(),
        shape: codes.shape.to_vec(),
        code,
        codes: codes.id,
        scales,
        global: None,
        riders: codes.riders(),
    }
}

/// What scales of this shape serve: format, blocks and grid.
fn geometry(
    codes: &Codes<'_>,
    scales: &Part<'_>,
    scale_type: ScaleType,
) -> Option<(Format, Blocks, [usize; 2])> {
    let matrix = codes.shape.len().min(2);
    let (leading, sides) = codes.shape.split_at(codes.shape.len() - matrix);
    let (rows, columns) = match *sides {
        [] => (1, 1),
        [columns] => (1, columns),
        [rows, columns, ..] => (rows, columns),
    };
    let whole = (Format::TensorFp8, Blocks { rows: rows.max(1), columns: columns.max(1) }, [1, 1]);
    let matrices: usize = leading.iter().product();
    if scales.elements() == 1 && matrices == 1 && scales.shape.len() != sides.len() {
        return Some(whole);
    }
    let across_rows = |down: usize| {
        let blocks = Blocks { rows: 1, columns: columns.max(1) };
        (down == rows).then_some((Format::ChannelFp8, blocks, [rows, 1]))
    };
    match *scales.shape.strip_prefix(leading)? {
        [] | [1] => Some(whole),
        [down] if sides.len() == 2 => across_rows(down),
        // A grid as ModelOpt writes it has a dimension of one after each.
        [down, across] | [down, 1, across, 1] if sides.len() == 2 => {
            if down == rows && across == 1 && (rows > 1 || columns > 128) {
                return across_rows(down);
            }
            let powers = scale_type == ScaleType::E8M0;
            if powers && down == rows && group(columns, across, MX_GROUP)? == MX_GROUP {
                let blocks = Blocks { rows: 1, columns: MX_GROUP };
                return Some((Format::Mxfp8, blocks, [down, across]));
            }
            let blocks = blocks::blocks([rows, columns], [down, across])?;
            let one = [down, across] == [1, 1] && (rows > 128 || columns > 128);
            let format = if one { Format::TensorFp8 } else { Format::BlockFp8(blocks) };
            Some((format, blocks, [down, across]))
        }
        _ => None,
    }
}

/// The error of scales of another shape.
fn misfit(codes: &Codes<'_>, scales: &Part<'_>) -> crate::Error {
    let [leading @ .., rows, columns] = codes.shape else {
        return codes.misfit(scales, &"one number");
    };
    let mut grouped = codes.shape.to_vec();
    if let Some(last) = grouped.last_mut() {
        *last = last.div_ceil(MX_GROUP);
    }
    if scales.scale_type() == Some(ScaleType::E8M0) && is_swizzled(codes.shape, scales, &grouped) {
        return codes.unusable(&format_args!(
            "has scales `{}` of shape {:?} that are padded or swizzled for a kernel, where {grouped:?} are expected; \
             export the checkpoint with plain scales",
            printable(scales.name),
            scales.shape
        ));
    }
    let (down, across) = (rows.div_ceil(128), columns.div_ceil(128));
    let each = if leading.is_empty() { String::new() } else { format!(" after {leading:?}") };
    codes.misfit(
        scales,
        &format_args!(
            "one number, of shape [{rows}], [{rows}, 1], or of a grid of blocks such as [{down}, {across}] (128 x 128){each}"
        ),
    )
}
