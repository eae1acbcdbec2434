//! What a computed tensor is stored as, if not as numbers: a part of a quantised one, encoded like an input.

use super::encoded::Encoded;
use super::input::Input;
use super::schema::EncodedPart;
use std::ops::Range;
use std::sync::Arc;

/// Rows from which on a tensor has so many that some stand for all.
const MANY_ROWS: usize = 512;
/// Every how many of them.
const COMPARED_ROWS: usize = 16;

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

    /// Whether it is looked at how far this row changes: every sixteenth one of a tensor that has many.
    #[must_use]
    pub fn compares(&self, row: usize) -> bool {
        let rows = self.like.encoding.matrices() * self.like.encoding.rows();
        rows < MANY_ROWS || row.is_multiple_of(COMPARED_ROWS)
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
}
