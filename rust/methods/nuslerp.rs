//! `nuslerp`: spherical interpolation between two models or, with a base, between their task vectors; of whole
//! tensors, of rows or of columns.
//!
//! `t = w₁ / (w₀ + w₁)`, a half where the weights cancel. Parallel and antiparallel vectors are interpolated linearly.
//! As in mergekit, `nuslerp_row_wise` takes vectors along the first dimension, its absence along the last.

use super::gram::{Coefficients, Combination, Gram, Vectors, difference};
use super::linear::WEIGHT;
use super::parameters::{Spec, parameters};
use super::slerp::arc;
use super::specification::{Base, Description, Flag, Given, Rule, Target};
use super::{Finding, Method, Request, Slice, Tally, TypedMethod};
use crate::kernels::Kernels;

parameters! {
    /// Of each model.
    struct Weighted {
        weight: f64 = WEIGHT,
    }
}

parameters! {
    /// Of the merge.
    struct Shared {
        nuslerp_flatten: bool = Spec::flag(true, "Treat each tensor as one vector."),
        nuslerp_row_wise: bool = Spec::flag(
            false,
            "Without flatten: vectors along the first dimension instead of the last.",
        ),
    }
}

const LEAST_NORM: f64 = 1e-7;
/// Below this, vectors count as parallel or antiparallel. Rounding the inputs to f32 gives sines of 1e-7; between vectors
/// that are nearly opposite, the arc's coefficients are 1/sine and would magnify nothing but that.
const LEAST_SINE_SQUARED: f64 = 1e-12;
const LEAST_SUM: f64 = 1e-6;
/// Most vectors along the first dimension; each worker holds three sums for each, 12 MiB.
const MOST_COLUMNS: usize = 1 << 19;

/// `nuslerp` with checked parameters.
#[derive(Debug)]
pub(super) struct NuSlerp {
    arc: Arc,
    shared: Shared,
    vectors: Vectors,
}

/// The place on the arc.
#[derive(Debug, Clone)]
struct Arc {
    t: f64,
}

impl Rule for NuSlerp {
    type Shared = Shared;
    type Operand = Weighted;
    const ABOUT: Description = Description {
        name: "nuslerp",
        title: "NuSLERP",
        summary: "Spherical interpolation between two models, or between their task vectors if there is a base.",
        reference: "https://github.com/arcee-ai/mergekit",
        base: Base::Optional,
        operands: (2, Some(2)),
        passes: 1,
        flags: &[Flag::Sole],
        interpolates: None,
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let [first, second] = given.operands.as_slice() else {
            return Err("`nuslerp` takes two operands".to_owned());
        };
        let sum = first.weight + second.weight;
        let t = if sum.abs() < LEAST_SUM { 0.5 } else { second.weight / sum };
        let vectors = if given.base { Vectors::Deltas } else { Vectors::Operands };
        Ok(Self { arc: Arc { t }, shared: given.shared, vectors })
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        let (rule, vectors, operands) = (self.arc.clone(), self.vectors, 2);
        if self.shared.nuslerp_flatten {
            return Ok(Box::new(Combination { rule, vectors, operands, row: None }));
        }
        if !self.shared.nuslerp_row_wise {
            let row = super::gram::rows(target)?;
            return Ok(Box::new(Combination { rule, vectors, operands, row }));
        }
        let count = target.elements() / target.shape.first().copied().unwrap_or(1).max(1);
        if count > MOST_COLUMNS {
            return Err(format!(
                "nuslerp_row_wise would take {count} vectors along the first dimension; at most {MOST_COLUMNS} can be"
            ));
        }
        Ok(Box::new(ColumnWise { rule, count }))
    }
}

impl Coefficients for Arc {
    fn coefficients(&self, gram: &Gram<'_>) -> Result<Vec<f64>, String> {
        let norms = gram.norm(0).max(LEAST_NORM) * gram.norm(1).max(LEAST_NORM);
        let cosine = (gram.dot(0, 1) / norms).clamp(-1.0, 1.0);
        if 1.0 - cosine * cosine <= LEAST_SINE_SQUARED {
            return Ok(vec![1.0 - self.t, self.t]);
        }
        Ok(arc(cosine, self.t).to_vec())
    }
}

/// Vectors along the first dimension: element `i` belongs to vector `i % count`.
#[derive(Debug)]
struct ColumnWise {
    rule: Arc,
    count: usize,
}

/// Inner products of two vectors.
const PRODUCTS: usize = 3;

impl ColumnWise {
    /// The two vectors of a slice: task vectors if there is a base.
    fn vectors(kernels: &Kernels, slice: &Slice<'_>) -> [Vec<f32>; 2] {
        [0, 1].map(|number| match slice.base {
            Some(base) => {
                let mut delta = vec![0.0; slice.len()];
                difference(kernels, slice.operands[number], base, &mut delta);
                delta
            }
            None => slice.operands[number].to_vec(),
        })
    }
}

impl TypedMethod for ColumnWise {
    /// The coefficients of each pair of vectors; none before they are known.
    type Facts = Vec<[f32; 2]>;

    fn passes(&self) -> usize {
        1
    }

    fn start(&self) -> Self::Facts {
        Vec::new()
    }

    fn request(&self, _: &Self::Facts) -> Request {
        Request { sums: PRODUCTS * self.count, counts: 0, stride: 1 }
    }

    fn observe(
        &self,
        kernels: &Kernels,
        _: &Self::Facts,
        slice: &Slice<'_>,
        tally: &mut Tally<'_, '_>,
    ) {
        let [left, right] = Self::vectors(kernels, slice);
        for (number, (&left, &right)) in left.iter().zip(&right).enumerate() {
            let (left, right) = (f64::from(left), f64::from(right));
            let sums = &mut tally.sums[PRODUCTS * ((slice.first + number) % self.count)..];
            sums[0] += left * left;
            sums[1] += left * right;
            sums[2] += right * right;
        }
    }

    fn conclude(
        &self,
        _: &Self::Facts,
        sums: &[f64],
        _: &[u32],
    ) -> Result<Finding<Self::Facts>, String> {
        let pair = |sums: &[f64]| {
            let coefficients = self.rule.coefficients(&Gram(sums))?;
            let [left, right] = coefficients[..] else {
                return Err("an arc has two coefficients".to_owned());
            };
            Ok([left, right].map(crate::dtype::f64_to_f32))
        };
        let facts = sums.chunks_exact(PRODUCTS).map(pair).collect::<Result<_, _>>()?;
        Ok(Finding { facts, settled: true })
    }

    fn blend(
        &self,
        kernels: &Kernels,
        facts: &Self::Facts,
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        let [left, right] = Self::vectors(kernels, slice);
        for (number, value) in out.iter_mut().enumerate() {
            let [a, b] = facts[(slice.first + number) % self.count];
            let start = slice.base.map_or(0.0, |base| base[number]);
            *value = right[number].mul_add(b, left[number].mul_add(a, start));
        }
        Ok(())
    }
}
