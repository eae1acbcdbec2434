//! Filling tiles: aligned spans of an output file, whatever tensors they cut.

use super::blending::{Blender, Job, NonFinite};
use super::entered::{Entered, EnteredPiece};
use super::pages::Pages;
use super::queue::{Chunk, Tile};
use super::work::{SUB_TILE, chunks, elements_of, parts};
use crate::kernels::Kernels;
use crate::methods::Tally;
use crate::plan::{Assembly, Computation, Operation, Piece, Plan, PlannedShard};
use crate::{Error, Result};
use std::ops::Range;

/// Elements that an observe pass looks at together where it looks at all: what it hands on each time costs.
const OBSERVED: usize = 4 * SUB_TILE;

/// Elements of a tensor of several pieces that are put together at a time.
pub(super) const ASSEMBLED: usize = 1 << 16;

/// Elements after which a worker looks whether it is to stop: a chunk or a tile of a slow method takes long.
const PATIENCE: usize = 1 << 16;

/// Looks from time to time whether to stop.
struct Watch<'a> {
    stopped: &'a dyn Fn() -> bool,
    elements: usize,
}

impl<'a> Watch<'a> {
    fn new(stopped: &'a dyn Fn() -> bool) -> Self {
        Self { stopped, elements: 0 }
    }

    /// Called before so many elements are worked on.
    fn pass(&mut self, elements: usize) -> Result<()> {
        self.elements += elements;
        if self.elements >= PATIENCE {
            self.elements = 0;
            if (self.stopped)() {
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }
}

/// Fills tiles. Each worker owns one; its buffers are reused for every tile.
#[derive(Debug)]
pub(super) struct TileFiller {
    kernels: Kernels,
    blender: Blender,
    /// Elements of several pieces, put together.
    assembled: Vec<f32>,
    /// Elements of which not all bytes are wanted.
    stored: Vec<u8>,
    pages: Pages,
}

/// A tensor that is computed, as it is worked on.
#[derive(Clone, Copy)]
struct Work<'a> {
    file: &'a str,
    tensor: &'a Entered,
    assembly: &'a Assembly,
    stopped: &'a dyn Fn() -> bool,
}

impl<'a> Work<'a> {
    /// Calls `work` with one piece, as soon as what it needs to know of it is known.
    fn with<R>(
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
            dtype: self.assembly.dtype,
            stopped: self.stopped,
        })
    }
}

/// Cuts elements, which start anywhere, into units that are computed at a time: sub-tiles, or whole rows of a method that
/// wants them, of which the first and the last may be cut.
fn units(
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

impl TileFiller {
    /// A filler that uses these kernels; `allow_nonfinite` lets NaN and infinity of inputs through.
    pub(super) fn new(kernels: Kernels, allow_nonfinite: bool) -> Self {
        Self {
            kernels,
            blender: Blender::new(kernels, allow_nonfinite),
            assembled: Vec::new(),
            stored: Vec::new(),
            pages: Pages::default(),
        }
    }

    /// Input tensors in which NaN or infinity was met; whoever asks takes them over.
    pub(super) fn nonfinite_inputs(&mut self) -> &mut Vec<NonFinite> {
        &mut self.blender.nonfinite_inputs
    }

    /// Fills `out` with the bytes of a tile of the shard's file, then gives the input pages it read back. Observations
    /// of large tensors are waited for until `stopped`; small ones are observed here.
    ///
    /// # Errors
    /// [`Error::NonFiniteInput`], [`Error::NonFiniteResult`], [`Error::Merge`], [`Error::Interrupted`], and those of
    /// reading the inputs.
    pub(super) fn fill(
        &mut self,
        plan: &Plan,
        shard: &PlannedShard,
        tile: &Tile,
        out: &mut [u8],
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        let span = &tile.span;
        debug_assert_eq!(span.len(), out.len());
        if let Some(header) = &tile.header {
            let stop = header.len().min(span.end);
            out[..stop - span.start].copy_from_slice(&header[span.start..stop]);
        }
        for part in parts(&shard.layout, span) {
            let out = &mut out[part.place];
            match tile.large.iter().find(|(number, _)| *number == part.tensor) {
                Some((_, tensor)) => {
                    self.fill_part(&shard.file, tensor, &part.bytes, out, stopped)?
                }
                None => {
                    let tensor = Entered::new(plan, shard, tile.shard, part.tensor)?;
                    self.observe_whole(&shard.file, &tensor, stopped)?;
                    self.fill_part(&shard.file, &tensor, &part.bytes, out, stopped)?;
                }
            }
        }
        self.pages.give_back();
        Ok(())
    }

    /// Fills `out` with some bytes of a tensor.
    fn fill_part(
        &mut self,
        file: &str,
        tensor: &Entered,
        bytes: &Range<usize>,
        out: &mut [u8],
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        let assembly = match &tensor.output.operation {
            Operation::Copy(input) => {
                input.read(bytes, out)?;
                self.pages.read(input, bytes);
                return Ok(());
            }
            Operation::Compute(assembly) => assembly,
        };
        let work = Work { file, tensor, assembly, stopped };
        match tensor.pieces().next() {
            Some((piece, entered)) if assembly.pieces.len() == 1 => {
                work.with(piece, entered, |job| self.compute_part(job, bytes, out))?;
            }
            _ => self.assemble_part(&work, bytes, out)?,
        }
        let elements = elements_of(bytes, assembly.dtype);
        for piece in &assembly.pieces {
            self.release(&piece.computation, &piece.region.within(&elements));
        }
        Ok(())
    }

    /// Takes all observe passes over a tensor that nobody else works on.
    fn observe_whole(
        &mut self,
        file: &str,
        tensor: &Entered,
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        for (number, (piece, _)) in tensor.pieces().enumerate() {
            let method = &piece.computation.method;
            for pass in 0..method.passes() {
                let chunks = chunks(piece.region.len(), method.row()).enumerate();
                for (place, elements) in chunks {
                    self.observe_elements(file, tensor, number, (pass, place), elements, stopped)?;
                }
            }
        }
        Ok(())
    }

    /// Observes a chunk of a piece.
    ///
    /// # Errors
    /// [`Error::Merge`] if the tensor turns out not to be mergeable, [`Error::Interrupted`], and those of reading the
    /// inputs.
    pub(super) fn observe(
        &mut self,
        shard: &PlannedShard,
        chunk: &Chunk,
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        let Chunk { tensor, piece, pass, number, elements } = chunk;
        let place = (*pass, *number);
        self.observe_elements(&shard.file, tensor, *piece, place, elements.clone(), stopped)?;
        self.pages.give_back();
        Ok(())
    }

    /// Observes elements of a piece: the chunk with this number of a pass.
    fn observe_elements(
        &mut self,
        file: &str,
        tensor: &Entered,
        piece: usize,
        (pass, number): (usize, usize),
        elements: Range<usize>,
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        let (Some((piece, entered)), Some(assembly)) = (tensor.piece(piece), tensor.assembly())
        else {
            return Ok(());
        };
        let (Some(observation), method) = (&entered.observation, &*piece.computation.method) else {
            return Ok(());
        };
        let Some(mut assignment) = observation.begin(method, pass, stopped)? else {
            return Ok(());
        };
        let name = tensor.output.name.as_str();
        let (facts, dtype) = (&assignment.facts, assembly.dtype);
        let job = Job { file, name, piece, entered, facts, dtype, stopped };
        // A sample is made of small pieces from many places.
        let whole = if assignment.stride == 1 { OBSERVED } else { SUB_TILE };
        let step = method.row().unwrap_or(whole).max(1);
        let mut watch = Watch::new(stopped);
        for start in elements.clone().step_by(step) {
            if !(start / step).is_multiple_of(assignment.stride) {
                continue;
            }
            let elements = start..elements.end.min(start + step);
            watch.pass(elements.len())?;
            let mut tally = Tally { sums: &mut assignment.sums, counts: &assignment.counts };
            self.blender.observe(&job, &elements, &mut tally)?;
        }
        self.release(&piece.computation, &elements);
        let finished = observation.finish(method, pass, number, assignment.sums);
        finished.map_err(|problem| job.error(problem))
    }

    /// Computes the bytes `part` of a tensor of one piece; a cut may fall inside an element where an input file was not
    /// aligned, and inside a row that has to be blended whole.
    fn compute_part(&mut self, job: &Job<'_>, part: &Range<usize>, out: &mut [u8]) -> Result<()> {
        let (dtype, size) = (job.dtype, job.dtype.size());
        let elements = elements_of(part, dtype);
        let mut watch = Watch::new(job.stopped);
        for unit in units(&job.piece.computation, job.piece.region.len(), &elements) {
            let bytes = unit.start * size..unit.end * size;
            watch.pass(unit.len())?;
            if part.start <= bytes.start && bytes.end <= part.end {
                let out = &mut out[bytes.start - part.start..bytes.end - part.start];
                self.blender
                    .blend(job, unit, |kernels, values| kernels.store(dtype, values, out))?;
                continue;
            }
            let stored = &mut self.stored;
            stored.resize(bytes.len(), 0);
            self.blender
                .blend(job, unit, |kernels, values| kernels.store(dtype, values, stored))?;
            copy_wanted(&bytes, stored, part, out);
        }
        Ok(())
    }

    /// Computes the bytes `part` of a tensor of several pieces.
    fn assemble_part(
        &mut self,
        work: &Work<'_>,
        part: &Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let (dtype, size) = (work.assembly.dtype, work.assembly.dtype.size());
        let elements = elements_of(part, dtype);
        let mut values = std::mem::take(&mut self.assembled);
        let mut stored = std::mem::take(&mut self.stored);
        for start in elements.clone().step_by(ASSEMBLED) {
            let unit = start..elements.end.min(start + ASSEMBLED);
            values.resize(values.len().max(unit.len()), 0.0);
            self.assemble(work, &unit, &mut values[..unit.len()])?;
            let bytes = unit.start * size..unit.end * size;
            stored.resize(bytes.len(), 0);
            // Each piece has been looked at.
            let _ = self.kernels.store(dtype, &values[..unit.len()], &mut stored);
            copy_wanted(&bytes, &stored, part, out);
        }
        (self.assembled, self.stored) = (values, stored);
        Ok(())
    }

    /// Computes some elements of a tensor, whichever pieces they belong to, as numbers.
    fn assemble(
        &mut self,
        work: &Work<'_>,
        elements: &Range<usize>,
        values: &mut [f32],
    ) -> Result<()> {
        let dtype = work.assembly.dtype;
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
                    self.blender.blend(job, unit, |kernels, blended| {
                        piece.region.scatter(part.start, &blended[inside], elements.start, values);
                        stored.resize(blended.len() * dtype.size(), 0);
                        kernels.store(dtype, blended, stored)
                    })?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Gives the pages back, by and by, that these elements of the operands were read from; those of factors went when
    /// they were decoded.
    fn release(&mut self, computation: &Computation, elements: &Range<usize>) {
        if elements.is_empty() {
            return;
        }
        for operand in &computation.operands {
            if let Some(bytes) = operand.tensor.done(elements) {
                self.pages.read(&operand.tensor.input, &bytes);
            }
            if let Some(rows) = &operand.rows {
                self.pages.read(&rows.tensor.input, &(0..rows.tensor.input.range.len()));
            }
        }
    }
}

/// Copies those of the bytes `from` that lie in `part` to their places in `out`, which is that part.
fn copy_wanted(from: &Range<usize>, bytes: &[u8], part: &Range<usize>, out: &mut [u8]) {
    let wanted = from.start.max(part.start)..from.end.min(part.end);
    out[wanted.start - part.start..wanted.end - part.start]
        .copy_from_slice(&bytes[wanted.start - from.start..wanted.end - from.start]);
}
