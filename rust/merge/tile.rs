//! Tiles: aligned spans of an output file, whatever tensors they cut.

use super::Method;
use super::operand::OperandLoader;
use crate::dtype::Float;
use crate::kernels::Kernels;
use crate::plan::{Operand, Operation, OutputTensor, PlannedShard};
use crate::{Error, Result};
use std::ops::Range;

/// Elements that are held as f32 at a time: the buffers of several operands fit a first-level cache together.
const SUB_TILE: usize = 1024;
/// Bytes of the longest element.
const LONGEST_ELEMENT: usize = 8;

/// Fills tiles. Each worker owns one; its buffers are reused for every tile.
#[derive(Debug)]
pub struct TileFiller {
    kernels: Kernels,
    loader: OperandLoader,
    allow_nonfinite: bool,
    operands: Vec<Vec<f32>>,
    blended: Vec<f32>,
    /// Input tensors in which NaN or infinity was met, as `name of path`.
    pub nonfinite_inputs: Vec<String>,
}

/// One computed tensor.
struct Job<'a> {
    shard: &'a PlannedShard,
    tensor: &'a OutputTensor,
    method: &'a dyn Method,
    operands: &'a [Operand],
    dtype: Float,
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
            nonfinite_inputs: Vec::new(),
        }
    }

    /// Fills `out` with the bytes `span` of the shard's file, then gives the input pages it read back.
    ///
    /// # Errors
    /// [`Error::NonFiniteInput`] and [`Error::NonFiniteResult`].
    pub fn fill(&mut self, shard: &PlannedShard, span: Range<usize>, out: &mut [u8]) -> Result<()> {
        debug_assert_eq!(span.len(), out.len());
        let header = &shard.layout.header;
        if span.start < header.len() {
            let stop = header.len().min(span.end);
            out[..stop - span.start].copy_from_slice(&header[span.start..stop]);
        }
        for (tensor, part) in parts(shard, &span) {
            let start = tensor.range.start + part.start - span.start;
            let out = &mut out[start..start + part.len()];
            self.fill_part(shard, tensor, part, out)?;
        }
        Ok(())
    }

    /// Fills the bytes `part` of one tensor.
    fn fill_part(
        &mut self,
        shard: &PlannedShard,
        tensor: &OutputTensor,
        part: Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        match &tensor.operation {
            Operation::Copy(input) => {
                out.copy_from_slice(&input.bytes()[part.clone()]);
                input.release(part);
            }
            Operation::Compute { method, operands, dtype } => {
                self.loader.enter(tensor);
                let job = Job { shard, tensor, method: &**method, operands, dtype: *dtype };
                self.compute_part(&job, part.clone(), out)?;
                let elements = part.start / dtype.size()..part.end.div_ceil(dtype.size());
                for operand in operands {
                    release(operand, &elements);
                }
            }
        }
        Ok(())
    }

    /// Computes the bytes `part`; a cut may fall inside an element where an input file was not aligned.
    fn compute_part(
        &mut self,
        job: &Job<'_>,
        part: Range<usize>,
        mut out: &mut [u8],
    ) -> Result<()> {
        let size = job.dtype.size();
        let mut position = part.start;
        if !position.is_multiple_of(size) {
            let element = position / size;
            let stop = ((element + 1) * size).min(part.end);
            let (head, rest) = out.split_at_mut(stop - position);
            self.compute_fragment(job, position..stop, head)?;
            (position, out) = (stop, rest);
        }
        let whole = (part.end - position) / size;
        let (body, tail) = out.split_at_mut(whole * size);
        let first = position / size;
        for (number, chunk) in body.chunks_mut(SUB_TILE * size).enumerate() {
            let start = first + number * SUB_TILE;
            self.compute_elements(job, start..start + chunk.len() / size, chunk)?;
        }
        if tail.is_empty() {
            return Ok(());
        }
        self.compute_fragment(job, position + whole * size..part.end, tail)
    }

    /// Computes some of the bytes of one element.
    fn compute_fragment(
        &mut self,
        job: &Job<'_>,
        bytes: Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let size = job.dtype.size();
        let element = bytes.start / size;
        let mut whole = [0; LONGEST_ELEMENT];
        self.compute_elements(job, element..element + 1, &mut whole[..size])?;
        let offset = bytes.start - element * size;
        out.copy_from_slice(&whole[offset..offset + out.len()]);
        Ok(())
    }

    /// Computes at most [`SUB_TILE`] whole elements.
    fn compute_elements(
        &mut self,
        job: &Job<'_>,
        elements: Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let count = elements.len();
        while self.operands.len() < job.operands.len() {
            self.operands.push(vec![0.0; SUB_TILE]);
        }
        for (number, (operand, values)) in job.operands.iter().zip(&mut self.operands).enumerate() {
            self.loader.load(number, operand, elements.clone(), &mut values[..count]);
        }
        let loaded: Vec<&[f32]> =
            self.operands[..job.operands.len()].iter().map(|values| &values[..count]).collect();
        let blended = &mut self.blended[..count];
        job.method.blend(&self.kernels, &loaded, blended);
        if self.kernels.store(job.dtype, blended, out) {
            return Ok(());
        }
        self.explain_nonfinite(job, elements)
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

/// The tensors that a span of the shard's file cuts, each with the bytes of it that lie in the span.
fn parts<'a>(
    shard: &'a PlannedShard,
    span: &Range<usize>,
) -> impl Iterator<Item = (&'a OutputTensor, Range<usize>)> {
    let span = span.clone();
    let first = shard.tensors.partition_point(|tensor| tensor.range.end <= span.start);
    shard.tensors[first..].iter().map_while(move |tensor| {
        let start = tensor.range.start.max(span.start);
        let stop = tensor.range.end.min(span.end);
        (tensor.range.start < span.end).then(|| {
            let offset = tensor.range.start;
            (tensor, start - offset..stop.max(start) - offset)
        })
    })
}

/// Starts to read what a span of the shard's file is made of.
pub(super) fn prefetch(shard: &PlannedShard, span: &Range<usize>) {
    for (tensor, part) in parts(shard, span) {
        match &tensor.operation {
            Operation::Copy(input) => input.prefetch(part),
            Operation::Compute { operands, dtype, .. } => {
                for operand in operands {
                    let size = operand.tensor.dtype.size();
                    let elements = part.start / dtype.size()..part.end.div_ceil(dtype.size());
                    operand.tensor.input.prefetch(elements.start * size..elements.end * size);
                }
            }
        }
    }
}

/// Gives the pages back that these elements of an operand were read from.
fn release(operand: &Operand, elements: &Range<usize>) {
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
