//! `Matrix` and `Block`: matrices and their differences in memory that numpy and torch see without a copy.

use super::arguments::{json_bytes, shared_sources};
use super::checkpoint::Checkpoint;
use super::error::{detached, interruptible_within, to_python};
use crate::difference::{self, Difference};
use crate::kernels::Kernels;
use crate::plan::schema;
use crate::{Error, Result};
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Alignment of a block in bytes: a cache line and the widest vector, so that no load of one crosses two lines.
const ALIGNMENT: usize = 64;

/// A 2-D tensor of floats that is read in blocks: one that is stored, or a weighted sum of tensors that adapters change.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Matrix {
    inner: Arc<difference::Matrix>,
}

impl Matrix {
    /// The engine's matrix.
    pub(super) fn shared(&self) -> Arc<difference::Matrix> {
        Arc::clone(&self.inner)
    }
}

#[pymethods]
impl Matrix {
    #[new]
    #[pyo3(signature = (name, *, sources, terms))]
    fn from_terms(
        py: Python<'_>,
        name: &str,
        sources: BTreeMap<String, Bound<'_, Checkpoint>>,
        terms: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let sources = shared_sources(&sources);
        let text = json_bytes(terms)?;
        let inner = detached(py, || {
            let terms: Vec<schema::WeightedOperand> =
                serde_json::from_slice(&text).map_err(|e| {
                    Error::Option(format!("the terms of tensor `{name}` are wrong: {e}"))
                })?;
            difference::Matrix::sum(&sources, name, &terms)
        })?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[staticmethod]
    fn stored(py: Python<'_>, checkpoint: &Checkpoint, name: &str) -> PyResult<Self> {
        let inner = difference::Matrix::stored(&checkpoint.inner, name);
        let inner = inner.map_err(|error| to_python(py, &error))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        self.inner.shape()
    }

    #[getter]
    fn dtype(&self) -> String {
        let stored = self.inner.as_stored().map(|operand| operand.tensor.input.dtype.to_string());
        stored.unwrap_or_else(|| "F32".to_owned())
    }

    /// Whether it is a tensor in a mapped file, as it is stored.
    #[getter]
    fn mapped(&self, py: Python<'_>) -> PyResult<bool> {
        detached(py, || match self.inner.as_stored() {
            Some(operand) => Ok(operand.tensor.input.mapped()?.is_some()),
            None => Ok(false),
        })
    }

    #[pyo3(signature = (block, rows, columns, *, offset = 0))]
    fn read(
        &self,
        py: Python<'_>,
        block: &mut Block,
        rows: (usize, usize),
        columns: (usize, usize),
        offset: usize,
    ) -> PyResult<()> {
        let out = block.from(offset);
        interruptible_within(py, |stopped| {
            self.inner.read(&(rows.0..rows.1), &(columns.0..columns.1), stopped, out)
        })
    }

    /// Whether no number is NaN or infinite, as float32.
    fn is_finite(&self, py: Python<'_>) -> PyResult<bool> {
        interruptible_within(py, |stopped| self.inner.is_finite(stopped))
    }

    /// Whether another matrix holds equal numbers, as float32.
    fn equals(&self, py: Python<'_>, other: &Self) -> PyResult<bool> {
        interruptible_within(py, |stopped| self.inner.equals(&other.inner, stopped))
    }

    fn release(&self) {
        self.inner.release();
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

impl Block {
    /// Its elements from this one on.
    fn from(&mut self, offset: usize) -> &mut [f32] {
        let elements = &mut self.values[self.aligned.clone()];
        let start = offset.min(elements.len());
        &mut elements[start..]
    }
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
        minuend: &Matrix,
        subtrahend: &Matrix,
        rows: (usize, usize),
        columns: (usize, usize),
        offset: usize,
        minuend_squares: bool,
    ) -> PyResult<(f64, f64)> {
        let difference = Difference::new(&minuend.inner, &subtrahend.inner)
            .map_err(|error| to_python(py, &error))?;
        let out = self.from(offset);
        let squares = interruptible_within(py, |stopped| -> Result<_> {
            let (rows, columns) = (rows.0..rows.1, columns.0..columns.1);
            difference.read(&Kernels::detect(), &rows, &columns, minuend_squares, stopped, out)
        })?;
        Ok((squares.difference, squares.minuend))
    }
}
