//! Quantised tensors of inputs, and how far what is made of them changed.

use super::input::Input;
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

/// How far a requantised tensor was to change, and how far it did: sums of squares over its elements.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// `‖W′ - W‖²`: the numbers that were computed, less those that stood there.
    pub wanted: f64,
    /// `‖Q(W′) - W‖²`: what is stored now, less what stood there.
    pub stored: f64,
    /// `⟨Q(W′) - W, W′ - W⟩`: what is stored of it, along it.
    pub along: f64,
}

impl Change {
    /// Adds that of further elements.
    pub fn add(&mut self, other: Self) {
        self.wanted += other.wanted;
        self.stored += other.stored;
        self.along += other.along;
    }
}

/// Changes by the name of the tensor in the input that it is encoded like.
pub type Changes = BTreeMap<String, Change>;
