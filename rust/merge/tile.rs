//! Filling tiles: aligned spans of an output file, whatever tensors they cut.

use super::assembling::{Assembler, Work, units};
use super::blending::{Job, NonFinite};
use super::entered::Entered;
use super::pages::Pages;
use super::queue::{Chunk, Tile};
use super::requantising::Requantiser;
use super::scales::RecentScales;
use super::work::{SUB_TILE, Watch, chunks, copy_wanted, elements_of, parts};
use crate::Result;
use crate::dtype::Float;
use crate::kernels::Kernels;
use crate::methods::{Counts, Tally};
use crate::plan::{Assembly, Changes, Computation, Operation, Plan, PlannedShard, Target};
use std::ops::Range;
use std::sync::Arc;

/// Elements of a tensor of several pieces that are put together at a time.
pub(super) const ASSEMBLED: usize = 1 << 16;

/// Fills tiles. Each worker owns one; its buffers are reused for every tile.
#[derive(Debug)]
pub(super) struct TileFiller {
    kernels: Kernels,
    assembler: Assembler,
    requantiser: Requantiser,
    /// Elements of several pieces, put together.
    assembled: Vec<f32>,
    /// Elements of which not all bytes are wanted.
    stored: Vec<u8>,
    pages: Pages,
}

impl TileFiller {
    /// A filler that uses these kernels and shares `scales` with others; `allow_nonfinite` lets NaN and infinity of inputs
    /// through.
    pub(super) fn new(kernels: Kernels, allow_nonfinite: bool, scales: &Arc<RecentScales>) -> Self {
        Self {
            kernels,
            assembler: Assembler::new(kernels, allow_nonfinite),
            requantiser: Requantiser::new(kernels, Arc::clone(scales)),
            assembled: Vec::new(),
            stored: Vec::new(),
            pages: Pages::default(),
        }
    }

    /// Input tensors in which NaN or infinity was met; whoever asks takes them over.
    pub(super) fn nonfinite_inputs(&mut self) -> &mut Vec<NonFinite> {
        &mut self.assembler.blender.nonfinite_inputs
    }

    /// How far requantised tensors changed; whoever asks takes it over.
    pub(super) fn changes(&mut self) -> &mut Changes {
        &mut self.requantiser.changes
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
        match (&assembly.target, tensor.pieces().next()) {
            (Target::Encoded(target), _) => {
                let Self { assembler, requantiser, pages, .. } = self;
                return requantiser.fill(assembler, &work, target, bytes, out, |elements| {
                    pages.read(&target.codes, &target.like.encoding.code_range(elements.clone()));
                    release(pages, assembly, elements);
                });
            }
            (Target::Plain(dtype), Some((piece, entered))) if assembly.pieces.len() == 1 => {
                work.with(piece, entered, |job| self.compute_part(job, *dtype, bytes, out))?;
            }
            (Target::Plain(dtype), _) => self.assemble_part(&work, *dtype, bytes, out)?,
        }
        let elements = assembly.elements_of(bytes);
        release(&mut self.pages, assembly, &elements);
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
        let (facts, dtype) = (&assignment.facts, assembly.dtype());
        let job = Job { file, name, piece, entered, facts, dtype, stopped };
        let step = method.row().unwrap_or(SUB_TILE).max(1);
        let mut watch = Watch::new(stopped);
        let mut counts = Counts::new(&assignment.counts);
        for start in elements.clone().step_by(step) {
            if !(start / step).is_multiple_of(assignment.stride) {
                continue;
            }
            let elements = start..elements.end.min(start + step);
            watch.pass(elements.len())?;
            let mut tally = Tally { sums: &mut assignment.sums, counts: &mut counts };
            self.assembler.blender.observe(&job, &elements, &mut tally)?;
        }
        counts.flush();
        release_operands(&mut self.pages, &piece.computation, &elements);
        let finished = observation.finish(method, pass, number, assignment.sums);
        finished.map_err(|problem| job.error(problem))
    }

    /// Computes the bytes `part` of a tensor of one piece; a cut may fall inside an element where an input file was not
    /// aligned, and inside a row that has to be blended whole.
    fn compute_part(
        &mut self,
        job: &Job<'_>,
        dtype: Float,
        part: &Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let size = dtype.size();
        let elements = elements_of(part, dtype);
        let mut watch = Watch::new(job.stopped);
        for unit in units(&job.piece.computation, job.piece.region.len(), &elements) {
            let bytes = unit.start * size..unit.end * size;
            watch.pass(unit.len())?;
            if part.start <= bytes.start && bytes.end <= part.end {
                let out = &mut out[bytes.start - part.start..bytes.end - part.start];
                self.assembler
                    .blender
                    .blend(job, unit, |kernels, values| kernels.store(dtype, values, out))?;
                continue;
            }
            let stored = &mut self.stored;
            stored.resize(bytes.len(), 0);
            self.assembler
                .blender
                .blend(job, unit, |kernels, values| kernels.store(dtype, values, stored))?;
            copy_wanted(&bytes, stored, part, out);
        }
        Ok(())
    }

    /// Computes the bytes `part` of a tensor of several pieces.
    fn assemble_part(
        &mut self,
        work: &Work<'_>,
        dtype: Float,
        part: &Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let size = dtype.size();
        let elements = elements_of(part, dtype);
        let mut values = std::mem::take(&mut self.assembled);
        let mut stored = std::mem::take(&mut self.stored);
        for start in elements.clone().step_by(ASSEMBLED) {
            let unit = start..elements.end.min(start + ASSEMBLED);
            values.resize(values.len().max(unit.len()), 0.0);
            self.assembler.numbers(work, &unit, true, &mut values[..unit.len()])?;
            let bytes = unit.start * size..unit.end * size;
            stored.resize(bytes.len(), 0);
            // Each piece has been looked at.
            let _ = self.kernels.store(dtype, &values[..unit.len()], &mut stored);
            copy_wanted(&bytes, &stored, part, out);
        }
        (self.assembled, self.stored) = (values, stored);
        Ok(())
    }
}

/// Gives the pages back, by and by, that these elements of a tensor were computed from.
fn release(pages: &mut Pages, assembly: &Assembly, elements: &Range<usize>) {
    for piece in &assembly.pieces {
        release_operands(pages, &piece.computation, &piece.region.within(elements));
    }
}

/// Gives the pages back, by and by, that these elements of a piece were read from; those of factors went when they were
/// decoded.
fn release_operands(pages: &mut Pages, computation: &Computation, elements: &Range<usize>) {
    if elements.is_empty() {
        return;
    }
    for operand in &computation.operands {
        for (input, bytes) in operand.tensor.done(elements) {
            pages.read(input, &bytes);
        }
        if let Some(rows) = &operand.rows {
            pages.read(&rows.tensor.input, &(0..rows.tensor.input.range.len()));
        }
    }
}
