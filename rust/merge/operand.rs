//! Operands as f32: loaded, then changed as an adapter says, element by element of any span.
//!
//! An adapter's product is made where it is needed: for each row of the span, its `rank` coefficients times the rows
//! of the other factor. The dense update never exists. The result for an element depends on the element alone, so any
//! cut into spans gives the same bits.

use crate::kernels::{Kernels, Product};
use crate::plan::{FloatInput, LowRank, Magnitude, Operand, OutputTensor};
use std::collections::HashMap;
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
        }
    }

    /// Forgets what belongs to other tensors than this one.
    pub(super) fn enter(&mut self, tensor: &OutputTensor) {
        let address = std::ptr::from_ref(tensor).addr();
        if self.current != address {
            self.current = address;
            self.right.clear();
            self.row_factor.clear();
        }
    }

    /// Loads a span of elements of the operand with this number.
    pub(super) fn load(
        &mut self,
        number: usize,
        operand: &Operand,
        span: Range<usize>,
        values: &mut [f32],
    ) {
        self.load_adapted(number, operand, span.clone(), values);
        if let Some(magnitude) = &operand.magnitude {
            if magnitude.transpose {
                let factors = magnitude
                    .column_factors
                    .get_or_init(|| self.column_factors(number, operand, magnitude));
                for segment in segments(span, operand.columns) {
                    let factors = &factors[segment.columns];
                    for (value, factor) in values[segment.place].iter_mut().zip(factors) {
                        *value *= factor;
                    }
                }
            } else {
                for segment in segments(span, operand.columns) {
                    let factor = self.row_factor(number, operand, magnitude, segment.row);
                    for value in &mut values[segment.place] {
                        *value *= factor;
                    }
                }
            }
        }
    }

    /// Loads a span before its norms are set.
    fn load_adapted(
        &mut self,
        number: usize,
        operand: &Operand,
        span: Range<usize>,
        values: &mut [f32],
    ) {
        self.load_plain(&operand.tensor, span.clone(), values);
        if let Some(rows) = &operand.rows {
            for segment in segments(span.clone(), operand.columns) {
                if let Some(place) = rows.places.get(&segment.row) {
                    let start = place * operand.columns;
                    let elements = start + segment.columns.start..start + segment.columns.end;
                    self.load_plain(&rows.tensor, elements, &mut values[segment.place]);
                }
            }
        }
        for (position, term) in operand.low_rank.iter().enumerate() {
            let kernels = self.kernels;
            let right = self
                .right
                .entry((number, position))
                .or_insert_with(|| right_factor(&kernels, term, operand.columns));
            for segment in segments(span.clone(), operand.columns) {
                left_row(&kernels, term, segment.row, &mut self.coefficients);
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
    }

    fn load_plain(&self, tensor: &FloatInput, elements: Range<usize>, values: &mut [f32]) {
        self.kernels.load(tensor.dtype, tensor.elements(elements), values);
    }

    /// `magnitude / ‖row‖` of one row: it is loaded whole, wherever the span was cut.
    fn row_factor(
        &mut self,
        number: usize,
        operand: &Operand,
        magnitude: &Magnitude,
        row: usize,
    ) -> f32 {
        if let Some(&(known, factor)) = self.row_factor.get(&number)
            && known == row
        {
            return factor;
        }
        let mut values = std::mem::take(&mut self.whole_row);
        values.resize(operand.columns, 0.0);
        let start = row * operand.columns;
        self.load_adapted(number, operand, start..start + operand.columns, &mut values);
        let squares: f64 = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        let mut wanted = [0.0];
        self.load_plain(&magnitude.tensor, row..row + 1, &mut wanted);
        let factor = crate::dtype::f64_to_f32(f64::from(wanted[0]) / squares.sqrt());
        self.whole_row = values;
        self.row_factor.insert(number, (row, factor));
        factor
    }

    /// `magnitude / ‖column‖` of every column, which takes a pass over the whole operand.
    fn column_factors(
        &mut self,
        number: usize,
        operand: &Operand,
        magnitude: &Magnitude,
    ) -> Vec<f32> {
        let columns = operand.columns;
        let elements = operand.tensor.input.shape.iter().product::<usize>();
        let mut squares = vec![0.0_f64; columns];
        let mut values = std::mem::take(&mut self.whole_row);
        values.resize(columns, 0.0);
        for start in (0..elements).step_by(columns) {
            self.load_adapted(number, operand, start..start + columns, &mut values);
            for (sum, &value) in squares.iter_mut().zip(&values) {
                *sum += f64::from(value) * f64::from(value);
            }
        }
        self.load_plain(&magnitude.tensor, 0..columns, &mut values);
        let factors = values
            .iter()
            .zip(squares)
            .map(|(&wanted, sum)| crate::dtype::f64_to_f32(f64::from(wanted) / sum.sqrt()));
        let factors = factors.collect();
        self.whole_row = values;
        factors
    }
}

/// The factor that multiplies every row's coefficients: `A`, or `Bᵀ` if the matrix is stored transposed.
fn right_factor(kernels: &Kernels, term: &LowRank, columns: usize) -> Vec<f32> {
    let source = if term.transpose { &term.b } else { &term.a };
    let mut values = vec![0.0; term.rank * columns];
    kernels.load(source.dtype, source.elements(0..term.rank * columns), &mut values);
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
    values
}

/// One row of the other factor: of `B`, or of `Aᵀ`.
fn left_row(kernels: &Kernels, term: &LowRank, row: usize, coefficients: &mut Vec<f32>) {
    coefficients.resize(term.rank, 0.0);
    if term.transpose {
        let rows = term.a.input.shape[1];
        for (k, coefficient) in coefficients.iter_mut().enumerate() {
            let element = k * rows + row;
            let bytes = term.a.elements(element..element + 1);
            kernels.load(term.a.dtype, bytes, std::slice::from_mut(coefficient));
        }
    } else {
        let start = row * term.rank;
        kernels.load(term.b.dtype, term.b.elements(start..start + term.rank), coefficients);
    }
}
