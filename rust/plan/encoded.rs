//! Quantised tensors as operands, and as what an output tensor is stored as.

use super::inputs::{Assembly, Input};
use super::schema::EncodedPart;
use crate::Result;
use crate::checkpoint::{Checkpoint, Encoding};
use crate::code::GlobalScale;
use crate::kernels::Band;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// How the elements of a quantised tensor are stored, and where their scales are.
#[derive(Debug)]
pub struct Encoded {
    checkpoint: Arc<Checkpoint>,
    /// What is known without reading.
    pub encoding: Encoding,
    /// What is decoded and encoded as one.
    pub band: Band,
    /// The scales, if it has any.
    pub scales: Option<Input>,
    /// The global scale of each matrix, as soon as it was asked for.
    globals: Vec<OnceLock<Option<GlobalScale>>>,
}

impl Encoded {
    /// The parts of an encoded tensor of the checkpoint that is called `source`.
    ///
    /// # Errors
    /// If a shape that is stored beside it contradicts those of its parts.
    pub(super) fn new(
        checkpoint: &Arc<Checkpoint>,
        source: &Arc<str>,
        encoding: Encoding,
    ) -> Result<Self> {
        checkpoint.check_encoding(&encoding)?;
        let scales =
            encoding.scales.as_ref().map(|scales| Input::at(checkpoint, source, scales.tensor));
        let globals = encoding.global.map_or(0, |_| encoding.matrices());
        Ok(Self {
            checkpoint: Arc::clone(checkpoint),
            band: Band::of(&encoding),
            scales,
            globals: (0..globals).map(|_| OnceLock::new()).collect(),
            encoding,
        })
    }

    /// The global scale of a matrix, if it has one.
    ///
    /// # Errors
    /// Those of [`Checkpoint::global_scale`].
    pub fn global(&self, matrix: usize) -> Result<Option<GlobalScale>> {
        let Some(place) = self.globals.get(matrix) else { return Ok(None) };
        if let Some(known) = place.get() {
            return Ok(*known);
        }
        let found = self.checkpoint.global_scale(&self.encoding, matrix)?;
        Ok(*place.get_or_init(|| found))
    }

    /// Matrix and row within it of a row, counted over all matrices.
    #[must_use]
    pub fn matrix_and_row(&self, row: usize) -> (usize, usize) {
        let rows = self.encoding.rows().max(1);
        (row / rows, row % rows)
    }

    /// Bytes of the scales that elements need.
    #[must_use]
    pub fn scale_bounds(&self, elements: &Range<usize>) -> Range<usize> {
        let columns = self.encoding.columns();
        if elements.is_empty() || columns == 0 {
            return 0..0;
        }
        let of = |element: usize| {
            let (matrix, row) = self.matrix_and_row(element / columns);
            self.encoding.scale_range(matrix, row)
        };
        of(elements.start).start..of(elements.end - 1).end
    }
}

/// What an output tensor is stored as: a part of a quantised one, which is encoded as an input is.
#[derive(Debug)]
pub struct EncodedTarget {
    /// The input that it is encoded like; its global scale is kept.
    pub like: Encoded,
    /// What the input is called: source, and its name there.
    pub name: (Arc<str>, String),
    /// Its codes; an element that is not changed is stored as it is there.
    pub codes: Input,
    /// Which part.
    pub part: EncodedPart,
}

/// Rows that share their scales.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedRows {
    /// Number of the band, over all matrices.
    pub band: usize,
    /// The matrix that they belong to.
    pub matrix: usize,
    /// Those rows, counted over all matrices.
    pub rows: Range<usize>,
}

impl EncodedTarget {
    /// Number of bands of a matrix.
    fn bands(&self) -> usize {
        self.like.encoding.rows().div_ceil(self.like.band.rows)
    }

    /// The band with this number.
    #[must_use]
    pub fn band(&self, band: usize) -> EncodedRows {
        let (rows, step) = (self.like.encoding.rows(), self.like.band.rows);
        let (matrix, place) = (band / self.bands(), band % self.bands());
        let first = matrix * rows + place * step;
        EncodedRows { band, matrix, rows: first..(first + step).min((matrix + 1) * rows) }
    }

    /// The bands that bytes of the output tensor are of.
    #[must_use]
    pub fn bands_of(&self, bytes: &Range<usize>) -> Range<usize> {
        let band = &self.like.band;
        match self.part {
            EncodedPart::Codes => {
                let width = band.row_bytes();
                let of = |row: usize| {
                    let (matrix, row) = self.like.matrix_and_row(row);
                    matrix * self.bands() + row / band.rows
                };
                of(bytes.start / width)..of((bytes.end - 1) / width) + 1
            }
            EncodedPart::Scales => {
                let width = band.scale_bytes();
                bytes.start / width..bytes.end.div_ceil(width)
            }
        }
    }

    /// The elements that bytes of the output tensor depend on.
    #[must_use]
    pub fn elements_of(&self, bytes: &Range<usize>) -> Range<usize> {
        if bytes.is_empty() {
            return 0..0;
        }
        let bands = self.bands_of(bytes);
        let columns = self.like.encoding.columns();
        self.band(bands.start).rows.start * columns..self.band(bands.end - 1).rows.end * columns
    }

    /// Number of bands of all matrices.
    #[must_use]
    pub fn all_bands(&self) -> usize {
        self.like.encoding.matrices() * self.bands()
    }

    /// The rows of a band that these bytes of the codes are of.
    #[must_use]
    pub fn rows_of(&self, bytes: &Range<usize>, band: &EncodedRows) -> Range<usize> {
        let width = self.like.band.row_bytes();
        let first = (bytes.start / width).max(band.rows.start);
        first..bytes.end.div_ceil(width).min(band.rows.end)
    }

    /// Whether nothing changes the numbers of a band, so that its bytes may stay.
    #[must_use]
    pub fn keeps(&self, assembly: &Assembly, band: &EncodedRows) -> bool {
        let columns = self.like.encoding.columns();
        let elements = band.rows.start * columns..band.rows.end * columns;
        let kept = assembly.pieces.iter().filter(|piece| piece.kept);
        kept.map(|piece| piece.region.within(&elements).len()).sum::<usize>() == elements.len()
    }
}

/// How far a requantised tensor was to change, and how far it did: sums of squares over its elements.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// `‖W′ - W‖²`: the numbers that were computed, less those that stood there.
    pub wanted: f64,
    /// `‖Q(W′) - W‖²`: what is stored now, less what stood there.
    pub stored: f64,
}

impl Change {
    /// Adds that of further elements.
    pub fn add(&mut self, other: Self) {
        self.wanted += other.wanted;
        self.stored += other.stored;
    }
}

/// Changes by the name of the tensor in the input that it is encoded like.
pub type Changes = BTreeMap<String, Change>;
