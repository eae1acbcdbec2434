//! Tiles: aligned spans of an output file, whatever tensors they cut.

use super::entered::Entered;
use super::loader::{Loading, OperandLoader};
use super::pages::Pages;
use super::queue::{Chunk, Tile};
use super::work::{SUB_TILE, chunks, elements_of, parts};
use crate::kernels::Kernels;
use crate::methods::{Facts, Slice, Tally};
use crate::plan::{Computation, Operand, Operation, Plan, PlannedShard};
use crate::{Error, Result};
use std::ops::Range;
use std::path::PathBuf;

/// Elements that an observe pass looks at together where it looks at all: what it hands on each time costs.
const OBSERVED: usize = 4 * SUB_TILE;

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

/// An input tensor in which NaN or infinity was met.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NonFinite {
    /// Its name.
    pub tensor: String,
    /// The file that it lies in.
    pub path: PathBuf,
}

/// Fills tiles. Each worker owns one; its buffers are reused for every tile.
#[derive(Debug)]
pub(super) struct TileFiller {
    kernels: Kernels,
    loader: OperandLoader,
    allow_nonfinite: bool,
    operands: Vec<Vec<f32>>,
    blended: Vec<f32>,
    /// Elements of which not all bytes are wanted.
    stored: Vec<u8>,
    pages: Pages,
    /// Input tensors in which NaN or infinity was met.
    pub nonfinite_inputs: Vec<NonFinite>,
}

/// One computed tensor.
#[derive(Clone, Copy)]
struct Job<'a> {
    file: &'a str,
    tensor: &'a Entered,
    computation: &'a Computation,
    facts: &'a Facts,
    stopped: &'a dyn Fn() -> bool,
}

impl Job<'_> {
    fn error(&self, problem: String) -> Error {
        let tensor = self.tensor.output.name.clone();
        Error::Merge { file: self.file.to_owned(), tensor, problem }
    }
}

impl TileFiller {
    /// A filler that uses these kernels; `allow_nonfinite` lets NaN and infinity of inputs through.
    pub(super) fn new(kernels: Kernels, allow_nonfinite: bool) -> Self {
        Self {
            kernels,
            loader: OperandLoader::new(kernels),
            allow_nonfinite,
            operands: Vec::new(),
            blended: vec![0.0; SUB_TILE],
            stored: Vec::new(),
            pages: Pages::default(),
            nonfinite_inputs: Vec::new(),
        }
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
        let computation = match &tensor.output.operation {
            Operation::Copy(input) => {
                input.read(bytes, out)?;
                self.pages.read(input, bytes);
                return Ok(());
            }
            Operation::Compute(computation) => computation,
        };
        let facts = match &tensor.observation {
            Some(observation) => observation.facts(stopped)?,
            None => computation.method.start(),
        };
        let job = Job { file, tensor, computation, facts: &facts, stopped };
        self.compute_part(&job, bytes.clone(), out)?;
        self.release(&computation.operands, &elements_of(bytes, computation.dtype));
        Ok(())
    }

    /// Takes all observe passes over a tensor that nobody else works on.
    fn observe_whole(
        &mut self,
        file: &str,
        tensor: &Entered,
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        let Some(computation) = tensor.computation() else { return Ok(()) };
        for pass in 0..computation.method.passes() {
            let chunks = chunks(tensor.elements(), computation.method.row());
            for (number, elements) in chunks.enumerate() {
                self.observe_elements(file, tensor, pass, number, elements, stopped)?;
            }
        }
        Ok(())
    }

    /// Observes a chunk of a tensor.
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
        let Chunk { tensor, pass, number, elements } = chunk;
        self.observe_elements(&shard.file, tensor, *pass, *number, elements.clone(), stopped)?;
        self.pages.give_back();
        Ok(())
    }

    fn observe_elements(
        &mut self,
        file: &str,
        tensor: &Entered,
        pass: usize,
        number: usize,
        elements: Range<usize>,
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        let (Some(observation), Some(computation)) = (&tensor.observation, tensor.computation())
        else {
            return Ok(());
        };
        let method = &*computation.method;
        let Some(mut assignment) = observation.begin(method, pass, stopped)? else {
            return Ok(());
        };
        let facts = &assignment.facts;
        let job = Job { file, tensor, computation, facts, stopped };
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
            self.load(&job, &elements)?;
            let mut tally = Tally { sums: &mut assignment.sums, counts: &assignment.counts };
            with_slice(&self.operands, computation, &elements, |slice| {
                method.observe(&self.kernels, facts, slice, &mut tally);
            });
        }
        self.release(&computation.operands, &elements);
        let finished = observation.finish(method, pass, number, assignment.sums);
        finished.map_err(|problem| job.error(problem))
    }

    /// Computes the bytes `part`; a cut may fall inside an element where an input file was not aligned, and inside a row
    /// that has to be blended whole.
    fn compute_part(&mut self, job: &Job<'_>, part: Range<usize>, out: &mut [u8]) -> Result<()> {
        let Computation { method, dtype, .. } = job.computation;
        let size = dtype.size();
        let elements = elements_of(&part, *dtype);
        let mut watch = Watch::new(job.stopped);
        // Without rows, sub-tiles start where the part does.
        let (step, first) = match method.row() {
            Some(row) => (row.max(1), elements.start / row.max(1) * row.max(1)),
            None => (SUB_TILE, elements.start),
        };
        let end = job.tensor.elements();
        for start in (first..elements.end).step_by(step) {
            let stop = if method.row().is_some() { end } else { elements.end };
            let unit = start..stop.min(start + step);
            let bytes = unit.start * size..unit.end * size;
            watch.pass(unit.len())?;
            if part.start <= bytes.start && bytes.end <= part.end {
                let place = bytes.start - part.start..bytes.end - part.start;
                self.compute_elements(job, unit, &mut out[place])?;
                continue;
            }
            let mut stored = std::mem::take(&mut self.stored);
            stored.resize(bytes.len(), 0);
            self.compute_elements(job, unit, &mut stored)?;
            let wanted = bytes.start.max(part.start)..bytes.end.min(part.end);
            out[wanted.start - part.start..wanted.end - part.start]
                .copy_from_slice(&stored[wanted.start - bytes.start..wanted.end - bytes.start]);
            self.stored = stored;
        }
        Ok(())
    }

    /// Loads elements of all operands.
    fn load(&mut self, job: &Job<'_>, elements: &Range<usize>) -> Result<()> {
        let count = elements.len();
        let operands = &job.computation.operands;
        self.operands.resize_with(self.operands.len().max(operands.len()), Vec::new);
        for (number, (operand, values)) in operands.iter().zip(&mut self.operands).enumerate() {
            if values.len() < count {
                values.resize(count.max(SUB_TILE), 0.0);
            }
            let from =
                Loading { number, operand, shared: &job.tensor.shared, stopped: job.stopped };
            self.loader.load(&from, elements.clone(), &mut values[..count])?;
        }
        Ok(())
    }

    /// Computes whole elements: a sub-tile, or a row.
    fn compute_elements(
        &mut self,
        job: &Job<'_>,
        elements: Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        self.load(job, &elements)?;
        if self.blended.len() < elements.len() {
            self.blended.resize(elements.len(), 0.0);
        }
        let blended = &mut self.blended[..elements.len()];
        let Computation { method, dtype, .. } = job.computation;
        with_slice(&self.operands, job.computation, &elements, |slice| {
            method.blend(&self.kernels, job.facts, slice, blended)
        })
        .map_err(|problem| job.error(problem))?;
        let finite = self.kernels.store(*dtype, blended, out);
        if finite && (!method.leaves_out() || self.operands_finite(job, elements.len())) {
            return Ok(());
        }
        self.explain_nonfinite(job, elements)
    }

    /// Gives the pages back, by and by, that these elements of the operands were read from; those of factors went when
    /// they were decoded.
    fn release(&mut self, operands: &[Operand], elements: &Range<usize>) {
        for operand in operands {
            self.pages.read(&operand.tensor.input, &operand.tensor.place(elements));
            if let Some(rows) = &operand.rows {
                self.pages.read(&rows.tensor.input, &(0..rows.tensor.input.range.len()));
            }
        }
    }

    /// Whether the operands' first loaded elements hold neither NaN nor infinity.
    fn operands_finite(&self, job: &Job<'_>, count: usize) -> bool {
        let operands = &self.operands[..job.computation.operands.len()];
        self.kernels.run(
            #[inline(always)]
            || {
                let finite = |values: &Vec<f32>| {
                    values[..count].iter().fold(true, |finite, value| finite & value.is_finite())
                };
                operands.iter().all(finite)
            },
        )
    }

    /// Says where NaN or infinity came from; an error unless the inputs had it and that is allowed.
    #[cold]
    fn explain_nonfinite(&mut self, job: &Job<'_>, elements: Range<usize>) -> Result<()> {
        for (offset, element) in elements.enumerate() {
            let mut operands = job.computation.operands.iter().zip(&self.operands);
            if let Some((operand, _)) = operands.find(|(_, values)| !values[offset].is_finite()) {
                let input = &operand.tensor.input;
                if !self.allow_nonfinite {
                    return Err(Error::NonFiniteInput {
                        path: input.path().to_owned(),
                        tensor: input.tensor.clone(),
                        element,
                        adapted: !operand.low_rank.is_empty() || operand.magnitude.is_some(),
                    });
                }
                let place =
                    NonFinite { tensor: input.tensor.clone(), path: input.path().to_owned() };
                if !self.nonfinite_inputs.contains(&place) {
                    self.nonfinite_inputs.push(place);
                }
            } else {
                // A NaN that finite inputs gave is not below the limit either.
                let finite = self.blended[offset].abs() < job.computation.dtype.overflow();
                if !finite {
                    return Err(Error::NonFiniteResult {
                        file: job.file.to_owned(),
                        tensor: job.tensor.output.name.clone(),
                        element,
                        dtype: format!("{:?}", job.computation.dtype),
                    });
                }
            }
        }
        Ok(())
    }
}

/// Gives the loaded elements to `work`.
fn with_slice<R>(
    loaded: &[Vec<f32>],
    computation: &Computation,
    elements: &Range<usize>,
    work: impl FnOnce(&Slice<'_>) -> R,
) -> R {
    let loaded = &loaded[..computation.operands.len()];
    let all: Vec<&[f32]> = loaded.iter().map(|values| &values[..elements.len()]).collect();
    let (operands, base) = all.split_at(all.len() - usize::from(computation.has_base));
    work(&Slice { operands, base: base.first().copied(), first: elements.start })
}
