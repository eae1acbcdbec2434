//! The module that is sketched: three matrices of one shape, read as V and Δ.

use crate::difference::Matrix;
use crate::kernels::{Kernels, Models, RUN, Sums};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of float32 that are read between two releases of what was read.
const RELEASE: usize = 4 << 20;

/// A module: base, aligned and fine-tuned weights, stored alike.
#[derive(Debug)]
pub struct Module {
    /// The base model's matrix.
    pub base: Arc<Matrix>,
    /// The aligned model's.
    pub aligned: Arc<Matrix>,
    /// The fine-tuned model's; `None` if Δ is not read.
    pub finetuned: Option<Arc<Matrix>>,
    /// Whether Δ is taken against base, not against aligned.
    pub against_base: bool,
    /// Whether it is stored as (d_in, d_out).
    pub transposed: bool,
}

impl Module {
    /// (d_out, d_in).
    ///
    /// # Errors
    /// [`Error::Option`] if the matrices differ in shape.
    pub fn shape(&self) -> Result<(usize, usize)> {
        let shape = self.aligned.shape();
        for other in [Some(&self.base), self.finetuned.as_ref()].into_iter().flatten() {
            if other.shape() != shape {
                return Err(Error::Option(format!(
                    "tensors `{}` and `{}` have the shapes {shape:?} and {:?}; a module needs one shape",
                    self.aligned.name(),
                    other.name(),
                    other.shape(),
                )));
            }
        }
        let (rows, columns) = shape;
        Ok(if self.transposed { (columns, rows) } else { (rows, columns) })
    }

    /// The shape as it is stored, (rows, columns).
    pub(super) fn stored(&self) -> (usize, usize) {
        self.aligned.shape()
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let all = [Some(&self.base), Some(&self.aligned), self.finetuned.as_ref()];
        all.into_iter().flatten().map(|matrix| &**matrix)
    }
}

/// Where a block of a difference goes: rows of `step` elements each.
pub(super) struct Place<'a> {
    pub values: &'a mut [f32],
    pub step: usize,
}

/// Reads blocks of a module's V and Δ, for one pass over it in ascending rows.
pub(super) struct Blocks<'a> {
    module: &'a Module,
    kernels: Kernels,
    columns: usize,
    /// Elements before this one are given back.
    given_back: usize,
    base: [f32; RUN],
    aligned: [f32; RUN],
    finetuned: [f32; RUN],
    /// Δ where it is not read: base less itself.
    nothing: [f32; RUN],
}

impl<'a> Blocks<'a> {
    pub(super) fn new(module: &'a Module, kernels: Kernels) -> Self {
        let columns = module.aligned.shape().1;
        Self {
            module,
            kernels,
            columns,
            given_back: 0,
            base: [0.0; RUN],
            aligned: [0.0; RUN],
            finetuned: [0.0; RUN],
            nothing: [0.0; RUN],
        }
    }

    /// Reads a block of V and Δ, and adds to their sums where they are wanted.
    pub(super) fn read(
        &mut self,
        rows: &Range<usize>,
        columns: &Range<usize>,
        stopped: &dyn Fn() -> bool,
        v: &mut Place<'_>,
        delta: &mut Place<'_>,
        mut sums: Option<&mut Sums>,
    ) -> Result<()> {
        let module = self.module;
        let updated = module.finetuned.is_some();
        for (number, row) in rows.clone().enumerate() {
            for first in columns.clone().step_by(RUN) {
                let count = RUN.min(columns.end - first);
                let start = row * self.columns + first;
                let elements = start..start + count;
                let buffers = [&mut self.base, &mut self.aligned, &mut self.finetuned];
                for (matrix, buffer) in module.matrices().zip(buffers) {
                    matrix.load(elements.clone(), stopped, &mut buffer[..count])?;
                }
                let models = Models {
                    base: &self.base[..count],
                    aligned: &self.aligned[..count],
                    finetuned: if updated { &self.finetuned[..count] } else { &self.base[..count] },
                    against_base: module.against_base || !updated,
                };
                let at = first - columns.start;
                let v = &mut v.values[number * v.step + at..][..count];
                let delta = if updated {
                    &mut delta.values[number * delta.step + at..][..count]
                } else {
                    &mut self.nothing[..count]
                };
                self.kernels.updates(&models, v, delta, sums.as_deref_mut());
            }
        }
        Ok(())
    }

    /// Gives back what lies before a row, once that is worth while.
    pub(super) fn done(&mut self, before: usize, last: bool) {
        let end = before * self.columns;
        if last || (end - self.given_back) * size_of::<f32>() >= RELEASE {
            let elements = self.given_back..end;
            self.module.matrices().for_each(|matrix| matrix.done(&elements));
            self.given_back = end;
        }
    }
}
