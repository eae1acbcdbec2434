//! Operands as f32: loaded, then changed as an adapter says, element by element of any span.
//!
//! An adapter's product is made where it is needed: for each row of the span, its `rank` coefficients times the rows
//! of the other factor. The dense update never exists. The result for an element depends on the element alone, so any
//! cut into spans gives the same bits.

use super::windows::{AHEAD, Windows};
use crate::kernels::{Kernels, Product};
use crate::plan::{FloatInput, LowRank, Magnitude, Operand, OutputTensor};
use crate::{Error, Result};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

/// Loads operands for one worker, and keeps what its next spans of the same tensor will need again.
#[derive(Debug)]
pub(super) struct OperandLoader {
    kernels: Kernels,
    /// Output tensor (by its place in memory) that the caches below belong to.
    current: usize,
    /// The factor of each product that every row needs, (rank, columns), by operand and product.
    right: HashMap<(usize, usize), Vec<f32>>,
    /// DoRA's factor of the row last asked for, by operand.
    row_factor: HashMap<usize, (usize, f32)>,
    coefficients: Vec<f32>,
    whole_row: Vec<f32>,
    windows: Windows,
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
    pub(super) fn new(kernels: Kernels) -> Self {
        Self {
            kernels,
            current: 0,
            right: HashMap::new(),
            row_factor: HashMap::new(),
            coefficients: Vec::new(),
            whole_row: Vec::new(),
            windows: Windows::default(),
        }
    }

    /// Forgets what belongs to other tensors than this one.
    pub(super) fn enter(&mut self, tensor: &OutputTensor) {
        let address = std::ptr::from_ref(tensor).addr();
        if self.current != address {
            self.current = address;
            self.right.clear();
            self.row_factor.clear();
            self.windows.clear();
        }
    }

    /// Loads a span of elements of the operand with this number.
    ///
    /// # Errors
    /// Those of reading the inputs.
    pub(super) fn load(
        &mut self,
        number: usize,
        operand: &Operand,
        span: Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        self.load_adapted(number, operand, span.clone(), values)?;
        let Some(magnitude) = &operand.magnitude else { return Ok(()) };
        if magnitude.transpose {
            let factors = self.column_factors(number, operand, magnitude)?;
            for segment in segments(span, operand.columns) {
                let factors = &factors[segment.columns];
                for (value, factor) in values[segment.place].iter_mut().zip(factors) {
                    *value *= factor;
                }
            }
        } else {
            for segment in segments(span, operand.columns) {
                let factor = self.row_factor(number, operand, magnitude, segment.row)?;
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
        number: usize,
        operand: &Operand,
        span: Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        self.load_plain((number, MATRIX), &operand.tensor, span.clone(), values, AHEAD)?;
        if let Some(rows) = &operand.rows {
            for segment in segments(span.clone(), operand.columns) {
                if let Some(place) = rows.places.get(&segment.row) {
                    let start = place * operand.columns;
                    let elements = start + segment.columns.start..start + segment.columns.end;
                    let values = &mut values[segment.place];
                    self.load_plain((number, ROWS), &rows.tensor, elements, values, AHEAD)?;
                }
            }
        }
        for (position, term) in operand.low_rank.iter().enumerate() {
            let kernels = self.kernels;
            let right = match self.right.entry((number, position)) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => {
                    unknown.insert(right_factor(&kernels, term, operand.columns)?)
                }
            };
            for segment in segments(span.clone(), operand.columns) {
                let place = (number, FIRST_FACTOR + position);
                left_row(
                    &kernels,
                    &mut self.windows,
                    place,
                    term,
                    segment.row,
                    &mut self.coefficients,
                )?;
                let product = Product {
                    coefficients: &self.coefficients,
                    factor: right,
                    columns: operand.columns,
                    start: segment.columns.start,
                    scale: term.scale,
                };
                kernels.add_product(&mut values[segment.place], &product);
            }
        }
        Ok(())
    }

    /// Loads elements of a tensor as it is stored; `place` and `ahead` as in [`Windows::bytes`].
    fn load_plain(
        &mut self,
        place: (usize, usize),
        tensor: &FloatInput,
        elements: Range<usize>,
        values: &mut [f32],
        ahead: usize,
    ) -> Result<()> {
        let bytes = self.windows.bytes(place, &tensor.input, tensor.place(elements), ahead)?;
        self.kernels.load(tensor.dtype, bytes, values);
        Ok(())
    }

    /// `magnitude / ‖row‖` of one row: it is loaded whole, wherever the span was cut.
    fn row_factor(
        &mut self,
        number: usize,
        operand: &Operand,
        magnitude: &Magnitude,
        row: usize,
    ) -> Result<f32> {
        if let Some(&(known, factor)) = self.row_factor.get(&number)
            && known == row
        {
            return Ok(factor);
        }
        let mut values = std::mem::take(&mut self.whole_row);
        values.resize(operand.columns, 0.0);
        let start = row * operand.columns;
        self.load_adapted(number, operand, start..start + operand.columns, &mut values)?;
        let squares: f64 = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        let mut wanted = [0.0];
        let place = (number, MAGNITUDE);
        self.load_plain(place, &magnitude.tensor, row..row + 1, &mut wanted, AHEAD)?;
        let factor = crate::dtype::f64_to_f32(f64::from(wanted[0]) / squares.sqrt());
        self.whole_row = values;
        self.row_factor.insert(number, (row, factor));
        Ok(factor)
    }

    /// `magnitude / ‖column‖` of every column; the first worker that needs them computes them for all.
    fn column_factors<'a>(
        &mut self,
        number: usize,
        operand: &Operand,
        magnitude: &'a Magnitude,
    ) -> Result<&'a [f32]> {
        let mut failure = None;
        let factors = magnitude.column_factors.get_or_init(|| {
            self.compute_column_factors(number, operand, magnitude).unwrap_or_else(|error| {
                failure = Some(error);
                Vec::new()
            })
        });
        match failure {
            Some(error) => Err(error),
            // Another worker failed, and says why.
            None if factors.is_empty() => Err(Error::Interrupted),
            None => Ok(factors),
        }
    }

    /// Takes a pass over the whole operand.
    fn compute_column_factors(
        &mut self,
        number: usize,
        operand: &Operand,
        magnitude: &Magnitude,
    ) -> Result<Vec<f32>> {
        let columns = operand.columns;
        let elements = operand.tensor.input.shape.iter().product::<usize>();
        let mut squares = vec![0.0_f64; columns];
        let mut values = std::mem::take(&mut self.whole_row);
        values.resize(columns, 0.0);
        for start in (0..elements).step_by(columns) {
            self.load_adapted(number, operand, start..start + columns, &mut values)?;
            for (sum, &value) in squares.iter_mut().zip(&values) {
                *sum += f64::from(value) * f64::from(value);
            }
        }
        let place = (number, MAGNITUDE);
        self.load_plain(place, &magnitude.tensor, 0..columns, &mut values, AHEAD)?;
        let factors = values
            .iter()
            .zip(squares)
            .map(|(&wanted, sum)| crate::dtype::f64_to_f32(f64::from(wanted) / sum.sqrt()));
        let factors = factors.collect();
        self.whole_row = values;
        Ok(factors)
    }
}

// Parts of an operand, for their windows.
const MATRIX: usize = 0;
const ROWS: usize = 1;
const MAGNITUDE: usize = 2;
const FIRST_FACTOR: usize = 3;

/// The factor that multiplies every row's coefficients: `A`, or `Bᵀ` if the matrix is stored transposed.
fn right_factor(kernels: &Kernels, term: &LowRank, columns: usize) -> Result<Vec<f32>> {
    let source = if term.transpose { &term.b } else { &term.a };
    let mut values = vec![0.0; term.rank * columns];
    let mut whole = Windows::default();
    let place = source.place(0..term.rank * columns);
    kernels.load(source.dtype, whole.bytes((0, 0), &source.input, place, 0)?, &mut values);
    if term.transpose {
        let mut transposed = vec![0.0; values.len()];
        for (column, row) in values.chunks_exact(term.rank).enumerate() {
            for (k, &value) in row.iter().enumerate() {
                transposed[k * columns + column] = value;
            }
        }
        values = transposed;
    }
    source.input.release(0..source.input.range.len());
    Ok(values)
}

/// One row of the other factor: of `B`, or of `Aᵀ`.
fn left_row(
    kernels: &Kernels,
    windows: &mut Windows,
    place: (usize, usize),
    term: &LowRank,
    row: usize,
    coefficients: &mut Vec<f32>,
) -> Result<()> {
    coefficients.resize(term.rank, 0.0);
    let source = if term.transpose { &term.a } else { &term.b };
    // Read as a whole where it must be read: a column of it lies all over the file.
    let whole = source.input.range.len();
    let bytes = windows.bytes(place, &source.input, 0..whole, whole)?;
    let size = source.dtype.size();
    if term.transpose {
        let rows = source.input.shape[1];
        for (k, coefficient) in coefficients.iter_mut().enumerate() {
            let start = (k * rows + row) * size;
            let bytes = &bytes[start..start + size];
            kernels.load(source.dtype, bytes, std::slice::from_mut(coefficient));
        }
    } else {
        let bytes = &bytes[source.place(row * term.rank..(row + 1) * term.rank)];
        kernels.load(source.dtype, bytes, coefficients);
    }
    Ok(())
}
