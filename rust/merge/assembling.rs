//! Elements of a tensor, whichever of its pieces they belong to, as numbers.

use super::blending::{Blender, Job};
use super::entered::{Entered, EnteredPiece};
use super::work::{SUB_TILE, Watch};
use crate::Result;
use crate::kernels::Kernels;
use crate::plan::{Assembly, Computation, Piece, Target};
use std::ops::Range;

/// A tensor that is computed, as it is worked on.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    /// The output file.
    pub file: &'a str,
    pub tensor: &'a Entered,
    pub assembly: &'a Assembly,
    pub stopped: &'a dyn Fn() -> bool,
}

impl<'a> Work<'a> {
    /// Calls `work` with one piece, as soon as what it needs to know of it is known.
    pub(super) fn with<R>(
        &self,
        piece: &'a Piece,
        entered: &'a EnteredPiece,
        work: impl FnOnce(&Job<'_>) -> Result<R>,
    ) -> Result<R> {
        let facts = match &entered.observation {
            Some(observation) => observation.facts(self.stopped)?,
            None => piece.computation.method.start(),
        };
        work(&Job {
            file: self.file,
            name: &self.tensor.output.name,
            piece,
            entered,
            facts: &facts,
            dtype: self.assembly.dtype(),
            stopped: self.stopped,
        })
    }
}

/// Cuts elements, which start anywhere, into units that are computed at a time: sub-tiles, or whole rows of a method that
/// wants them, of which the first and the last may be cut.
pub(super) fn units(
    computation: &Computation,
    all: usize,
    elements: &Range<usize>,
) -> impl Iterator<Item = Range<usize>> {
    // Without rows, sub-tiles start where the part does.
    let (step, first, end) = match computation.method.row() {
        Some(row) => (row.max(1), elements.start / row.max(1) * row.max(1), all),
        None => (SUB_TILE, elements.start, elements.end),
    };
    (first..elements.end).step_by(step).map(move |start| start..end.min(start + step))
}

/// Computes numbers for one worker.
#[derive(Debug)]
pub(super) struct Assembler {
    pub blender: Blender,
    /// Numbers as they are stored, to see whether they are finite.
    stored: Vec<u8>,
}

impl Assembler {
    pub(super) fn new(kernels: Kernels, allow_nonfinite: bool) -> Self {
        Self { blender: Blender::new(kernels, allow_nonfinite), stored: Vec::new() }
    }

    /// Computes some elements of a tensor. Of one that is encoded, NaN and infinity among them are an error only if `look`.
    ///
    /// # Errors
    /// Those of [`Blender::blend`]; [`crate::Error::Interrupted`].
    pub(super) fn numbers(
        &mut self,
        work: &Work<'_>,
        elements: &Range<usize>,
        look: bool,
        values: &mut [f32],
    ) -> Result<()> {
        let mut watch = Watch::new(work.stopped);
        for (piece, entered) in work.tensor.pieces() {
            let wanted = piece.region.within(elements);
            if wanted.is_empty() {
                continue;
            }
            work.with(piece, entered, |job| {
                for unit in units(&piece.computation, piece.region.len(), &wanted) {
                    watch.pass(unit.len())?;
                    let stored = &mut self.stored;
                    let part = unit.start.max(wanted.start)..unit.end.min(wanted.end);
                    let inside = part.start - unit.start..part.end - unit.start;
                    let Target::Plain(dtype) = &work.assembly.target else {
                        if piece.region.is_run() && part == unit {
                            let start = piece.region.place(part.start) - elements.start;
                            let out = &mut values[start..start + unit.len()];
                            self.blender.blend_into(job, unit, look, out)?;
                            continue;
                        }
                        self.blender.blend(job, unit, |kernels, blended| {
                            let wanted = &blended[inside];
                            piece.region.scatter(part.start, wanted, elements.start, values);
                            kernels.amax(blended).is_finite()
                        })?;
                        continue;
                    };
                    self.blender.blend(job, unit, |kernels, blended| {
                        piece.region.scatter(part.start, &blended[inside], elements.start, values);
                        stored.resize(blended.len() * dtype.size(), 0);
                        kernels.store(*dtype, blended, stored)
                    })?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
