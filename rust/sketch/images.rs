//! What V does to given columns: the products that ρ of a low-rank update is made of.
//!
//! With V = W_aligned - W_base, (d_out, d_in), and columns C, (d_out, w), these are G = Vᵀ·C and H = V·G. Blocks of rows go
//! through the second-level cache, as in a sketch; a module that is stored as (d_out, d_in) takes two passes, another one.

use super::module::Module;
use super::passes::{Passes, Rows, multiply, scale_of, to_unit};
use crate::kernels::{Cross, Kernels, Sums};
use crate::{Error, Result};

/// Products of V with columns, and their Gram matrices.
#[derive(Debug, Clone, PartialEq)]
pub struct Images {
    /// Number of columns, w.
    pub columns: usize,
    /// G times the scale, (d_in, w).
    pub images: Vec<f32>,
    /// A power of two, against underflow of the products of small weights.
    pub scale: f64,
    /// GᵀG and HᵀH, each (w, w), summed in f64.
    pub grams: [Vec<f64>; 2],
    /// Sums over all elements: ‖V‖² and ‖W_aligned‖².
    pub sums: Sums,
}

/// Takes columns, (d_out, w) row by row, through V.
///
/// # Errors
/// [`Error::Option`] if the matrices differ in shape, or the columns are not such; those of reading;
/// [`Error::Interrupted`] if `stopped` says so.
pub fn images(
    module: &Module,
    kernels: Kernels,
    columns: &[f32],
    width: usize,
    stopped: &dyn Fn() -> bool,
) -> Result<Images> {
    let (d_out, d_in) = module.shape()?;
    if columns.len() != d_out * width {
        return Err(Error::Option(format!(
            "{} numbers were given for {width} columns of {d_out}",
            columns.len(),
        )));
    }
    let passes = Passes { module, kernels, factors: columns, stopped };
    let (mut first, mut second) = (vec![0.0; d_in * width], vec![0.0; d_out * width]);
    let run = if module.transposed { across } else { along };
    let (sums, scale) = run(&passes, width, &mut first, &mut second)?;
    let grams = [gram(&kernels, first.clone(), width, scale), gram(&kernels, second, width, scale)];
    Ok(Images { columns: width, images: first, scale, grams, sums })
}

/// G and H of a module that is stored as (d_out, d_in), a pass for each; the sums, and what both were scaled by.
fn along(
    passes: &Passes<'_>,
    width: usize,
    first: &mut [f32],
    second: &mut [f32],
) -> Result<(Sums, f64)> {
    let mut sums = Sums::default();
    passes.pass(&mut Some(&mut sums), |rows, v, _| {
        let columns = &passes.factors[rows.start * width..rows.end * width];
        let columns = Rows { values: columns, step: width };
        passes.transposed_times(rows.len(), &v, &columns, 0..width, first, width);
    })?;
    let scale = scale_of(&sums, first);
    multiply(first, scale);
    passes.pass(&mut None, |rows, v, _| {
        let images = Rows { values: &*first, step: width };
        let out = &mut second[rows.start * width..rows.end * width];
        passes.rows_times(rows.len(), &v, &images, 0..width, out, width);
    })?;
    Ok((sums, scale))
}

/// The same of a module that is stored as (d_in, d_out): a block of its rows gives its part of G and of H.
fn across(
    passes: &Passes<'_>,
    width: usize,
    first: &mut [f32],
    second: &mut [f32],
) -> Result<(Sums, f64)> {
    let (mut sums, mut scale) = (Sums::default(), None);
    passes.pass(&mut Some(&mut sums), |rows, v, _| {
        let columns = Rows { values: passes.factors, step: width };
        let images = &mut first[rows.start * width..rows.end * width];
        passes.rows_times(rows.len(), &v, &columns, 0..width, images, width);
        // By the first rows that are not zero: all are of a size.
        if scale.is_none() && images.iter().any(|&value| value != 0.0) {
            scale = Some(to_unit(images));
        } else {
            multiply(images, scale.unwrap_or(1.0));
        }
        let images = Rows { values: images, step: width };
        passes.transposed_times(rows.len(), &v, &images, 0..width, second, width);
    })?;
    Ok((sums, scale.unwrap_or(1.0)))
}

/// MᵀM of a matrix of which `values` is `scale` times; they are scaled once more, so that no square leaves float32's range.
fn gram(kernels: &Kernels, mut values: Vec<f32>, width: usize, scale: f64) -> Vec<f64> {
    let scale = scale * to_unit(&mut values);
    let mut out = vec![0.0; width * width];
    if width > 0 {
        kernels.add_cross(&mut Cross {
            left: &values,
            left_columns: width,
            left_step: width,
            right: &values,
            right_columns: width,
            right_step: width,
            out: &mut out,
        });
    }
    out.iter_mut().for_each(|value| *value /= scale * scale);
    out
}
