//! Matrices as an analysis reads them, block by block: tensors as they are stored, or sums of tensors that adapters
//! change, by the same arithmetic as in a merge; and differences of two, with their squares.

use crate::checkpoint::Checkpoint;
use crate::kernels::Kernels;
use crate::merge::loader::{Loading, OperandLoader, Shared};
use crate::plan::{FloatInput, GivenSources, Input, Operand, resolve_sum, schema};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Elements that are read, subtracted and squared while they are in the first-level cache.
const TILE: usize = 1024;

/// A 2-D tensor of floats: one that is stored, or the sum of weight · operand over its terms.
#[derive(Debug)]
pub struct Matrix {
    name: String,
    rows: usize,
    columns: usize,
    terms: Vec<(f32, Operand)>,
    shared: Shared,
    /// What the terms' last blocks left, for the next ones.
    reader: Mutex<Reader>,
    kernels: Kernels,
}

#[derive(Debug)]
struct Reader {
    loader: OperandLoader,
    term: Vec<f32>,
}

impl Matrix {
    /// Finds a matrix of a checkpoint; reads nothing of it.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Option`] if it is not 2-D or its dtype is not a [`Float`].
    pub fn stored(checkpoint: &Arc<Checkpoint>, name: &str) -> Result<Self> {
        let tensor = FloatInput::find(checkpoint, &"".into(), name, None).map_err(|error| {
            let stored = Input::find(checkpoint, &"".into(), name);
            stored.map_or(error, |input| not_a_matrix(&input, &input.shape))
        })?;
        Self::of(name, vec![(1.0, Operand::plain(tensor))])
    }

    /// The sum of weight · operand over terms; `name` is for messages, and the tensor of operands that name none.
    /// Nothing is read until a block is.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Plan`] if an operand is not sound; [`Error::Option`] if it is no matrix.
    pub fn sum(
        sources: &GivenSources,
        name: &str,
        terms: &[schema::WeightedOperand],
    ) -> Result<Self> {
        Self::of(name, resolve_sum(sources, name, terms)?)
    }

    fn of(name: &str, terms: Vec<(f32, Operand)>) -> Result<Self> {
        let operands: Vec<&Operand> = terms.iter().map(|(_, operand)| operand).collect();
        let Some(first) = operands.first().map(|operand| &operand.tensor) else {
            return Err(Error::Option(format!("tensor `{name}` is made of nothing")));
        };
        let &[rows, columns] = first.shape.as_slice() else {
            return Err(not_a_matrix(&first.input, &first.shape));
        };
        let kernels = Kernels::detect();
        let reader = Reader { loader: OperandLoader::new(kernels), term: Vec::new() };
        let (shared, reader) = (Shared::of(operands), Mutex::new(reader));
        Ok(Self { name: name.to_owned(), rows, columns, shared, reader, terms, kernels })
    }

    /// The shape, (rows, columns).
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// The tensor that it is, as it is stored; `None` if it is composed.
    #[must_use]
    pub fn as_stored(&self) -> Option<&Operand> {
        match self.terms.as_slice() {
            [(weight, operand)]
                if *weight == 1.0 && operand.is_plain() && operand.tensor.as_plain().is_some() =>
            {
                Some(operand)
            }
            _ => None,
        }
    }

    /// Its name, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Loads adjacent elements, counted row by row, as f32; they must lie within the matrix.
    ///
    /// # Errors
    /// Those of reading the inputs; [`Error::Interrupted`] if `stopped` says so.
    pub fn load(
        &self,
        elements: Range<usize>,
        stopped: &dyn Fn() -> bool,
        out: &mut [f32],
    ) -> Result<()> {
        if let Some(tensor) = self.as_stored().map(|operand| &operand.tensor)
            && let Some(float) = tensor.as_plain()
            && let Some(bytes) = tensor.input.mapped()?
        {
            self.kernels.load(float, &bytes[tensor.stored_bytes(&elements)], out);
            return Ok(());
        }
        self.compose(elements, stopped, out)
    }

    fn compose(
        &self,
        elements: Range<usize>,
        stopped: &dyn Fn() -> bool,
        out: &mut [f32],
    ) -> Result<()> {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let Reader { loader, term } = &mut *reader;
        for (number, (weight, operand)) in self.terms.iter().enumerate() {
            let from = Loading { number, operand, shared: &self.shared, stopped };
            if number == 0 {
                loader.load(&from, elements.clone(), out)?;
                if *weight != 1.0 {
                    out.iter_mut().for_each(|value| *value *= weight);
                }
                continue;
            }
            term.resize(out.len(), 0.0);
            loader.load(&from, elements.clone(), term)?;
            self.kernels.multiply_add(out, term, *weight);
        }
        Ok(())
    }

    /// Checks that a block lies within the matrix, and gives the beginning of `out` that it fills.
    fn place<'a>(
        &self,
        rows: &Range<usize>,
        columns: &Range<usize>,
        out: &'a mut [f32],
    ) -> Result<&'a mut [f32]> {
        let shape = self.shape();
        for (what, span, extent) in [("rows", rows, shape.0), ("columns", columns, shape.1)] {
            if span.start > span.end || span.end > extent {
                return Err(Error::Option(format!(
                    "{what} {} to {} of tensor `{}` were asked for, it has {extent}",
                    span.start, span.end, self.name
                )));
            }
        }
        // Within a matrix that lies in a file, so that no product below overflows.
        let elements = rows.len() * columns.len();
        let room = out.len();
        out.get_mut(..elements).ok_or_else(|| {
            Error::Option(format!("a block of {elements} elements does not fit into {room}"))
        })
    }

    /// Calls `work` with each run of adjacent elements of a block, and the part of `out` that it fills.
    fn runs(
        &self,
        rows: &Range<usize>,
        columns: &Range<usize>,
        out: &mut [f32],
        mut work: impl FnMut(usize, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        // Whole rows are one long one.
        let whole = columns.len() == self.columns;
        let (first, width) = if whole {
            (rows.start * self.columns, out.len())
        } else {
            (rows.start * self.columns + columns.start, columns.len())
        };
        let rows = out.chunks_exact_mut(width).enumerate();
        rows.into_iter().try_for_each(|(number, row)| work(first + number * self.columns, row))
    }

    /// Reads a block as f32, row after row, into the beginning of `out`.
    ///
    /// # Errors
    /// [`Error::Option`] if the block is not within the matrix or `out` is too small for it; [`Error::Interrupted`] if
    /// `stopped` says so; and those of reading the inputs.
    pub fn read(
        &self,
        rows: &Range<usize>,
        columns: &Range<usize>,
        stopped: &dyn Fn() -> bool,
        out: &mut [f32],
    ) -> Result<()> {
        let out = self.place(rows, columns, out)?;
        self.runs(rows, columns, out, |first, row| {
            let mut start = first;
            for tile in row.chunks_mut(TILE) {
                let elements = start..start + tile.len();
                start = elements.end;
                self.load(elements, stopped, tile)?;
            }
            Ok(())
        })
    }

    /// Whether no number is NaN or infinite, as f32.
    ///
    /// # Errors
    /// Those of [`Matrix::load`].
    pub fn is_finite(&self, stopped: &dyn Fn() -> bool) -> Result<bool> {
        self.every_run(stopped, |elements, tile| {
            self.load(elements, stopped, tile)?;
            Ok(tile.iter().all(|value| value.is_finite()))
        })
    }

    /// Whether another matrix of the same shape holds equal numbers, as f32; reads on only as long as it does.
    ///
    /// # Errors
    /// Those of [`Matrix::load`].
    pub fn equals(&self, other: &Self, stopped: &dyn Fn() -> bool) -> Result<bool> {
        if self.shape() != other.shape() {
            return Ok(false);
        }
        let mut theirs = [0.0_f32; TILE];
        self.every_run(stopped, |elements, tile| {
            let theirs = &mut theirs[..tile.len()];
            self.load(elements.clone(), stopped, tile)?;
            other.load(elements, stopped, theirs)?;
            Ok(tile == theirs)
        })
    }

    /// Whether all runs of elements are as `holds` says; it is given room for them.
    fn every_run(
        &self,
        stopped: &dyn Fn() -> bool,
        mut holds: impl FnMut(Range<usize>, &mut [f32]) -> Result<bool>,
    ) -> Result<bool> {
        let mut tile = [0.0_f32; TILE];
        let total = self.rows * self.columns;
        for start in (0..total).step_by(TILE) {
            if start % (TILE * TILE) == 0 && stopped() {
                return Err(Error::Interrupted);
            }
            let elements = start..total.min(start + TILE);
            let tile = &mut tile[..elements.len()];
            if !holds(elements, tile)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives back what is not needed any more once these elements have been read, in ascending order.
    pub fn done(&self, elements: &Range<usize>) {
        let tensors = self.terms.iter().map(|(_, operand)| &operand.tensor);
        for (input, bytes) in tensors.flat_map(|tensor| tensor.done(elements)) {
            input.release(&bytes);
        }
    }

    /// Gives the pages of its inputs back.
    pub fn release(&self) {
        for part in self.terms.iter().flat_map(|(_, operand)| operand.parts()) {
            part.release(&(0..part.len()));
        }
    }
}

fn not_a_matrix(input: &Input, shape: &[usize]) -> Error {
    Error::Option(format!(
        "tensor `{}` ({}, shape {shape:?}) is not a matrix of floats",
        input.tensor, input.dtype
    ))
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
    minuend: &'a Matrix,
    subtrahend: &'a Matrix,
}

impl<'a> Difference<'a> {
    /// minuend - subtrahend.
    ///
    /// # Errors
    /// [`Error::Option`] if they differ in shape.
    pub fn new(minuend: &'a Matrix, subtrahend: &'a Matrix) -> Result<Self> {
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
    /// Those of [`Matrix::read`].
    pub fn read(
        &self,
        kernels: &Kernels,
        rows: &Range<usize>,
        columns: &Range<usize>,
        minuend_squares: bool,
        stopped: &dyn Fn() -> bool,
        out: &mut [f32],
    ) -> Result<Squares> {
        let out = self.minuend.place(rows, columns, out)?;
        let mut squares = Squares::default();
        let mut scratch = [0.0_f32; TILE];
        self.minuend.runs(rows, columns, out, |first, row| {
            let mut start = first;
            for tile in row.chunks_mut(TILE) {
                let elements = start..start + tile.len();
                start = elements.end;
                self.minuend.load(elements.clone(), stopped, tile)?;
                if minuend_squares {
                    squares.minuend += kernels.dot(tile, tile);
                }
                let scratch = &mut scratch[..tile.len()];
                self.subtrahend.load(elements, stopped, scratch)?;
                // The product with -1 is exact.
                kernels.multiply_add(tile, scratch, -1.0);
                squares.difference += kernels.dot(tile, tile);
            }
            Ok(())
        })?;
        Ok(squares)
    }
}
