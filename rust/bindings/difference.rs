//! `StoredMatrix` and `Block`: differences of mapped matrices in memory that numpy and torch see without a copy.

use super::error::{detached, to_python};
use crate::difference::{self, Difference};
use crate::kernels::Kernels;
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::ops::Range;

/// Alignment of a block in bytes: a cache line and the widest vector, so that no load of one crosses two lines.
const ALIGNMENT: usize = 64;

/// A 2-D tensor of floats in a mapped file; keeps the mapping alive.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct StoredMatrix {
    pub(super) inner: difference::StoredMatrix,
}

#[pymethods]
impl StoredMatrix {
    #[getter]
    fn shape(&self) -> (usize, usize) {
        self.inner.shape()
    }
}

/// Writable float32 memory that the engine fills and that numpy.asarray takes without a copy.
///
/// Arrays that are made of it keep it alive, and it never moves. What PyO3 checks is that no two threads fill it at
/// once; that nobody looks at such an array meanwhile is up to the caller (analysis/blocks.py: a workspace and its
/// buffers belong to one thread).
#[pyclass(module = "safemerge_fast._engine")]
pub struct Block {
    /// Never resized, so that its address stays.
    values: Vec<f32>,
    /// Where the aligned elements lie.
    aligned: Range<usize>,
}

#[pymethods]
impl Block {
    #[new]
    fn new(elements: usize) -> PyResult<Self> {
        let spare = ALIGNMENT / size_of::<f32>();
        let mut values = Vec::new();
        values.try_reserve_exact(elements.saturating_add(spare)).map_err(|_| {
            PyMemoryError::new_err(format!("no memory for a block of {elements} float32 values"))
        })?;
        values.resize(elements + spare, 0.0);
        let start = values.as_ptr().align_offset(ALIGNMENT);
        Ok(Self { values, aligned: start..start + elements })
    }

    fn __len__(&self) -> usize {
        self.aligned.len()
    }

    #[getter]
    fn __array_interface__<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let values = &mut self.values[self.aligned.clone()];
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", (values.len(),))?;
        interface.set_item("typestr", "<f4")?;
        let read_only = false;
        interface.set_item("data", (values.as_mut_ptr().expose_provenance(), read_only))?;
        Ok(interface)
    }

    #[pyo3(signature = (minuend, subtrahend, rows, columns, *, offset = 0, minuend_squares = false))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python method")]
    fn read_difference(
        &mut self,
        py: Python<'_>,
        minuend: &StoredMatrix,
        subtrahend: &StoredMatrix,
        rows: (usize, usize),
        columns: (usize, usize),
        offset: usize,
        minuend_squares: bool,
    ) -> PyResult<(f64, f64)> {
        let difference = Difference::new(&minuend.inner, &subtrahend.inner)
            .map_err(|error| to_python(py, &error))?;
        let out = &mut self.values[self.aligned.clone()];
        let start = offset.min(out.len());
        let out = &mut out[start..];
        let squares = detached(py, || {
            let (rows, columns) = (rows.0..rows.1, columns.0..columns.1);
            difference.read(&Kernels::detect(), rows, columns, minuend_squares, out)
        })?;
        Ok((squares.difference, squares.minuend))
    }
}
