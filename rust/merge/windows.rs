//! Bytes of inputs for one worker: slices of mappings, or windows that positioned reads fill.

use crate::Result;
use crate::plan::Input;
use std::collections::HashMap;
use std::ops::Range;

/// Bytes that a positioned read fetches where the next ones will be asked for too.
pub(super) const AHEAD: usize = 1 << 20;

/// What a window is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    /// Number of the operand.
    pub operand: usize,
    /// Which of its tensors.
    pub part: Part,
    /// Whether it is that tensor's scales.
    pub scales: bool,
}

impl Place {
    /// That of numbers or codes.
    pub(super) fn new(operand: usize, part: Part) -> Self {
        Self { operand, part, scales: false }
    }

    /// That of the scales which belong to them.
    pub(super) fn scales(self) -> Self {
        Self { scales: true, ..self }
    }
}

/// One of the tensors that an operand is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Part {
    /// The matrix that adapters change.
    Matrix,
    /// Rows that replace some of its own.
    Rows,
    /// DoRA's norms.
    Magnitude,
    /// A factor of the product with this number.
    Factor(usize),
}

/// The windows of one worker.
#[derive(Debug, Default)]
pub(super) struct Windows(HashMap<Place, Window>);

#[derive(Debug, Default)]
struct Window {
    range: Range<usize>,
    bytes: Vec<u8>,
}

impl Windows {
    /// Forgets what was read; memory is kept.
    pub(super) fn clear(&mut self) {
        for window in self.0.values_mut() {
            window.range = 0..0;
        }
    }

    /// Forgets what was read for `place`, and its scales.
    pub(super) fn forget(&mut self, place: Place) {
        for place in [place, place.scales()] {
            if let Some(window) = self.0.get_mut(&place) {
                window.range = 0..0;
            }
        }
    }

    /// Bytes `range` of an input's data. If they must be read, up to `ahead` bytes are, and kept under `place`.
    ///
    /// # Errors
    /// Those of opening and reading the file.
    pub(super) fn bytes<'a>(
        &'a mut self,
        place: Place,
        input: &'a Input,
        range: Range<usize>,
        ahead: usize,
    ) -> Result<&'a [u8]> {
        if let Some(bytes) = input.mapped()? {
            return Ok(&bytes[range]);
        }
        let window = self.0.entry(place).or_default();
        if range.start < window.range.start || range.end > window.range.end {
            let end = range.end.max((range.start + ahead).min(input.range.len()));
            window.range = 0..0;
            window.bytes.resize(end - range.start, 0);
            input.read(&(range.start..end), &mut window.bytes)?;
            window.range = range.start..end;
        }
        let start = range.start - window.range.start;
        Ok(&window.bytes[start..start + range.len()])
    }
}
