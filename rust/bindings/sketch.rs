//! `Columns`: a module's moments, from passes that are fused with its reading.

use super::difference::Matrix;
use super::error::interruptible_within;
use crate::kernels::Kernels;
use crate::sketch;
use crate::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Random columns of one analysis, drawn once for each number of rows and look; and the flag that stops its sketches.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Columns {
    seed: u64,
    drawn: Mutex<HashMap<Draw, Arc<Vec<f32>>>>,
    stopped: AtomicBool,
}

/// What columns are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Draw {
    rows: usize,
    look: u32,
    columns: usize,
}

impl Columns {
    /// The columns of a look, (rows, columns). Different looks, and different numbers of rows, have different streams.
    fn of(&self, draw: Draw) -> Arc<Vec<f32>> {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        let values = drawn.entry(draw).or_insert_with(|| {
            let mut values = vec![0.0; draw.rows * draw.columns];
            sketch::normals(self.seed, draw.look, &mut values);
            Arc::new(values)
        });
        Arc::clone(values)
    }
}

#[pymethods]
impl Columns {
    #[new]
    fn new(seed: u64) -> Self {
        Self { seed, drawn: Mutex::default(), stopped: AtomicBool::new(false) }
    }

    /// Makes the sketches that are under way in other threads end soon, as interrupted.
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// A module's moments: what its passes with the columns of a look give.
    #[pyo3(signature = (base, aligned, finetuned, *, look, columns, tests, against_base = false, transposed = false, simd = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python method")]
    fn measure(
        &self,
        py: Python<'_>,
        base: &Matrix,
        aligned: &Matrix,
        finetuned: &Matrix,
        look: u32,
        columns: usize,
        tests: usize,
        against_base: bool,
        transposed: bool,
        simd: Option<&str>,
    ) -> PyResult<SketchMoments> {
        let module = sketch::Module {
            base: base.shared(),
            aligned: aligned.shared(),
            finetuned: Some(finetuned.shared()),
            against_base,
            transposed,
        };
        let inner = interruptible_within(py, |stopped| -> Result<_> {
            let kernels = simd.map_or_else(|| Ok(Kernels::detect()), Kernels::named)?;
            let stopped = || self.stopped.load(Ordering::Relaxed) || stopped();
            if stopped() {
                return Err(Error::Interrupted);
            }
            let rows = module.shape()?.1;
            let factors = self.of(Draw { rows, look, columns: columns + tests });
            sketch::measure(&module, kernels, &factors, columns, tests, &stopped)
        })?;
        Ok(SketchMoments { inner })
    }

    /// The columns of a look as little-endian float32, (rows, columns) row by row.
    fn draw<'py>(
        &self,
        py: Python<'py>,
        rows: usize,
        look: u32,
        columns: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let values = py.detach(|| self.of(Draw { rows, look, columns }));
        PyBytes::new_with(py, values.len() * size_of::<f32>(), |bytes| {
            for (place, value) in bytes.as_chunks_mut().0.iter_mut().zip(values.iter()) {
                *place = value.to_le_bytes();
            }
            Ok(())
        })
    }
}

/// What V = W_aligned - W_base does to columns, (d_out, width) as little-endian float32 row by row.
#[pyfunction]
#[pyo3(signature = (base, aligned, columns, width, *, transposed = false, simd = None))]
pub fn thin_images(
    py: Python<'_>,
    base: &Matrix,
    aligned: &Matrix,
    columns: &[u8],
    width: usize,
    transposed: bool,
    simd: Option<&str>,
) -> PyResult<ThinImages> {
    let columns: Vec<f32> =
        columns.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
    let (base, aligned) = (base.shared(), aligned.shared());
    let module = sketch::Module { base, aligned, finetuned: None, against_base: false, transposed };
    let inner = interruptible_within(py, |stopped| -> Result<_> {
        let kernels = simd.map_or_else(|| Ok(Kernels::detect()), Kernels::named)?;
        sketch::images(&module, kernels, &columns, width, &|| stopped())
    })?;
    Ok(ThinImages { inner })
}

/// G = Vᵀ·C of columns C, and Gram matrices of it and of V·G.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct ThinImages {
    inner: sketch::Images,
}

#[pymethods]
impl ThinImages {
    /// (d_in, width): G times the scale, as little-endian float32.
    #[getter]
    fn images<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let values = &self.inner.images;
        PyBytes::new_with(py, values.len() * size_of::<f32>(), |bytes| {
            for (place, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *place = value.to_le_bytes();
            }
            Ok(())
        })
    }

    /// What `images` was multiplied by.
    #[getter]
    fn scale(&self) -> f64 {
        self.inner.scale
    }

    /// (2, width, width): GᵀG and HᵀH.
    #[getter]
    fn grams<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        doubles(py, &self.inner.grams.each_ref().map(Vec::as_slice))
    }

    /// ‖V‖².
    #[getter]
    fn v_squares(&self) -> f64 {
        self.inner.sums.v
    }

    /// ‖W_aligned‖².
    #[getter]
    fn weight_squares(&self) -> f64 {
        self.inner.sums.weight
    }
}

/// Gram matrices of a sketch, as little-endian float64 row by row, and exact sums over its elements.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct SketchMoments {
    inner: sketch::Moments,
}

fn doubles<'py>(py: Python<'py>, parts: &[&[f64]]) -> PyResult<Bound<'py, PyBytes>> {
    let count: usize = parts.iter().map(|part| part.len()).sum();
    PyBytes::new_with(py, count * size_of::<f64>(), |bytes| {
        let values = parts.iter().flat_map(|part| part.iter());
        for (place, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
            *place = value.to_le_bytes();
        }
        Ok(())
    })
}

#[pymethods]
impl SketchMoments {
    /// Columns of Ω, k.
    #[getter]
    fn columns(&self) -> usize {
        self.inner.columns
    }

    /// Columns of G, p.
    #[getter]
    fn tests(&self) -> usize {
        self.inner.tests
    }

    /// (3, k + p, k + p): Gram matrices of [Y | P], and of K and K² between them.
    #[getter]
    fn grams<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        doubles(py, &self.inner.grams.each_ref().map(Vec::as_slice))
    }

    /// (p, k): QᵀY with Q = KP.
    #[getter]
    fn cross<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        doubles(py, &[&self.inner.cross])
    }

    /// (p, p): RᵀR.
    #[getter]
    fn image<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        doubles(py, &[&self.inner.image])
    }

    /// ‖V‖².
    #[getter]
    fn v_squares(&self) -> f64 {
        self.inner.sums.v
    }

    /// ‖Δ‖².
    #[getter]
    fn delta_squares(&self) -> f64 {
        self.inner.sums.delta
    }

    /// ‖W_aligned‖².
    #[getter]
    fn weight_squares(&self) -> f64 {
        self.inner.sums.weight
    }

    /// ⟨V, Δ⟩.
    #[getter]
    fn inner(&self) -> f64 {
        self.inner.sums.inner
    }
}
