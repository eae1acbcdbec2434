//! Tiles: aligned spans of an output file, whatever tensors they cut.

use super::observation::{Observation, Observations};
use super::operand::OperandLoader;
use super::queue::Chunk;
use crate::dtype::Float;
use crate::kernels::Kernels;
use crate::methods::{Facts, Method, Slice, Tally};
use crate::plan::{Operand, Operation, OutputTensor, PlannedShard};
use crate::{Error, Result};
use std::ops::Range;

/// Elements that are held as f32 at a time: the buffers of several operands fit a first-level cache together.
const SUB_TILE: usize = 1024;

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

/// Fills tiles. Each worker owns one; its buffers are reused for every tile.
#[derive(Debug)]
pub struct TileFiller {
    kernels: Kernels,
    loader: OperandLoader,
    allow_nonfinite: bool,
    operands: Vec<Vec<f32>>,
    blended: Vec<f32>,
    /// Elements of which not all bytes are wanted.
    stored: Vec<u8>,
    /// Input tensors in which NaN or infinity was met, as `name of path`.
    pub nonfinite_inputs: Vec<String>,
}

/// One computed tensor.
struct Job<'a> {
    shard: &'a PlannedShard,
    tensor: &'a OutputTensor,
    method: &'a dyn Method,
    operands: &'a [Operand],
    has_base: bool,
    dtype: Float,
    facts: &'a Facts,
}

impl Job<'_> {
    fn error(&self, problem: String) -> Error {
        Error::Merge { file: self.shard.file.clone(), tensor: self.tensor.name.clone(), problem }
    }
}

impl TileFiller {
    /// A filler that uses these kernels; `allow_nonfinite` lets NaN and infinity of inputs through.
    #[must_use]
    pub fn new(kernels: Kernels, allow_nonfinite: bool) -> Self {
        Self {
            kernels,
            loader: OperandLoader::new(kernels),
            allow_nonfinite,
            operands: Vec::new(),
            blended: vec![0.0; SUB_TILE],
            stored: Vec::new(),
            nonfinite_inputs: Vec::new(),
        }
    }

    /// Fills `out` with the bytes `span` of the shard's file, then gives the input pages it read back. `known` are the
    /// observations of the shard's tensors; they are waited for until `stopped`.
    ///
    /// # Errors
    /// [`Error::NonFiniteInput`], [`Error::NonFiniteResult`], [`Error::Merge`], [`Error::Interrupted`].
    pub(super) fn fill(
        &mut self,
        shard: &PlannedShard,
        known: &[Option<Observation>],
        span: Range<usize>,
        out: &mut [u8],
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        debug_assert_eq!(span.len(), out.len());
        let header = &shard.layout.header;
        if span.start < header.len() {
            let stop = header.len().min(span.end);
            out[..stop - span.start].copy_from_slice(&header[span.start..stop]);
        }
        for (number, part) in parts(shard, &span) {
            let tensor = &shard.tensors[number];
            let start = tensor.range.start + part.start - span.start;
            let out = &mut out[start..start + part.len()];
            match &tensor.operation {
                Operation::Copy(input) => {
                    input.read(&part, out)?;
                    input.release(part);
                }
                Operation::Compute { method, operands, has_base, dtype } => {
                    let facts = match &known[number] {
                        Some(observation) => observation.facts(stopped)?,
                        None => method.start(),
                    };
                    self.loader.enter(tensor);
                    let (method, has_base, dtype) = (&**method, *has_base, *dtype);
                    let job =
                        Job { shard, tensor, method, operands, has_base, dtype, facts: &facts };
                    self.compute_part(&job, part.clone(), out, &mut Watch::new(stopped))?;
                    release(operands, &elements_of(&part, dtype));
                }
            }
        }
        Ok(())
    }

    /// Observes a chunk of a tensor.
    ///
    /// # Errors
    /// [`Error::Merge`] if the tensor turns out not to be mergeable, [`Error::Interrupted`].
    pub(super) fn observe(
        &mut self,
        shard: &PlannedShard,
        chunk: &Chunk,
        observations: &Observations,
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        let tensor = &shard.tensors[chunk.tensor];
        let Some(observation) = observations.get(chunk.shard, chunk.tensor) else { return Ok(()) };
        let Operation::Compute { method, operands, has_base, dtype } = &tensor.operation else {
            return Ok(());
        };
        let (method, has_base, dtype) = (&**method, *has_base, *dtype);
        let Some(mut assignment) = observation.begin(method, chunk.pass, stopped)? else {
            return Ok(());
        };
        let facts = &assignment.facts;
        let job = Job { shard, tensor, method, operands, has_base, dtype, facts };
        self.loader.enter(tensor);
        // A sample is made of small pieces from many places.
        let whole = if assignment.stride == 1 { OBSERVED } else { SUB_TILE };
        let step = method.row().unwrap_or(whole).max(1);
        let mut watch = Watch::new(stopped);
        for start in chunk.elements.clone().step_by(step) {
            if !(start / step).is_multiple_of(assignment.stride) {
                continue;
            }
            let elements = start..chunk.elements.end.min(start + step);
            watch.pass(elements.len())?;
            self.load(&job, &elements)?;
            let mut tally = Tally { sums: &mut assignment.sums, counts: &assignment.counts };
            with_slice(&self.operands, &job, &elements, |slice| {
                method.observe(&self.kernels, facts, slice, &mut tally);
            });
        }
        release(operands, &chunk.elements);
        let finished = observation.finish(method, chunk.pass, chunk.number, assignment.sums);
        finished.map_err(|problem| job.error(problem))
    }

    /// Computes the bytes `part`; a cut may fall inside an element where an input file was not aligned, and inside a row
    /// that has to be blended whole.
    fn compute_part(
        &mut self,
        job: &Job<'_>,
        part: Range<usize>,
        out: &mut [u8],
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let size = job.dtype.size();
        let elements = elements_of(&part, job.dtype);
        // Without rows, sub-tiles start where the part does.
        let (step, first) = match job.method.row() {
            Some(row) => (row.max(1), elements.start / row.max(1) * row.max(1)),
            None => (SUB_TILE, elements.start),
        };
        let end = job.tensor.range.len() / size;
        for start in (first..elements.end).step_by(step) {
            let stop = if job.method.row().is_some() { end } else { elements.end };
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
        self.operands.resize_with(self.operands.len().max(job.operands.len()), Vec::new);
        for (number, (operand, values)) in job.operands.iter().zip(&mut self.operands).enumerate() {
            if values.len() < count {
                values.resize(count.max(SUB_TILE), 0.0);
            }
            self.loader.load(number, operand, elements.clone(), &mut values[..count])?;
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
        with_slice(&self.operands, job, &elements, |slice| {
            job.method.blend(&self.kernels, job.facts, slice, blended)
        })
        .map_err(|problem| job.error(problem))?;
        let finite = self.kernels.store(job.dtype, blended, out);
        if finite && (!job.method.leaves_out() || self.operands_finite(job, elements.len())) {
            return Ok(());
        }
        self.explain_nonfinite(job, elements)
    }

    /// Whether the operands' first loaded elements hold neither NaN nor infinity.
    fn operands_finite(&self, job: &Job<'_>, count: usize) -> bool {
        let operands = &self.operands[..job.operands.len()];
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
            let mut operands = job.operands.iter().zip(&self.operands);
            if let Some((operand, _)) = operands.find(|(_, values)| !values[offset].is_finite()) {
                let input = &operand.tensor.input;
                if !self.allow_nonfinite {
                    return Err(Error::NonFiniteInput {
                        path: input.path.clone(),
                        tensor: input.tensor.clone(),
                        element,
                        adapted: !operand.low_rank.is_empty() || operand.magnitude.is_some(),
                    });
                }
                let name = format!("{} of {}", input.tensor, input.path.display());
                if !self.nonfinite_inputs.contains(&name) {
                    self.nonfinite_inputs.push(name);
                }
            } else {
                // A NaN that finite inputs gave is not below the limit either.
                let finite = self.blended[offset].abs() < job.dtype.overflow();
                if !finite {
                    return Err(Error::NonFiniteResult {
                        file: job.shard.file.clone(),
                        tensor: job.tensor.name.clone(),
                        element,
                        dtype: format!("{:?}", job.dtype),
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
    job: &Job<'_>,
    elements: &Range<usize>,
    work: impl FnOnce(&Slice<'_>) -> R,
) -> R {
    let all: Vec<&[f32]> =
        loaded[..job.operands.len()].iter().map(|values| &values[..elements.len()]).collect();
    let (operands, base) = all.split_at(all.len() - usize::from(job.has_base));
    work(&Slice { operands, base: base.first().copied(), first: elements.start })
}

/// The elements that some bytes of a tensor are part of.
fn elements_of(bytes: &Range<usize>, dtype: Float) -> Range<usize> {
    bytes.start / dtype.size()..bytes.end.div_ceil(dtype.size())
}

/// The numbers of the tensors that a span of the shard's file cuts, each with the bytes of it that lie in the span.
fn parts<'a>(
    shard: &'a PlannedShard,
    span: &Range<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
    let span = span.clone();
    let first = shard.tensors.partition_point(|tensor| tensor.range.end <= span.start);
    shard.tensors.iter().enumerate().skip(first).map_while(move |(number, tensor)| {
        let start = tensor.range.start.max(span.start);
        let stop = tensor.range.end.min(span.end);
        (tensor.range.start < span.end).then(|| {
            let offset = tensor.range.start;
            (number, start - offset..stop.max(start) - offset)
        })
    })
}

/// Starts to read what a span of the shard's file is made of.
pub(super) fn prefetch_tile(shard: &PlannedShard, span: &Range<usize>) {
    for (number, part) in parts(shard, span) {
        let tensor = &shard.tensors[number];
        match &tensor.operation {
            Operation::Copy(input) => input.prefetch(part),
            Operation::Compute { dtype, .. } => {
                prefetch_elements(tensor, &elements_of(&part, *dtype));
            }
        }
    }
}

/// Starts to read what some elements of a tensor are computed from.
pub(super) fn prefetch_elements(tensor: &OutputTensor, elements: &Range<usize>) {
    let Operation::Compute { operands, .. } = &tensor.operation else { return };
    for operand in operands {
        let size = operand.tensor.dtype.size();
        operand.tensor.input.prefetch(elements.start * size..elements.end * size);
    }
}

/// Gives the pages back that these elements of the operands were read from.
fn release(operands: &[Operand], elements: &Range<usize>) {
    for operand in operands {
        let size = operand.tensor.dtype.size();
        operand.tensor.input.release(elements.start * size..elements.end * size);
        for term in &operand.low_rank {
            // The pages of the other factor went back when it was decoded.
            let left = if term.transpose { &term.a } else { &term.b };
            left.input.release(0..left.input.range.len());
        }
        if let Some(rows) = &operand.rows {
            rows.tensor.input.release(0..rows.tensor.input.range.len());
        }
    }
}
