//! What is known of a quantised tensor without reading its bytes.

use crate::checkpoint::stored::TensorId;
use crate::code::{Code, ScaleType};
use std::fmt;
use std::ops::Range;

/// A format of quantised tensors. `Display` gives the words for reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 8-bit floats that are the numbers themselves.
    Fp8,
    /// 8-bit floats, one scale for a block of a matrix.
    BlockFp8(Blocks),
    /// 8-bit floats, one scale a row.
    ChannelFp8,
    /// 8-bit floats, one scale for a matrix.
    TensorFp8,
    /// 8-bit floats in groups of 32 whose scale is a power of two.
    Mxfp8,
    /// 4-bit floats in groups of 32 whose scale is a power of two.
    Mxfp4,
    /// 4-bit integers in groups, as compressed-tensors packs them.
    Int4,
    /// 4-bit floats in groups of 16 with an 8-bit scale, and one for the matrix.
    Nvfp4,
}

impl fmt::Display for Format {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fp8 => out.write_str("FP8 without scales"),
            Self::BlockFp8(blocks) => {
                write!(out, "FP8 in blocks of {} x {}", blocks.rows, blocks.columns)
            }
            Self::ChannelFp8 => out.write_str("FP8 with a scale a row"),
            Self::TensorFp8 => out.write_str("FP8 with a scale a matrix"),
            Self::Mxfp8 => out.write_str("MXFP8"),
            Self::Mxfp4 => out.write_str("MXFP4"),
            Self::Int4 => out.write_str("INT4 (pack-quantized)"),
            Self::Nvfp4 => out.write_str("NVFP4"),
        }
    }
}

/// One scale serves so many rows and columns of the matrix of the last two dimensions; the last ones may be fewer.
/// Each matrix that leading dimensions count has scales of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Rows of a block, at least one.
    pub rows: usize,
    /// Columns of a block, at least one.
    pub columns: usize,
}

/// The scales of a quantised tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scales {
    /// Where they are stored, matrix after matrix, row after row.
    pub tensor: TensorId,
    /// How one is stored.
    pub scale_type: ScaleType,
    /// What one serves.
    pub blocks: Blocks,
    /// How many a matrix has: down, across.
    pub grid: [usize; 2],
}

/// The scale that a tensor's scales have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Global {
    /// Where it is stored, as F32.
    pub tensor: TensorId,
    /// Whether scales are divided by it, and not multiplied.
    pub divides: bool,
    /// Whether each matrix has one, and not the tensor.
    pub each: bool,
}

/// How a quantised tensor is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// Its format.
    pub format: Format,
    /// The name that it has where it is not quantised.
    pub name: String,
    /// The shape that it has where it is not quantised.
    pub shape: Vec<usize>,
    /// How one number is stored.
    pub code: Code,
    /// Where the numbers are stored, row after row.
    pub codes: TensorId,
    /// What they are multiplied by, if by anything.
    pub scales: Option<Scales>,
    /// What scales are multiplied or divided by.
    pub global: Option<Global>,
    /// Tensors beside it that only speak of it: its shape, scales of activations. They are copied with it.
    pub riders: Vec<TensorId>,
}

/// Number of matrices of a shape. In this order no product is larger than one that was checked.
pub(super) fn leading(shape: &[usize]) -> usize {
    shape[..shape.len().saturating_sub(2)].iter().product()
}

impl Encoding {
    /// Columns of its matrices; of a vector all its elements.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows of its matrices; one of a vector.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().nth(1).copied().unwrap_or(1)
    }

    /// How many matrices there are.
    #[must_use]
    pub fn matrices(&self) -> usize {
        leading(&self.shape)
    }

    /// Number of its elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        // Found from a header, which was checked: this does not overflow.
        self.shape.iter().product()
    }

    /// Bytes within the tensor of codes that hold these elements, in flat order. Where codes have four bits, the first
    /// and the last byte may hold one more.
    #[must_use]
    pub fn code_range(&self, elements: Range<usize>) -> Range<usize> {
        elements.start / self.code.per_byte()..self.code.bytes(elements.end)
    }

    /// Bytes within the tensor of scales that hold those of one row of one matrix; empty without scales.
    #[must_use]
    pub fn scale_range(&self, matrix: usize, row: usize) -> Range<usize> {
        self.scales.as_ref().map_or(0..0, |scales| {
            let [down, across] = scales.grid;
            let first = (matrix * down + row / scales.blocks.rows) * across;
            let size = scales.scale_type.size();
            first * size..(first + across) * size
        })
    }

    /// All stored tensors that it is made of: codes, scales, the global scale, riders.
    pub fn stored(&self) -> impl Iterator<Item = TensorId> {
        let scales = self.scales.as_ref().map(|scales| scales.tensor);
        let global = self.global.as_ref().map(|global| global.tensor);
        [self.codes].into_iter().chain(scales).chain(global).chain(self.riders.iter().copied())
    }
}
