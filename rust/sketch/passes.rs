//! The passes over a module, fused with its reading: every byte comes from the disk once, nothing of V or Δ is kept.
//!
//! V and Δ are (m, n) = (d_out, d_in). With the columns [Ω | G] drawn for this look, k and p of them, one module takes
//!
//! ```text
//! pass 1    Y = Δ·Ω    P = V·G    Z = Vᵀ·[Y | P]
//! pass 2    [X | Q] = V·Z         R = Δᵀ·Q
//! ```
//!
//! so that X = V·Vᵀ·Y and Q = V·Vᵀ·P. Blocks of rows go through the second-level cache. A module that is stored as
//! (d_in, d_out) takes three passes, because its blocks are columns of V: Y and P; Z and X; R.

use super::module::{Blocks, Module, Place};
use crate::kernels::{Kernels, Sums, Thin};
use crate::{Error, Result};
use std::ops::Range;

/// Bytes of a block of V's rows: it is used twice while it is in the second-level cache.
const BLOCK: usize = 768 << 10;
/// Rows of a block at least, which is what a tile of registers holds, and at most.
const LEAST_ROWS: usize = 8;
const MOST_ROWS: usize = 64;
/// Columns whose part of a thin matrix stays in the second-level cache.
const CHUNK: usize = 1024;

/// What the passes have found out about a module, row by row.
#[derive(Debug)]
pub(super) struct Look {
    /// [Y | P], (m, k + p).
    pub y: Vec<f32>,
    /// Z times the scale, (n, k + p).
    pub z: Vec<f32>,
    /// [X | Q] times the scale, (m, k + p).
    pub x: Vec<f32>,
    /// R times the scale, (n, p).
    pub r: Vec<f32>,
    /// A power of two, against underflow of the products of small weights.
    pub scale: f64,
}

/// Rows of a block of `columns` columns.
fn block_rows(columns: usize) -> usize {
    let rows = BLOCK / (size_of::<f32>() * columns.max(1));
    (rows / LEAST_ROWS * LEAST_ROWS).clamp(LEAST_ROWS, MOST_ROWS)
}

fn steps(extent: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..extent).step_by(step).map(move |start| start..extent.min(start + step))
}

/// A matrix that lies row by row.
pub(super) struct Rows<'a> {
    pub values: &'a [f32],
    pub step: usize,
}

/// Passes over one module, with the buffers that they share.
pub(super) struct Passes<'a> {
    pub module: &'a Module,
    pub kernels: Kernels,
    /// [Ω | G], (n, k + p), or other columns that the module meets.
    pub factors: &'a [f32],
    pub stopped: &'a dyn Fn() -> bool,
}

impl Passes<'_> {
    /// Takes all passes.
    pub(super) fn run(&self, columns: usize, tests: usize) -> Result<(Look, Sums)> {
        let width = columns + tests;
        let (m, n) = self.module.shape()?;
        let mut look = Look {
            y: vec![0.0; m * width],
            z: vec![0.0; n * width],
            x: vec![0.0; m * width],
            r: vec![0.0; n * tests],
            scale: 1.0,
        };
        let sums = if self.module.transposed {
            self.across(columns, tests, &mut look)?
        } else {
            self.along(columns, tests, &mut look)?
        };
        Ok((look, sums))
    }

    /// Reads the module block by block of stored rows. Of one without a fine-tuned matrix there is no Δ.
    pub(super) fn pass(
        &self,
        sums: &mut Option<&mut Sums>,
        mut work: impl FnMut(&Range<usize>, Rows<'_>, Rows<'_>),
    ) -> Result<()> {
        let (rows, columns) = self.module.stored();
        let step = block_rows(columns);
        let mut v = vec![0.0; step * columns];
        let updated = self.module.finetuned.is_some();
        let mut delta = vec![0.0; if updated { step * columns } else { 0 }];
        let mut blocks = Blocks::new(self.module, self.kernels);
        for block in steps(rows, step) {
            if (self.stopped)() {
                return Err(Error::Interrupted);
            }
            let [mut v_place, mut delta_place] =
                [&mut v, &mut delta].map(|values| Place { values, step: columns });
            let every = 0..columns;
            blocks.read(
                &block,
                &every,
                self.stopped,
                &mut v_place,
                &mut delta_place,
                sums.as_deref_mut(),
            )?;
            work(
                &block,
                Rows { values: &v, step: columns },
                Rows { values: &delta, step: columns },
            );
            blocks.done(block.end, block.end == rows);
        }
        Ok(())
    }

    /// Passes over a module that is stored as (d_out, d_in).
    fn along(&self, k: usize, p: usize, look: &mut Look) -> Result<Sums> {
        let width = k + p;
        let mut sums = Sums::default();
        let (y, z) = (&mut look.y, &mut look.z);
        self.pass(&mut Some(&mut sums), |rows, v, delta| {
            let y = &mut y[rows.start * width..rows.end * width];
            let factors = Rows { values: self.factors, step: width };
            self.rows_times(rows.len(), &delta, &factors, 0..k, y, width);
            self.rows_times(rows.len(), &v, &factors, k..width, y, width);
            let y = Rows { values: y, step: width };
            self.transposed_times(rows.len(), &v, &y, 0..width, z, width);
        })?;
        look.scale = scale_of(&sums, &look.y);
        multiply(&mut look.z, look.scale);
        let (x, z, r) = (&mut look.x, &look.z, &mut look.r);
        self.pass(&mut None, |rows, v, delta| {
            let x = &mut x[rows.start * width..rows.end * width];
            let z = Rows { values: z, step: width };
            self.rows_times(rows.len(), &v, &z, 0..width, x, width);
            let x = Rows { values: x, step: width };
            self.transposed_times(rows.len(), &delta, &x, k..width, r, p);
        })?;
        Ok(sums)
    }

    /// Passes over a module that is stored as (d_in, d_out).
    fn across(&self, k: usize, p: usize, look: &mut Look) -> Result<Sums> {
        let width = k + p;
        let mut sums = Sums::default();
        let y = &mut look.y;
        self.pass(&mut Some(&mut sums), |rows, v, delta| {
            let factors = &self.factors[rows.start * width..rows.end * width];
            let factors = Rows { values: factors, step: width };
            self.transposed_times(rows.len(), &delta, &factors, 0..k, y, width);
            // P stands behind Y in each row.
            self.transposed_times(rows.len(), &v, &factors, k..width, &mut y[k..], width);
        })?;
        let (y, z, x) = (&look.y, &mut look.z, &mut look.x);
        let scale = scale_of(&sums, y);
        self.pass(&mut None, |rows, v, _| {
            let z = &mut z[rows.start * width..rows.end * width];
            let y = Rows { values: y, step: width };
            self.rows_times(rows.len(), &v, &y, 0..width, z, width);
            multiply(z, scale);
            let z = Rows { values: z, step: width };
            self.transposed_times(rows.len(), &v, &z, 0..width, x, width);
        })?;
        look.scale = scale;
        if p > 0 {
            let (x, r) = (&look.x, &mut look.r);
            self.pass(&mut None, |rows, _, delta| {
                let x = Rows { values: &x[k..], step: width };
                let r = &mut r[rows.start * p..rows.end * p];
                self.rows_times(rows.len(), &delta, &x, 0..p, r, p);
            })?;
        }
        Ok(sums)
    }

    /// `out[i][columns] += Σ_j block[i][j] · factor[j][columns]`; out has the factor's columns.
    pub(super) fn rows_times(
        &self,
        rows: usize,
        block: &Rows<'_>,
        factor: &Rows<'_>,
        columns: Range<usize>,
        out: &mut [f32],
        out_step: usize,
    ) {
        for terms in steps(self.module.stored().1, CHUNK) {
            self.kernels.add_thin(&mut Thin {
                left: &block.values[terms.start..],
                row_step: block.step,
                term_step: 1,
                right: &factor.values[terms.start * factor.step + columns.start..],
                right_step: factor.step,
                out: &mut out[columns.start..],
                out_step,
                rows,
                columns: columns.len(),
                terms: terms.len(),
            });
        }
    }

    /// `out[j][·] += Σ_i block[i][j] · factor[i][columns]`; out has just these columns.
    pub(super) fn transposed_times(
        &self,
        rows: usize,
        block: &Rows<'_>,
        factor: &Rows<'_>,
        columns: Range<usize>,
        out: &mut [f32],
        out_step: usize,
    ) {
        if columns.is_empty() {
            return;
        }
        for chunk in steps(self.module.stored().1, CHUNK) {
            self.kernels.add_thin(&mut Thin {
                left: &block.values[chunk.start..],
                row_step: 1,
                term_step: block.step,
                right: &factor.values[columns.start..],
                right_step: factor.step,
                out: &mut out[chunk.start * out_step..],
                out_step,
                rows: chunk.len(),
                columns: columns.len(),
                terms: rows,
            });
        }
    }
}

/// The power of two that brings V's product with something to a size of at most 1.
pub(super) fn scale_of(sums: &Sums, thin: &[f32]) -> f64 {
    power_of_two((sums.v * squares(thin)).sqrt())
}

/// Multiplies numbers by the power of two that brings their norm to about 1, and returns it.
pub(super) fn to_unit(values: &mut [f32]) -> f64 {
    let scale = power_of_two(squares(values).sqrt());
    multiply(values, scale);
    scale
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value) * f64::from(value)).sum()
}

/// The power of two next to the reciprocal of a positive size, within float32's range; 1 of anything else.
fn power_of_two(size: f64) -> f64 {
    if !(size.is_finite() && size > 0.0) {
        return 1.0;
    }
    (-size.log2().round()).clamp(-100.0, 100.0).exp2()
}

#[expect(clippy::cast_possible_truncation, reason = "a power of two within float32's range")]
pub(super) fn multiply(values: &mut [f32], scale: f64) {
    values.iter_mut().for_each(|value| *value *= scale as f32);
}
