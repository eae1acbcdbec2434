//! Tiles: aligned spans of an output file, whatever tensors they cut.

use crate::dtype::Float;
use crate::kernels::Kernels;
use crate::plan::{Operand, Operation, OutputTensor, PlannedShard};
use crate::{Error, Result};
use std::ops::Range;

/// Elements that are held as f32 at a time: three such buffers fit a first-level cache of 48 KiB.
const SUB_TILE: usize = 4096;
/// Bytes of the longest element.
const LONGEST_ELEMENT: usize = 8;

/// Fills tiles. Each worker owns one; its buffers are reused for every tile.
#[derive(Debug)]
pub struct TileFiller {
    kernels: Kernels,
    allow_nonfinite: bool,
    operands: Vec<Vec<f32>>,
    blended: Vec<f32>,
    /// Input tensors in which NaN or infinity was met, as `name of path`.
    pub nonfinite_inputs: Vec<String>,
}

impl TileFiller {
    /// A filler that uses these kernels; `allow_nonfinite` lets NaN and infinity of inputs through.
    #[must_use]
    pub fn new(kernels: Kernels, allow_nonfinite: bool) -> Self {
        Self {
            kernels,
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
        let first = shard.tensors.partition_point(|tensor| tensor.range.end <= span.start);
        for tensor in &shard.tensors[first..] {
            if tensor.range.start >= span.end {
                break;
            }
            let start = tensor.range.start.max(span.start);
            let stop = tensor.range.end.min(span.end);
            if start < stop {
                let part = start - tensor.range.start..stop - tensor.range.start;
                self.fill_part(
                    shard,
                    tensor,
                    part,
                    &mut out[start - span.start..stop - span.start],
                )?;
            }
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
            Operation::Copy(operand) => {
                out.copy_from_slice(&operand.bytes()[part.clone()]);
                operand
                    .file
                    .release(operand.range.start + part.start..operand.range.start + part.end);
                Ok(())
            }
            Operation::Convert(_, dtype) | Operation::Merge(_, _, dtype) => {
                let job = Job { shard, tensor, dtype: *dtype };
                self.compute_part(&job, part.clone(), out)?;
                let elements = part.start / dtype.size()..part.end.div_ceil(dtype.size());
                for operand in tensor.operation.operands() {
                    let size = job.input_size(operand);
                    operand.file.release(
                        operand.range.start + elements.start * size
                            ..operand.range.start + elements.end * size,
                    );
                }
                Ok(())
            }
        }
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
            Ok(())
        } else {
            self.compute_fragment(job, position + whole * size..part.end, tail)
        }
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
        let operands = job.tensor.operation.operands();
        while self.operands.len() < operands.len() {
            self.operands.push(vec![0.0; SUB_TILE]);
        }
        for (operand, values) in operands.iter().zip(&mut self.operands) {
            let (dtype, size) = (job.input_dtype(operand), job.input_size(operand));
            let bytes = &operand.bytes()[elements.start * size..elements.end * size];
            self.kernels.load(dtype, bytes, &mut values[..count]);
        }
        let finite = match &job.tensor.operation {
            Operation::Merge(method, operands, dtype) => {
                let slices: Vec<&[f32]> =
                    self.operands[..operands.len()].iter().map(|values| &values[..count]).collect();
                let blended = &mut self.blended[..count];
                method.blend(&self.kernels, &slices, blended);
                self.kernels.store(*dtype, blended, out)
            }
            Operation::Copy(_) | Operation::Convert(..) => {
                self.kernels.store(job.dtype, &self.operands[0][..count], out)
            }
        };
        if finite { Ok(()) } else { self.explain_nonfinite(job, elements) }
    }

    /// Says where NaN or infinity came from; an error unless the inputs had it and that is allowed.
    #[cold]
    fn explain_nonfinite(&mut self, job: &Job<'_>, elements: Range<usize>) -> Result<()> {
        let operands = job.tensor.operation.operands();
        let converting = !matches!(job.tensor.operation, Operation::Merge(..));
        for offset in 0..elements.len() {
            let culprit = operands
                .iter()
                .zip(&self.operands)
                .find(|(_, values)| !values[offset].is_finite())
                .map(|(operand, _)| operand);
            let element = elements.start + offset;
            if let Some(operand) = culprit {
                if !self.allow_nonfinite {
                    return Err(Error::NonFiniteInput {
                        path: operand.path.clone(),
                        tensor: operand.tensor.clone(),
                        element,
                    });
                }
                let name = format!("{} of {}", operand.tensor, operand.path.display());
                if !self.nonfinite_inputs.contains(&name) {
                    self.nonfinite_inputs.push(name);
                }
            } else {
                let value =
                    if converting { self.operands[0][offset] } else { self.blended[offset] };
                // A NaN that finite inputs gave is not below the limit either.
                let finite = value.abs() < job.dtype.overflow();
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

/// What is being computed.
struct Job<'a> {
    shard: &'a PlannedShard,
    tensor: &'a OutputTensor,
    dtype: Float,
}

impl Job<'_> {
    /// The dtype of an operand that is computed with.
    fn input_dtype(&self, operand: &Operand) -> Float {
        // The plan's validation admits only floats here; the output's dtype stands in for the impossible case.
        Float::from_safetensors(operand.dtype).unwrap_or(self.dtype)
    }

    fn input_size(&self, operand: &Operand) -> usize {
        self.input_dtype(operand).size()
    }
}
