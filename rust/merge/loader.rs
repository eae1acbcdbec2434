//! Operands as f32: loaded, then changed as an adapter says, element by element of any span.
//!
//! An adapter's product is made where it is needed: for each row of the span, its `rank` coefficients times the rows
//! of the other factor. The dense update never exists. The result for an element depends on the element alone, so any
//! cut into spans gives the same bits.

use super::once::Once;
use super::reading::Reader;
use super::windows::{Part, Place};
use crate::kernels::{Kernels, Product};
use crate::plan::{LowRank, Magnitude, Operand};
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Elements of a left factor that are decoded at a time: whole rows, as many as fit.
pub(super) const LEFT_BLOCK: usize = 1 << 16;
/// Elements of a right factor, or of rows whose norms are taken, that are read between two looks whether to stop.
const PATIENCE: usize = 1 << 16;

/// What those who load the operands of one tensor share: what takes long to make, or much memory.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Differs from tensor to tensor.
    id: u64,
    operands: Vec<SharedOperand>,
}

#[derive(Debug, Default)]
struct SharedOperand {
    /// The factor of each product that every row needs, (rank, columns).
    right: Vec<Once<Vec<f32>>>,
    /// DoRA's factors of the columns.
    columns: Once<Vec<f32>>,
}

impl Shared {
    pub(crate) fn of<'a>(operands: impl IntoIterator<Item = &'a Operand>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let operands = operands.into_iter().map(|operand| SharedOperand {
            right: operand.low_rank.iter().map(|_| Once::default()).collect(),
            columns: Once::default(),
        });
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), operands: operands.collect() }
    }
}

/// An operand to load.
#[derive(Clone, Copy)]
pub(crate) struct Loading<'a> {
    /// Its number among the tensor's operands.
    pub number: usize,
    /// What it is.
    pub operand: &'a Operand,
    /// What is shared of that tensor.
    pub shared: &'a Shared,
    /// Whether it is time to give up.
    pub stopped: &'a dyn Fn() -> bool,
}

/// Loads operands for one worker, and keeps what its next spans of the same tensor will need again.
#[derive(Debug)]
pub(crate) struct OperandLoader {
    kernels: Kernels,
    /// The tensor that the caches below belong to.
    current: u64,
    /// Rows of the other factor of each product, by operand and product.
    left: HashMap<(usize, usize), LeftBlock>,
    /// DoRA's factors of the rows asked for so far, by operand; NaN where nobody has asked.
    row_factors: HashMap<usize, Vec<f32>>,
    whole_row: Vec<f32>,
    reader: Reader,
}

/// Some rows of a left factor, (rows, rank).
#[derive(Debug, Default)]
struct LeftBlock {
    rows: Range<usize>,
    values: Vec<f32>,
}

/// The part of a span that lies in one row.
struct Segment {
    row: usize,
    columns: Range<usize>,
    /// Where it stands in the span.
    place: Range<usize>,
}

/// Cuts a span of elements at the ends of rows of `columns` elements.
fn segments(span: Range<usize>, columns: usize) -> impl Iterator<Item = Segment> {
    let mut next = span.start;
    std::iter::from_fn(move || {
        (next < span.end).then(|| {
            let (row, column) = (next / columns, next % columns);
            let length = (columns - column).min(span.end - next);
            let place = next - span.start..next - span.start + length;
            next += length;
            Segment { row, columns: column..column + length, place }
        })
    })
}

impl OperandLoader {
    pub(crate) fn new(kernels: Kernels) -> Self {
        Self {
            kernels,
            current: 0,
            left: HashMap::new(),
            row_factors: HashMap::new(),
            whole_row: Vec::new(),
            reader: Reader::new(kernels),
        }
    }

    /// Loads a span of elements of an operand.
    ///
    /// # Errors
    /// Those of opening and reading the inputs; [`Error::Interrupted`].
    pub(crate) fn load(
        &mut self,
        from: &Loading<'_>,
        span: Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        if self.current != from.shared.id {
            self.current = from.shared.id;
            self.left.clear();
            self.row_factors.clear();
            self.reader.clear();
        }
        self.load_adapted(from, span.clone(), values)?;
        let Some(magnitude) = &from.operand.magnitude else { return Ok(()) };
        if magnitude.transpose {
            let factors = self.column_factors(from, magnitude)?;
            for segment in segments(span, from.operand.columns) {
                let factors = &factors[segment.columns];
                for (value, factor) in values[segment.place].iter_mut().zip(factors) {
                    *value *= factor;
                }
            }
        } else {
            for segment in segments(span, from.operand.columns) {
                let factor = self.row_factor(from, magnitude, segment.row)?;
                for value in &mut values[segment.place] {
                    *value *= factor;
                }
            }
        }
        Ok(())
    }

    /// Loads a span before its norms are set.
    fn load_adapted(
        &mut self,
        from: &Loading<'_>,
        span: Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        let Loading { number, operand, shared, stopped } = *from;
        let place = |part: Part| Place::new(number, part);
        self.reader.load(place(Part::Matrix), &operand.tensor, span.clone(), values)?;
        if let Some(rows) = &operand.rows {
            for segment in segments(span.clone(), operand.columns) {
                if let Some(&row) = rows.places.get(&segment.row) {
                    let start = row * operand.columns;
                    let elements = start + segment.columns.start..start + segment.columns.end;
                    let values = &mut values[segment.place];
                    self.reader.load(place(Part::Rows), &rows.tensor, elements, values)?;
                }
            }
        }
        for (position, term) in operand.low_rank.iter().enumerate() {
            let right = &shared.operands[number].right[position];
            let right = right.get(stopped, || self.right_factor(from, position, term))?;
            for segment in segments(span.clone(), operand.columns) {
                let kernels = self.kernels;
                let product = Product {
                    coefficients: self.left_row((number, position), term, segment.row)?,
                    factor: &right,
                    columns: operand.columns,
                    start: segment.columns.start,
                    scale: term.scale,
                };
                kernels.add_product(&mut values[segment.place], &product);
            }
        }
        Ok(())
    }

    /// The factor that multiplies every row's coefficients, (rank, columns): `A`, or `Bᵀ` if the matrix is stored
    /// transposed.
    fn right_factor(
        &mut self,
        from: &Loading<'_>,
        position: usize,
        term: &LowRank,
    ) -> Result<Vec<f32>> {
        let (source, columns) = (term.right(), from.operand.columns);
        let place = Place::new(from.number, Part::Factor(position));
        let total = term.rank * columns;
        let mut values = vec![0.0; total];
        // What is kept under this place may be of the left factor.
        self.reader.forget(place);
        // Of Bᵀ, a row at a time goes into a column.
        let step = if term.transpose { term.rank } else { PATIENCE };
        let mut row = vec![0.0; if term.transpose { term.rank } else { 0 }];
        let mut read = 0;
        for start in (0..total).step_by(step) {
            let elements = start..total.min(start + step);
            read += elements.len();
            if read >= PATIENCE {
                read = 0;
                if (from.stopped)() {
                    return Err(Error::Interrupted);
                }
            }
            if term.transpose {
                self.reader.load(place, source, elements, &mut row)?;
                for (k, &value) in row.iter().enumerate() {
                    values[k * columns + start / term.rank] = value;
                }
            } else {
                self.reader.load(place, source, elements.clone(), &mut values[elements])?;
            }
        }
        source.release(&(0..total));
        self.reader.forget(place);
        Ok(values)
    }

    /// One row of the other factor: of `B`, or of `Aᵀ`.
    fn left_row(&mut self, place: (usize, usize), term: &LowRank, row: usize) -> Result<&[f32]> {
        let rank = term.rank;
        // Found twice since the borrow checker takes the early return for the whole function.
        let known = self.left.get(&place).is_some_and(|block| block.rows.contains(&row));
        if !known {
            let mut block = self.left.remove(&place).unwrap_or_default();
            let count = (LEFT_BLOCK / rank).max(1);
            let source = term.left();
            let rows = source.shape[usize::from(term.transpose)];
            block.rows = row / count * count..rows.min(row / count * count + count);
            block.values.resize(block.rows.len() * rank, 0.0);
            self.decode_left(place, term, &mut block)?;
            self.left.insert(place, block);
        }
        let Some(block) = self.left.get(&place) else { return Ok(&[]) };
        let start = (row - block.rows.start) * rank;
        Ok(&block.values[start..start + rank])
    }

    /// Fills a block of rows of the left factor.
    fn decode_left(
        &mut self,
        place: (usize, usize),
        term: &LowRank,
        block: &mut LeftBlock,
    ) -> Result<()> {
        let place = Place::new(place.0, Part::Factor(place.1));
        let (source, rank) = (term.left(), term.rank);
        if term.transpose {
            let rows = source.shape[1];
            let mut column = vec![0.0; block.rows.len()];
            for k in 0..rank {
                let elements = k * rows + block.rows.start..k * rows + block.rows.end;
                // No more than these: the next ones that are wanted lie a row of `A` further on.
                self.reader.forget(place);
                self.reader.load_ahead(place, source, elements.clone(), 0, &mut column)?;
                for (row, &value) in block.values.chunks_exact_mut(rank).zip(&column) {
                    row[k] = value;
                }
                source.release(&elements);
            }
        } else {
            let elements = block.rows.start * rank..block.rows.end * rank;
            self.reader.load(place, source, elements.clone(), &mut block.values)?;
            source.release(&elements);
        }
        Ok(())
    }

    /// `magnitude / ‖row‖` of one row: it is loaded whole, wherever the span was cut.
    fn row_factor(&mut self, from: &Loading<'_>, magnitude: &Magnitude, row: usize) -> Result<f32> {
        let known = self.row_factors.get(&from.number).map_or(f32::NAN, |factors| factors[row]);
        if !known.is_nan() {
            return Ok(known);
        }
        let columns = from.operand.columns;
        let mut values = std::mem::take(&mut self.whole_row);
        values.resize(columns, 0.0);
        self.load_adapted(from, row * columns..(row + 1) * columns, &mut values)?;
        let squares: f64 = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        let mut wanted = [0.0];
        let place = Place::new(from.number, Part::Magnitude);
        self.reader.load(place, &magnitude.tensor, row..row + 1, &mut wanted)?;
        let factor = crate::dtype::f64_to_f32(f64::from(wanted[0]) / squares.sqrt());
        self.whole_row = values;
        let rows = from.operand.tensor.shape[0];
        self.row_factors.entry(from.number).or_insert_with(|| vec![f32::NAN; rows])[row] = factor;
        Ok(factor)
    }

    /// `magnitude / ‖column‖` of every column; the first worker that needs them computes them for all.
    fn column_factors(
        &mut self,
        from: &Loading<'_>,
        magnitude: &Magnitude,
    ) -> Result<Arc<Vec<f32>>> {
        let factors = &from.shared.operands[from.number].columns;
        factors.get(from.stopped, || self.compute_column_factors(from, magnitude))
    }

    /// Takes a pass over the whole operand.
    fn compute_column_factors(
        &mut self,
        from: &Loading<'_>,
        magnitude: &Magnitude,
    ) -> Result<Vec<f32>> {
        let (columns, input) = (from.operand.columns, &from.operand.tensor);
        let elements = input.len();
        let mut squares = vec![0.0_f64; columns];
        let mut values = vec![0.0; columns];
        let mut read = 0;
        for start in (0..elements).step_by(columns) {
            let span = start..start + columns;
            self.load_adapted(from, span.clone(), &mut values)?;
            for (sum, &value) in squares.iter_mut().zip(&values) {
                *sum += f64::from(value) * f64::from(value);
            }
            read += columns;
            if read >= PATIENCE || span.end == elements {
                input.release(&(span.end - read..span.end));
                read = 0;
                if (from.stopped)() {
                    return Err(Error::Interrupted);
                }
            }
        }
        let place = Place::new(from.number, Part::Magnitude);
        self.reader.load(place, &magnitude.tensor, 0..columns, &mut values)?;
        let factors = values
            .iter()
            .zip(squares)
            .map(|(&wanted, sum)| crate::dtype::f64_to_f32(f64::from(wanted) / sum.sqrt()));
        Ok(factors.collect())
    }
}
