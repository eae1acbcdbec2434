//! `nuslerp`: spherical interpolation between two models or, with a base, between their task vectors; of whole
//! tensors, of rows or of columns.
//!
//! `t = w₁ / (w₀ + w₁)`, a half where the weights cancel. Parallel and antiparallel vectors are interpolated linearly.
//! As in mergekit, `nuslerp_row_wise` takes vectors along the first dimension, its absence along the last.

use super::gram::{Coefficients, Combination, Gram, Vectors, difference};
use super::linear::WEIGHT;
use super::slerp::arc;
use super::specification::{Base, Default, Kind, Parameter, Scope, Settings, Specification};
use super::{Finding, Method, Request, Slice, Tally};
use crate::kernels::Kernels;

/// `nuslerp` in the table of methods.
pub(super) const NUSLERP: Specification = Specification {
    name: "nuslerp",
    title: "NuSLERP",
    summary: "Spherical interpolation between two models, or between their task vectors if there is a base.",
    reference: "https://github.com/arcee-ai/mergekit",
    base: Base::Optional,
    operands: (2, Some(2)),
    passes: 1,
    parameters: &[&[
        WEIGHT,
        Parameter {
            name: "nuslerp_flatten",
            scope: Scope::Shared,
            kind: Kind::Flag,
            default: Default::Flag(true),
            help: "Treat each tensor as one vector.",
        },
        Parameter {
            name: "nuslerp_row_wise",
            scope: Scope::Shared,
            kind: Kind::Flag,
            default: Default::Flag(false),
            help: "Without flatten: vectors along the first dimension instead of the last.",
        },
    ]],
    make,
};

const LEAST_NORM: f64 = 1e-7;
/// Below this, vectors count as parallel or antiparallel. Rounding the inputs to f32 gives sines of 1e-7; between vectors
/// that are nearly opposite, the arc's coefficients are 1/sine and would magnify nothing but that.
const LEAST_SINE_SQUARED: f64 = 1e-12;
const LEAST_SUM: f64 = 1e-6;
/// Most vectors along the first dimension; each worker holds three sums for each, 12 MiB.
const MOST_COLUMNS: usize = 1 << 19;

#[derive(Debug)]
struct NuSlerp {
    t: f64,
}

fn make(settings: &Settings) -> Result<Box<dyn Method>, String> {
    let weights = settings.numbers("weight", 1.0);
    let sum: f64 = weights.iter().sum();
    let t = if sum.abs() < LEAST_SUM { 0.5 } else { weights[1] / sum };
    let rule = NuSlerp { t };
    let vectors = if settings.base { Vectors::Deltas } else { Vectors::Operands };
    let operands = 2;
    if settings.flag("nuslerp_flatten") {
        return Ok(Box::new(Combination { rule, vectors, operands, row: None }));
    }
    if !settings.flag("nuslerp_row_wise") {
        let row = super::gram::rows(settings)?;
        return Ok(Box::new(Combination { rule, vectors, operands, row }));
    }
    let count = settings.elements() / settings.shape.first().copied().unwrap_or(1).max(1);
    if count > MOST_COLUMNS {
        return Err(format!(
            "nuslerp_row_wise would take {count} vectors along the first dimension; at most {MOST_COLUMNS} can be"
        ));
    }
    Ok(Box::new(ColumnWise { rule, count }))
}

impl Coefficients for NuSlerp {
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
    rule: NuSlerp,
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

impl Method for ColumnWise {
    fn passes(&self) -> usize {
        1
    }

    fn request(&self, _: usize, _: &[f64]) -> Request {
        Request { sums: PRODUCTS * self.count, counts: 0, stride: 1 }
    }

    fn observe(
        &self,
        kernels: &Kernels,
        _: usize,
        _: &[f64],
        slice: &Slice<'_>,
        tally: &mut Tally<'_>,
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

    fn conclude(&self, _: usize, _: &[f64], sums: &[f64], _: &[u32]) -> Result<Finding, String> {
        let mut facts = Vec::with_capacity(2 * self.count);
        for sums in sums.chunks_exact(PRODUCTS) {
            facts.extend(self.rule.coefficients(&Gram(sums))?);
        }
        Ok(Finding { facts, settled: true })
    }

    fn blend(
        &self,
        kernels: &Kernels,
        facts: &[f64],
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        let [left, right] = Self::vectors(kernels, slice);
        for (number, value) in out.iter_mut().enumerate() {
            let column = (slice.first + number) % self.count;
            let [a, b] = [facts[2 * column], facts[2 * column + 1]].map(crate::dtype::f64_to_f32);
            let start = slice.base.map_or(0.0, |base| base[number]);
            *value = right[number].mul_add(b, left[number].mul_add(a, start));
        }
        Ok(())
    }
}
