//! Elements of one piece of a tensor: its operands are loaded, blended, and looked at for NaN and infinity.

use super::entered::EnteredPiece;
use super::loader::{Loading, OperandLoader};
use super::work::SUB_TILE;
use crate::dtype::Float;
use crate::kernels::Kernels;
use crate::methods::{Facts, Slice, Tally};
use crate::plan::{Computation, Piece};
use crate::{Error, Result};
use std::ops::Range;
use std::path::PathBuf;

/// An input tensor in which NaN or infinity was met.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NonFinite {
    /// Its name.
    pub tensor: String,
    /// The file that it lies in.
    pub path: PathBuf,
}

/// One piece of a computed tensor.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    /// The output file, and the tensor in it.
    pub file: &'a str,
    pub name: &'a str,
    pub piece: &'a Piece,
    pub entered: &'a EnteredPiece,
    pub facts: &'a Facts,
    /// The dtype of the tensor.
    pub dtype: Float,
    pub stopped: &'a dyn Fn() -> bool,
}

impl Job<'_> {
    pub(super) fn error(&self, problem: String) -> Error {
        let (file, tensor) = (self.file.to_owned(), self.name.to_owned());
        Error::Merge { file, tensor, problem }
    }

    fn computation(&self) -> &Computation {
        &self.piece.computation
    }
}

/// Blends for one worker; its buffers are reused.
#[derive(Debug)]
pub(super) struct Blender {
    kernels: Kernels,
    loader: OperandLoader,
    allow_nonfinite: bool,
    operands: Vec<Vec<f32>>,
    blended: Vec<f32>,
    /// Input tensors in which NaN or infinity was met.
    pub nonfinite_inputs: Vec<NonFinite>,
}

impl Blender {
    pub(super) fn new(kernels: Kernels, allow_nonfinite: bool) -> Self {
        Self {
            kernels,
            loader: OperandLoader::new(kernels),
            allow_nonfinite,
            operands: Vec::new(),
            blended: vec![0.0; SUB_TILE],
            nonfinite_inputs: Vec::new(),
        }
    }

    /// Adds elements to what an observe pass adds up.
    ///
    /// # Errors
    /// Those of reading the inputs.
    pub(super) fn observe(
        &mut self,
        job: &Job<'_>,
        elements: &Range<usize>,
        tally: &mut Tally<'_, '_>,
    ) -> Result<()> {
        self.load(job, elements)?;
        with_slice(&self.operands, job.computation(), elements, |slice| {
            job.computation().method.observe(&self.kernels, job.facts, slice, tally);
        });
        Ok(())
    }

    /// Computes whole elements of the piece, a sub-tile or a row, and hands the numbers to `store`, which says whether they
    /// are finite as they are stored.
    ///
    /// # Errors
    /// [`Error::NonFiniteInput`], [`Error::NonFiniteResult`], [`Error::Merge`], and those of reading the inputs.
    pub(super) fn blend(
        &mut self,
        job: &Job<'_>,
        elements: Range<usize>,
        store: impl FnOnce(&Kernels, &[f32]) -> bool,
    ) -> Result<()> {
        self.load(job, &elements)?;
        if self.blended.len() < elements.len() {
            self.blended.resize(elements.len(), 0.0);
        }
        let blended = &mut self.blended[..elements.len()];
        let method = &job.computation().method;
        with_slice(&self.operands, job.computation(), &elements, |slice| {
            method.blend(&self.kernels, job.facts, slice, blended)
        })
        .map_err(|problem| job.error(problem))?;
        let finite = store(&self.kernels, blended);
        if finite && (!method.leaves_out() || self.operands_finite(job, elements.len())) {
            return Ok(());
        }
        self.explain_nonfinite(job, elements)
    }

    /// Computes whole elements of the piece into `out`, which is as long; the numbers must be finite, if one is to `look`.
    ///
    /// # Errors
    /// Those of [`Blender::blend`].
    pub(super) fn blend_into(
        &mut self,
        job: &Job<'_>,
        elements: Range<usize>,
        look: bool,
        out: &mut [f32],
    ) -> Result<()> {
        self.load(job, &elements)?;
        let method = &job.computation().method;
        with_slice(&self.operands, job.computation(), &elements, |slice| {
            method.blend(&self.kernels, job.facts, slice, out)
        })
        .map_err(|problem| job.error(problem))?;
        let finite = !look || self.kernels.amax(out).is_finite();
        if finite && (!method.leaves_out() || self.operands_finite(job, elements.len())) {
            return Ok(());
        }
        self.blended.resize(self.blended.len().max(out.len()), 0.0);
        self.blended[..out.len()].copy_from_slice(out);
        self.explain_nonfinite(job, elements)
    }

    /// Loads elements of all operands.
    fn load(&mut self, job: &Job<'_>, elements: &Range<usize>) -> Result<()> {
        let count = elements.len();
        let operands = &job.computation().operands;
        self.operands.resize_with(self.operands.len().max(operands.len()), Vec::new);
        for (number, (operand, values)) in operands.iter().zip(&mut self.operands).enumerate() {
            if values.len() < count {
                values.resize(count.max(SUB_TILE), 0.0);
            }
            let from =
                Loading { number, operand, shared: &job.entered.shared, stopped: job.stopped };
            self.loader.load(&from, elements.clone(), &mut values[..count])?;
        }
        Ok(())
    }

    /// Whether the operands' first loaded elements hold neither NaN nor infinity.
    fn operands_finite(&self, job: &Job<'_>, count: usize) -> bool {
        let operands = &self.operands[..job.computation().operands.len()];
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
            let mut operands = job.computation().operands.iter().zip(&self.operands);
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
                let finite = self.blended[offset].abs() < job.dtype.overflow();
                if !finite {
                    return Err(Error::NonFiniteResult {
                        file: job.file.to_owned(),
                        tensor: job.name.to_owned(),
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
    computation: &Computation,
    elements: &Range<usize>,
    work: impl FnOnce(&Slice<'_>) -> R,
) -> R {
    let loaded = &loaded[..computation.operands.len()];
    let all: Vec<&[f32]> = loaded.iter().map(|values| &values[..elements.len()]).collect();
    let (operands, base) = all.split_at(all.len() - usize::from(computation.has_base));
    work(&Slice { operands, base: base.first().copied(), first: elements.start })
}
