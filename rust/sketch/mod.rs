//! What random columns tell of a module: products of V and Δ with a few dozen of them, and their Gram matrices.
//!
//! With V = W_aligned - W_base and Δ = W_finetuned - W_reference, (d_out, d_in), and K = V·Vᵀ, the quantities that SafeMERGE's
//! cosine is made of are traces of ΔᵀKΔ and ΔᵀK²Δ. A sketch takes them from the columns of Ω, and knows K by what it
//! does to the columns of G. What is made of its moments, intervals above all, is the caller's affair.

mod images;
mod module;
mod normals;
mod passes;

pub use images::{Images, images};
pub use module::Module;
pub use normals::normals;

use crate::kernels::{Cross, Kernels, Sums, Thin};
use crate::{Error, Result};
use passes::{Look, Passes};

/// Rows whose products are summed in float32 before they go into float64.
const GRAM_ROWS: usize = 256;

/// Gram matrices of a sketch, in f64, row by row. Their columns are those of Ω, then those of G.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Columns of Ω, k.
    pub columns: usize,
    /// Columns of G, p.
    pub tests: usize,
    /// [Y | P]ᵀ·[Y | P], [Y | P]ᵀ·K·[Y | P] and [Y | P]ᵀ·K²·[Y | P], each (k + p, k + p).
    pub grams: [Vec<f64>; 3],
    /// QᵀY with Q = K·P, (p, k). It is part of the second Gram matrix as well, but this one is of the Q that R is made of: what
    /// is estimated by means of Q holds for whatever it was rounded to, if that is the same everywhere.
    pub cross: Vec<f64>,
    /// RᵀR with R = ΔᵀQ, (p, p), summed in f64: where the columns of Q are nearly parallel, what they differ by counts.
    pub image: Vec<f64>,
    /// Sums over all elements.
    pub sums: Sums,
}

/// Takes a module through the passes.
///
/// # Errors
/// [`Error::Option`] if its matrices differ in shape, or `factors` is not [Ω | G], (d_in, columns + tests); those of
/// reading; [`Error::Interrupted`] if `stopped` says so.
pub fn measure(
    module: &Module,
    kernels: Kernels,
    factors: &[f32],
    columns: usize,
    tests: usize,
    stopped: &dyn Fn() -> bool,
) -> Result<Moments> {
    let (d_out, d_in) = module.shape()?;
    let width = columns + tests;
    if factors.len() != d_in * width {
        return Err(Error::Option(format!(
            "{} random numbers were given for {width} columns of {d_in}",
            factors.len(),
        )));
    }
    let passes = Passes { module, kernels, factors, stopped };
    let (mut look, sums) = passes.run(columns, tests)?;
    let (cross, image) = (reached(&kernels, &look, columns, tests), image(&kernels, &look, tests));
    let grams = [
        gram(&kernels, d_out, width, &mut look.y, 1.0),
        gram(&kernels, d_in, width, &mut look.z, look.scale),
        gram(&kernels, d_out, width, &mut look.x, look.scale),
    ];
    Ok(Moments { columns, tests, grams, cross, image, sums })
}

/// QᵀY, (p, k), with Q = K·P as it was rounded.
fn reached(kernels: &Kernels, look: &Look, k: usize, p: usize) -> Vec<f64> {
    let mut out = vec![0.0; p * k];
    kernels.add_cross(&mut Cross {
        left: look.x.get(k..).unwrap_or_default(),
        left_columns: p,
        left_step: k + p,
        right: &look.y,
        right_columns: k,
        right_step: k + p,
        out: &mut out,
    });
    out.iter_mut().for_each(|value| *value /= look.scale);
    out
}

/// RᵀR, (p, p), with R = ΔᵀQ.
fn image(kernels: &Kernels, look: &Look, p: usize) -> Vec<f64> {
    let mut out = vec![0.0; p * p];
    if p > 0 {
        kernels.add_cross(&mut Cross {
            left: &look.r,
            left_columns: p,
            left_step: p,
            right: &look.r,
            right_columns: p,
            right_step: p,
            out: &mut out,
        });
    }
    out.iter_mut().for_each(|value| *value /= look.scale * look.scale);
    out
}

/// MᵀM of a matrix M, (rows, width), of which `values` is `scale` times; they are scaled once more, so that no square of
/// them leaves float32's range.
fn gram(kernels: &Kernels, rows: usize, width: usize, values: &mut [f32], scale: f64) -> Vec<f64> {
    let scale = scale * passes::to_unit(values);
    let mut total = vec![0.0_f64; width * width];
    let mut product = vec![0.0_f32; width * width];
    for start in (0..rows).step_by(GRAM_ROWS) {
        let end = rows.min(start + GRAM_ROWS);
        let block = &values[start * width..end * width];
        product.fill(0.0);
        kernels.add_thin(&mut Thin {
            left: block,
            row_step: 1,
            term_step: width,
            right: block,
            right_step: width,
            out: &mut product,
            out_step: width,
            rows: width,
            columns: width,
            terms: end - start,
        });
        for (sum, value) in total.iter_mut().zip(&product) {
            *sum += f64::from(*value);
        }
    }
    total.iter_mut().for_each(|value| *value /= scale * scale);
    total
}
