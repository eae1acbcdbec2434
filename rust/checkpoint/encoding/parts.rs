//! The tensors around the codes of a quantised one, and what is said where they do not fit.

use super::description::Encoding;
use crate::checkpoint::header::TensorEntry;
use crate::checkpoint::stored::{Shard, Stored, TensorId};
use crate::code::ScaleType;
use crate::error::printable;
use crate::{Error, Result};
use safetensors::Dtype;
use std::fmt;

/// Endings of the names of tensors that only speak of a quantised one, after the name of its module.
const RIDERS: [&str; 4] =
    [".weight_shape", ".input_scale", ".activation_scale", ".input_global_scale"];
/// The same, after the name of a parameter that is no module's `weight`.
const FUSED_RIDERS: [&str; 3] = ["_input_scale", "_activation_scale", "_shape"];

/// A stored tensor that may hold codes, and its checkpoint.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a> {
    stored: &'a Stored,
    pub id: TensorId,
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    shard: &'a Shard,
}

/// A stored tensor beside one of codes.
pub(super) struct Part<'a> {
    pub id: TensorId,
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
}

impl<'a> Codes<'a> {
    pub(super) fn new(stored: &'a Stored, id: TensorId) -> Self {
        let (shard, TensorEntry { name, dtype, shape, .. }) = stored.entry(id);
        Self { stored, id, name, dtype, shape, shard }
    }

    /// Name of the module whose `weight` this is.
    pub(super) fn module(&self) -> Option<&'a str> {
        self.name.strip_suffix(".weight").or_else(|| self.name.strip_suffix(".weight_packed"))
    }

    /// The stored tensor of this name.
    pub(super) fn part(&self, name: &str) -> Option<Part<'a>> {
        let id = self.stored.id(name)?;
        let (_, TensorEntry { name, dtype, shape, .. }) = self.stored.entry(id);
        Some(Part { id, name, dtype, shape })
    }

    /// As [`Codes::part`], of what must be there.
    pub(super) fn needed(&self, name: &str) -> Result<Part<'a>> {
        self.part(name).ok_or_else(|| {
            self.unusable(&format_args!(
                "needs `{}`, which the checkpoint does not hold; download it again",
                printable(name)
            ))
        })
    }

    /// The name that the tensor has where it is not quantised, by the endings that replace those of the plain name.
    pub(super) fn logical_name(&self) -> &'a str {
        logical_name(self.name, self.dtype)
    }

    /// Tensors that only speak of this one.
    pub(super) fn riders(&self) -> Vec<TensorId> {
        let find = |stem: &str, endings: &[&str]| {
            endings.iter().filter_map(|end| self.stored.id(&format!("{stem}{end}"))).collect()
        };
        match self.module() {
            Some(module) => find(module, &RIDERS),
            None => find(self.logical_name(), &FUSED_RIDERS),
        }
    }

    /// The shape where a last dimension of bytes or words is one of `per` times as many numbers.
    pub(super) fn unpacked(&self, per: usize) -> Result<Vec<usize>> {
        self.checked(self.shape.to_vec(), per)
    }

    /// The shape with `per` times as many columns, none of whose products overflows.
    pub(super) fn checked(&self, mut shape: Vec<usize>, per: usize) -> Result<Vec<usize>> {
        let last = shape.last_mut().ok_or_else(|| {
            self.unusable(
                &"should have two dimensions, and has none; download the checkpoint again",
            )
        })?;
        *last = last.checked_mul(per).ok_or_else(|| self.too_large())?;
        match shape.iter().try_fold(1_usize, |product, &side| product.checked_mul(side)) {
            Some(_) => Ok(shape),
            None => Err(self.too_large()),
        }
    }

    fn too_large(&self) -> Error {
        self.unusable(&"has more numbers than this machine can count; download it again")
    }

    /// The error of this tensor: `problem` goes on where its name has been said.
    pub(super) fn unusable(&self, problem: &dyn fmt::Display) -> Error {
        let Self { name, dtype, shape, .. } = self;
        let text = format!("its tensor `{}` ({dtype} {shape:?}) {problem}", printable(name));
        Error::unusable(&self.shard.path, text)
    }

    /// The error that scales do not fit.
    pub(super) fn misfit(&self, scales: &Part<'_>, expected: &dyn fmt::Display) -> Error {
        let Part { name, dtype, shape, .. } = scales;
        self.unusable(&format_args!(
            "needs scales of {expected}, but `{}` is {dtype} {shape:?}; download the checkpoint again, or give the one \
             that it was made from",
            printable(name)
        ))
    }

    /// Checks that nothing else has the name that this tensor is to have.
    pub(super) fn check_name(&self, encoding: Encoding) -> Result<Encoding> {
        if encoding.name != self.name && self.stored.id(&encoding.name).is_some() {
            return Err(self.unusable(&format_args!(
                "stands beside a tensor `{}`, for which it stands itself; remove one of the two",
                printable(&encoding.name)
            )));
        }
        Ok(encoding)
    }
}

/// The name of a quantised tensor, from that of its codes.
pub(super) fn logical_name(name: &str, dtype: Dtype) -> &str {
    let stripped = match dtype {
        Dtype::U8 => name.strip_suffix("_blocks"),
        _ => None,
    };
    let packed = || {
        let packable = matches!(dtype, Dtype::U8 | Dtype::I32) && name.ends_with(".weight_packed");
        packable.then(|| name.strip_suffix("_packed")).flatten()
    };
    stripped.or_else(packed).unwrap_or(name)
}

/// Names of codes that a quantised tensor of this name may have, other than its own.
pub(super) fn names_of_codes(name: &str) -> impl Iterator<Item = String> {
    let packed = name.ends_with(".weight").then(|| format!("{name}_packed"));
    [Some(format!("{name}_blocks")), packed].into_iter().flatten()
}

impl Part<'_> {
    /// How scales of this dtype are stored.
    pub(super) fn scale_type(&self) -> Option<ScaleType> {
        Some(match self.dtype {
            Dtype::F32 => ScaleType::F32,
            Dtype::BF16 => ScaleType::BF16,
            Dtype::F16 => ScaleType::F16,
            // torch had no such dtype for long, so that bytes are what many files say.
            Dtype::F8_E8M0 | Dtype::U8 => ScaleType::E8M0,
            Dtype::F8_E4M3 => ScaleType::E4M3,
            _ => return None,
        })
    }

    /// Number of its elements.
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}
