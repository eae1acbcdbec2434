//! Gram matrices: all that means on a sphere need to know of whole tensors.
//!
//! Every such mean is a linear combination of its inputs, whose coefficients follow from their inner products. One
//! observe pass adds those up, in f64; the conclusion is a handful of numbers, whatever the tensor's size.

use super::specification::Target;
use super::{Finding, Request, Slice, Tally, TypedMethod};
use crate::kernels::Kernels;

/// What the vectors are whose inner products count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vectors {
    /// The operands.
    Operands,
    /// The operands less the base.
    Deltas,
    /// The base, then the operands.
    BaseAndOperands,
}

/// The inner products of some vectors; symmetric, held as its lower triangle by rows.
#[derive(Debug, Clone)]
pub(super) struct Gram<'a>(pub &'a [f64]);

/// Numbers of a lower triangle of `count` rows.
pub(super) const fn triangle(count: usize) -> usize {
    count * (count + 1) / 2
}

impl Gram<'_> {
    /// The product of vectors `i` and `j`.
    pub(super) fn dot(&self, i: usize, j: usize) -> f64 {
        let (row, column) = if i < j { (j, i) } else { (i, j) };
        self.0[triangle(row) + column]
    }

    /// The length of a vector.
    pub(super) fn norm(&self, i: usize) -> f64 {
        self.dot(i, i).max(0.0).sqrt()
    }
}

impl Vectors {
    /// Number of vectors for so many operands.
    pub(super) fn count(self, operands: usize) -> usize {
        operands + usize::from(self == Self::BaseAndOperands)
    }

    /// The request of a pass that makes the Gram matrix.
    pub(super) fn request(self, operands: usize) -> Request {
        Request { sums: triangle(self.count(operands)), counts: 0, stride: 1 }
    }

    /// Adds the products of a slice to the triangle.
    pub(super) fn observe(self, kernels: &Kernels, slice: &Slice<'_>, sums: &mut [f64]) {
        self.with(kernels, slice, |vectors| {
            let mut sums = sums.iter_mut();
            for (number, left) in vectors.iter().enumerate() {
                for (right, sum) in vectors[..=number].iter().zip(&mut sums) {
                    *sum += kernels.dot(left, right);
                }
            }
        });
    }

    /// Gives the slice's vectors to `work`.
    fn with<R>(self, kernels: &Kernels, slice: &Slice<'_>, work: impl FnOnce(&[&[f32]]) -> R) -> R {
        let base = slice.base.unwrap_or_default();
        match self {
            Self::Operands => work(slice.operands),
            Self::BaseAndOperands => {
                let vectors: Vec<&[f32]> =
                    std::iter::once(base).chain(slice.operands.iter().copied()).collect();
                work(&vectors)
            }
            Self::Deltas => {
                let mut deltas = vec![0.0; slice.operands.len() * slice.len()];
                let vectors: Vec<&[f32]> = deltas
                    .chunks_exact_mut(slice.len().max(1))
                    .zip(slice.operands)
                    .map(|(delta, operand)| {
                        difference(kernels, operand, base, delta);
                        &*delta
                    })
                    .collect();
                work(&vectors)
            }
        }
    }

    /// The combination of the slice's vectors with these coefficients; of task vectors, added to the base.
    pub(super) fn combine(
        self,
        kernels: &Kernels,
        coefficients: &[f64],
        slice: &Slice<'_>,
        out: &mut [f32],
    ) {
        self.with(kernels, slice, |vectors| {
            match slice.base {
                Some(base) if self == Self::Deltas => out.copy_from_slice(base),
                _ => out.fill(0.0),
            }
            for (vector, &coefficient) in vectors.iter().zip(coefficients) {
                kernels.multiply_add(out, vector, crate::dtype::f64_to_f32(coefficient));
            }
        });
    }
}

/// `left - right`, element by element.
pub(super) fn difference(kernels: &Kernels, left: &[f32], right: &[f32], out: &mut [f32]) {
    kernels.run(
        #[inline(always)]
        || {
            for ((out, left), right) in out.iter_mut().zip(left).zip(right) {
                *out = left - right;
            }
        },
    );
}

/// Coefficients of a combination, from the Gram matrix of the vectors.
pub(super) trait Coefficients: std::fmt::Debug + Send + Sync + 'static {
    /// The coefficients, one for each vector.
    ///
    /// # Errors
    /// A sentence if there is no such combination.
    fn coefficients(&self, gram: &Gram<'_>) -> Result<Vec<f64>, String>;
}

/// A method that combines whole tensors, or their rows, with coefficients that follow from Gram matrices.
#[derive(Debug)]
pub(super) struct Combination<C> {
    /// The rule.
    pub rule: C,
    /// What is combined.
    pub vectors: Vectors,
    /// Number of operands.
    pub operands: usize,
    /// Length of rows that are combined one by one; `None` for the whole tensor at once.
    pub row: Option<usize>,
}

impl<C: Coefficients> TypedMethod for Combination<C> {
    /// A coefficient for each vector; none before they are known.
    type Facts = Vec<f64>;

    fn start(&self) -> Self::Facts {
        Vec::new()
    }

    fn passes(&self) -> usize {
        usize::from(self.row.is_none())
    }

    fn row(&self) -> Option<usize> {
        self.row
    }

    fn request(&self, _: &Self::Facts) -> Request {
        self.vectors.request(self.operands)
    }

    fn observe(
        &self,
        kernels: &Kernels,
        _: &Self::Facts,
        slice: &Slice<'_>,
        tally: &mut Tally<'_, '_>,
    ) {
        self.vectors.observe(kernels, slice, tally.sums);
    }

    fn conclude(
        &self,
        _: &Self::Facts,
        sums: &[f64],
        _: &[u32],
    ) -> Result<Finding<Self::Facts>, String> {
        Ok(Finding { facts: self.rule.coefficients(&Gram(sums))?, settled: true })
    }

    fn blend(
        &self,
        kernels: &Kernels,
        facts: &Self::Facts,
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        if self.row.is_none() {
            self.vectors.combine(kernels, facts, slice, out);
            return Ok(());
        }
        let mut sums = vec![0.0; triangle(self.vectors.count(self.operands))];
        self.vectors.observe(kernels, slice, &mut sums);
        // One bad value would spoil the row, and the rest of it be blamed.
        if sums.iter().any(|sum| !sum.is_finite()) {
            return Err(super::NONFINITE_SUMS.to_owned());
        }
        let coefficients = self.rule.coefficients(&Gram(&sums))?;
        self.vectors.combine(kernels, &coefficients, slice, out);
        Ok(())
    }
}

/// Longest row that is held in memory whole.
const LONGEST_ROW: usize = 1 << 22;

/// The tensor's rows (vectors along its last dimension), for methods that treat each by itself.
///
/// # Errors
/// A sentence if they are too long to be held in memory.
pub(super) fn rows(target: &Target<'_>) -> Result<Option<usize>, String> {
    let columns = target.columns();
    if columns > LONGEST_ROW {
        return Err(format!(
            "its rows have {columns} elements; row by row, at most {LONGEST_ROW} can be merged: choose a method, \
             or parameters, that take whole tensors"
        ));
    }
    Ok(Some(columns))
}
