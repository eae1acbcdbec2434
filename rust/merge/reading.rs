//! Elements of inputs as f32, for one worker: runs of stored ones, and what views pick out of runs.

use super::windows::{AHEAD, Place, Windows};
use crate::Result;
use crate::kernels::Kernels;
use crate::plan::{Encoded, FloatInput, Input, Order, Stored, View};
use std::collections::HashMap;
use std::ops::Range;

/// Elements that are kept of a matrix that is read across: some of its rows, whole.
pub(super) const ACROSS: usize = 1 << 18;
/// Rows that are kept of it at most; of a stored run, fewer are a waste of what is fetched with them.
const MOST_ROWS: usize = 64;
/// Stored elements that are read at a time where those that are wanted lie apart.
const APART: usize = 1 << 16;

/// Reads elements, and keeps what its next calls will need again.
#[derive(Debug)]
pub(super) struct Reader {
    kernels: Kernels,
    windows: Windows,
    /// Rows of matrices that are read across.
    blocks: HashMap<Place, Block>,
    run: Vec<f32>,
    /// What codes are multiplied by.
    factors: Vec<f32>,
}

/// Some rows of a view, (rows, columns).
#[derive(Debug, Default)]
struct Block {
    rows: Range<usize>,
    values: Vec<f32>,
}

impl Reader {
    pub(super) fn new(kernels: Kernels) -> Self {
        Self {
            kernels,
            windows: Windows::default(),
            blocks: HashMap::new(),
            run: Vec::new(),
            factors: Vec::new(),
        }
    }

    /// Forgets what was read; memory is kept.
    pub(super) fn clear(&mut self) {
        self.windows.clear();
        for block in self.blocks.values_mut() {
            block.rows = 0..0;
        }
    }

    /// Forgets what was read under `place`.
    pub(super) fn forget(&mut self, place: Place) {
        self.windows.forget(place);
        self.blocks.remove(&place);
    }

    /// Loads some elements; bytes that follow are read with them and kept under `place`.
    ///
    /// # Errors
    /// Those of opening and reading the file.
    pub(super) fn load(
        &mut self,
        place: Place,
        tensor: &FloatInput,
        elements: Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        self.load_ahead(place, tensor, elements, AHEAD, values)
    }

    /// As [`Reader::load`], with up to `ahead` bytes in all.
    ///
    /// # Errors
    /// Those of [`Reader::load`].
    pub(super) fn load_ahead(
        &mut self,
        place: Place,
        tensor: &FloatInput,
        elements: Range<usize>,
        ahead: usize,
        values: &mut [f32],
    ) -> Result<()> {
        let Some(view) = &tensor.view else {
            return self.load_run(place, tensor, elements, ahead, values);
        };
        let (columns, mut next, mut rest) = (view.row(), elements.start, values);
        while next < elements.end {
            let (row, column) = (next / columns, next % columns);
            let count = (columns - column).min(elements.end - next);
            let (now, later) = rest.split_at_mut(count);
            let columns = column..column + count;
            match view.order() {
                Order::Runs => {
                    let start = view.row_start(row);
                    let run = start + columns.start..start + columns.end;
                    self.load_run(place, tensor, run, ahead, now)?;
                }
                Order::Spread(stride) => {
                    let start = view.row_start(row) + column * stride;
                    self.load_spread(place, tensor, start, stride, ahead, now)?;
                }
                Order::Across(apart) => {
                    self.load_across(place, tensor, view, apart, row, columns, now)?;
                }
            }
            (rest, next) = (later, next + count);
        }
        Ok(())
    }

    /// Loads stored elements that follow one another; up to `ahead` bytes are read ahead.
    fn load_run(
        &mut self,
        place: Place,
        tensor: &FloatInput,
        elements: Range<usize>,
        ahead: usize,
        values: &mut [f32],
    ) -> Result<()> {
        let float = match &tensor.stored {
            Stored::Plain(float) => *float,
            Stored::Bytes => {
                let bytes = self.windows.bytes(place, &tensor.input, elements, ahead)?;
                for (value, &byte) in values.iter_mut().zip(bytes) {
                    *value = f32::from(byte);
                }
                return Ok(());
            }
            Stored::Encoded(encoded) => {
                return self.load_encoded(place, &tensor.input, encoded, elements, ahead, values);
            }
        };
        let range = tensor.stored_bytes(&elements);
        let bytes = self.windows.bytes(place, &tensor.input, range, ahead)?;
        self.kernels.load(float, bytes, values);
        Ok(())
    }

    /// Loads elements of a quantised tensor that follow one another; bytes that follow are read with them.
    ///
    /// # Errors
    /// Those of [`Reader::load`].
    pub(super) fn load_codes(
        &mut self,
        place: Place,
        codes: &Input,
        encoded: &Encoded,
        elements: Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        self.load_encoded(place, codes, encoded, elements, AHEAD, values)
    }

    fn load_encoded(
        &mut self,
        place: Place,
        codes: &Input,
        encoded: &Encoded,
        elements: Range<usize>,
        ahead: usize,
        values: &mut [f32],
    ) -> Result<()> {
        let Encoded { encoding, band, scales, .. } = encoded;
        let (mut next, mut rest) = (elements.start, values);
        while next < elements.end {
            let (row, column) = (next / band.columns, next % band.columns);
            let count = (band.columns - column).min(elements.end - next);
            let (now, later) = rest.split_at_mut(count);
            // Only the factors that these columns need; a block begins at a whole byte of codes.
            let (first, last) = (column / band.block, (column + count - 1) / band.block);
            if let (Some(scales), Some(scale_type)) = (scales, band.scale_type) {
                let (matrix, row) = encoded.matrix_and_row(row);
                let start = encoding.scale_range(matrix, row).start;
                let bytes =
                    start + first * scale_type.size()..start + (last + 1) * scale_type.size();
                let bytes = self.windows.bytes(place.scales(), scales, bytes, ahead)?;
                self.factors.resize(last + 1 - first, 0.0);
                band.factors(&self.kernels, bytes, encoded.global(matrix)?, &mut self.factors);
            }
            let bytes = encoding.code_range(next..next + count);
            let bytes = self.windows.bytes(place, codes, bytes, ahead)?;
            let start = column - first * band.block;
            band.decode_part(&self.kernels, bytes, start, &self.factors, now);
            (rest, next) = (later, next + count);
        }
        Ok(())
    }

    /// Loads stored elements that lie `stride` apart, from `start` on.
    fn load_spread(
        &mut self,
        place: Place,
        tensor: &FloatInput,
        start: usize,
        stride: usize,
        ahead: usize,
        values: &mut [f32],
    ) -> Result<()> {
        let step = (APART / stride).max(1);
        let mut run = std::mem::take(&mut self.run);
        for (number, values) in values.chunks_mut(step).enumerate() {
            let start = start + number * step * stride;
            let length = (values.len() - 1) * stride + 1;
            run.resize(run.len().max(length), 0.0);
            self.load_run(place, tensor, start..start + length, ahead, &mut run[..length])?;
            for (value, found) in values.iter_mut().zip(run.iter().step_by(stride)) {
                *value = *found;
            }
        }
        self.run = run;
        Ok(())
    }

    /// Loads some columns of a row whose elements lie far apart, but near those of the next rows.
    #[expect(clippy::too_many_arguments, reason = "where it is, and what is wanted of it")]
    fn load_across(
        &mut self,
        place: Place,
        tensor: &FloatInput,
        view: &View,
        apart: usize,
        row: usize,
        columns: Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        let mut block = self.blocks.remove(&place).unwrap_or_default();
        if !block.rows.contains(&row) {
            let width = view.row();
            let rows = (ACROSS / width).clamp(1, MOST_ROWS).min(view.neighbours(row));
            block.rows = 0..0;
            block.values.resize(rows * width, 0.0);
            let start = view.row_start(row);
            let mut line = [0.0; MOST_ROWS];
            for column in 0..width {
                let line = &mut line[..rows];
                // No more than these: the next ones that are wanted lie elsewhere.
                self.load_spread(place, tensor, start + column * view.stride(), apart, 0, line)?;
                for (values, value) in block.values.chunks_exact_mut(width).zip(&*line) {
                    values[column] = *value;
                }
            }
            block.rows = row..row + rows;
        }
        let first = (row - block.rows.start) * view.row();
        values.copy_from_slice(&block.values[first + columns.start..first + columns.end]);
        self.blocks.insert(place, block);
        Ok(())
    }
}
