//! Differences of stored matrices, block by block, with their squares: what an analysis reads of two models.

use crate::checkpoint::{Checkpoint, MappedFile};
use crate::dtype::Float;
use crate::kernels::Kernels;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Elements that are read, subtracted and squared while they are in the first-level cache.
const TILE: usize = 1024;

/// A 2-D tensor of floats as it lies in its mapped file. It keeps the mapping alive.
#[derive(Debug, Clone)]
pub struct StoredMatrix {
    name: String,
    file: Arc<MappedFile>,
    /// Its bytes in the file: rows · columns · dtype.size() of them, at any alignment.
    range: Range<usize>,
    dtype: Float,
    rows: usize,
    columns: usize,
}

impl StoredMatrix {
    /// Finds a matrix and maps its file; reads nothing of it.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Option`] if it is not 2-D or its dtype is not a [`Float`]; and those of
    /// [`crate::checkpoint::Shard::mapped`].
    pub fn open(checkpoint: &Checkpoint, name: &str) -> Result<Self> {
        let (shard, entry) = checkpoint.get(name)?;
        let (&[rows, columns], Some(dtype)) = (entry.shape, Float::from_safetensors(entry.dtype))
        else {
            return Err(Error::Option(format!(
                "tensor `{name}` ({}, shape {:?}) is not a matrix of floats",
                entry.dtype, entry.shape
            )));
        };
        Ok(Self {
            name: name.to_owned(),
            file: Arc::clone(shard.mapped()?),
            range: entry.range.clone(),
            dtype,
            rows,
            columns,
        })
    }

    /// The stored shape, (rows, columns).
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// The bytes of elements that are counted row by row.
    fn bytes(&self, elements: Range<usize>) -> &[u8] {
        let size = self.dtype.size();
        &self.file.bytes()[self.range.clone()][elements.start * size..elements.end * size]
    }
}

/// Sums of squares over one block, in f64; NaN or infinite if a value is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Squares {
    /// Of minuend - subtrahend.
    pub difference: f64,
    /// Of the minuend; 0 if it was not asked for.
    pub minuend: f64,
}

/// Two matrices of one shape, of which blocks of the first minus the second are read.
#[derive(Debug, Clone, Copy)]
pub struct Difference<'a> {
    minuend: &'a StoredMatrix,
    subtrahend: &'a StoredMatrix,
}

impl<'a> Difference<'a> {
    /// minuend - subtrahend.
    ///
    /// # Errors
    /// [`Error::Option`] if they differ in shape.
    pub fn new(minuend: &'a StoredMatrix, subtrahend: &'a StoredMatrix) -> Result<Self> {
        if minuend.shape() != subtrahend.shape() {
            return Err(Error::Option(format!(
                "tensors `{}` and `{}` have the shapes {:?} and {:?}; their difference needs one shape",
                minuend.name,
                subtrahend.name,
                minuend.shape(),
                subtrahend.shape()
            )));
        }
        Ok(Self { minuend, subtrahend })
    }

    /// Reads a block as f32, row after row, into the beginning of `out`. Both values are brought to f32 first; their
    /// difference is rounded once.
    ///
    /// # Errors
    /// [`Error::Option`] if the block is not within the matrices or `out` is too small for it.
    pub fn read(
        &self,
        kernels: &Kernels,
        rows: Range<usize>,
        columns: Range<usize>,
        minuend_squares: bool,
        out: &mut [f32],
    ) -> Result<Squares> {
        let shape = self.minuend.shape();
        for (what, span, extent) in [("rows", &rows, shape.0), ("columns", &columns, shape.1)] {
            if span.start > span.end || span.end > extent {
                return Err(Error::Option(format!(
                    "{what} {} to {} of tensor `{}` were asked for, it has {extent}",
                    span.start, span.end, self.minuend.name
                )));
            }
        }
        // Within a matrix that is mapped, so that no product below overflows.
        let elements = rows.len() * columns.len();
        let room = out.len();
        let out = out.get_mut(..elements).ok_or_else(|| {
            Error::Option(format!("a block of {elements} elements does not fit into {room}"))
        })?;
        if elements == 0 {
            return Ok(Squares::default());
        }
        // Whole rows are one long one.
        let (first, width) = if columns.len() == shape.1 {
            (rows.start * shape.1, elements)
        } else {
            (rows.start * shape.1 + columns.start, columns.len())
        };
        let mut squares = Squares::default();
        for (number, row) in out.chunks_exact_mut(width).enumerate() {
            self.read_row(kernels, first + number * shape.1, minuend_squares, row, &mut squares);
        }
        Ok(squares)
    }

    /// Reads adjacent elements, from the one with this number on.
    fn read_row(
        &self,
        kernels: &Kernels,
        first: usize,
        minuend_squares: bool,
        out: &mut [f32],
        squares: &mut Squares,
    ) {
        let mut scratch = [0.0_f32; TILE];
        let mut start = first;
        for tile in out.chunks_mut(TILE) {
            let elements = start..start + tile.len();
            start = elements.end;
            kernels.load(self.minuend.dtype, self.minuend.bytes(elements.clone()), tile);
            if minuend_squares {
                squares.minuend += kernels.dot(tile, tile);
            }
            let scratch = &mut scratch[..tile.len()];
            kernels.load(self.subtrahend.dtype, self.subtrahend.bytes(elements), scratch);
            // The product with -1 is exact.
            kernels.multiply_add(tile, scratch, -1.0);
            squares.difference += kernels.dot(tile, tile);
        }
    }
}
