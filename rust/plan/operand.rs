//! What methods read: tensors, and what adapters do to them.

use super::float_input::FloatInput;
use super::input::Input;
use std::collections::BTreeMap;

/// What a method reads: a tensor and the changes that an adapter makes to it, in the order of the fields.
#[derive(Debug)]
pub struct Operand {
    /// The tensor.
    pub tensor: FloatInput,
    /// Elements of a row: the last dimension.
    pub columns: usize,
    /// Rows that come from another tensor.
    pub rows: Option<Rows>,
    /// Products that are added.
    pub low_rank: Vec<LowRank>,
    /// Norms that the sum gets.
    pub magnitude: Option<Magnitude>,
}

/// Replaced rows.
#[derive(Debug)]
pub struct Rows {
    /// One row for each replaced one.
    pub tensor: FloatInput,
    /// Row of the operand to row of the tensor.
    pub places: BTreeMap<usize, usize>,
}

/// `scale·left·right`, shapes (rows, rank) and (rank, columns) of the stored matrix.
#[derive(Debug)]
pub struct LowRank {
    /// `A`, shape (rank, in).
    pub a: FloatInput,
    /// `B`, shape (out, rank).
    pub b: FloatInput,
    /// Columns of `B`.
    pub rank: usize,
    /// Factor of the product.
    pub scale: f32,
    /// Whether the stored matrix is (in, out).
    pub transpose: bool,
}

impl LowRank {
    /// The factor that has a row for each row of the stored matrix, or is the transpose of one that has.
    #[must_use]
    pub fn left(&self) -> &FloatInput {
        if self.transpose { &self.a } else { &self.b }
    }

    /// The other factor.
    #[must_use]
    pub fn right(&self) -> &FloatInput {
        if self.transpose { &self.b } else { &self.a }
    }
}

/// DoRA's magnitudes.
#[derive(Debug)]
pub struct Magnitude {
    /// One element for each output feature.
    pub tensor: FloatInput,
    /// Whether the output features are the columns of the stored matrix.
    pub transpose: bool,
}

impl Operand {
    /// A tensor as it is.
    #[must_use]
    pub fn plain(tensor: FloatInput) -> Self {
        Self {
            columns: tensor.shape.last().copied().unwrap_or(1),
            tensor,
            rows: None,
            low_rank: Vec::new(),
            magnitude: None,
        }
    }

    /// Whether it is a tensor as it is stored.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.rows.is_none() && self.low_rank.is_empty() && self.magnitude.is_none()
    }

    /// All that is read for it.
    pub fn parts(&self) -> impl Iterator<Item = &FloatInput> {
        let factors = self.low_rank.iter().flat_map(|term| [&term.a, &term.b]);
        [&self.tensor]
            .into_iter()
            .chain(self.rows.iter().map(|rows| &rows.tensor))
            .chain(factors)
            .chain(self.magnitude.iter().map(|magnitude| &magnitude.tensor))
    }

    /// All the tensors that are read, and how many bytes of each.
    pub(super) fn reads(&self) -> impl Iterator<Item = (&Input, usize)> {
        self.parts().flat_map(FloatInput::reads)
    }
}
