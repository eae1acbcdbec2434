//! `Output`: the locked output directory.

use super::error::detached;
use crate::writer;
use crate::{Error, Result};
use pyo3::prelude::*;
use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// An output directory, locked, with a journal of the shards that are committed in it.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Output {
    path: PathBuf,
    /// `None` once closed. Shared with running executions, which keep the lock until they end.
    inner: Mutex<Option<Arc<writer::Output>>>,
}

impl Output {
    pub(super) fn get(&self) -> Result<Arc<writer::Output>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.clone().ok_or_else(|| Error::Output {
            path: self.path.clone(),
            problem: "is closed; open it again to write to it".to_owned(),
        })
    }
}

#[pymethods]
impl Output {
    #[new]
    #[pyo3(signature = (path, *, inputs = Vec::new(), resume = false, overwrite = false))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        inputs: Vec<PathBuf>,
        resume: bool,
        overwrite: bool,
    ) -> PyResult<Self> {
        let inputs = inputs.iter().map(PathBuf::as_path);
        let inner = detached(py, || writer::Output::open(&path, inputs, resume, overwrite))?;
        Ok(Self { path: inner.path().to_owned(), inner: Mutex::new(Some(Arc::new(inner))) })
    }

    #[getter]
    fn path(&self) -> Cow<'_, str> {
        self.path.to_string_lossy()
    }

    #[getter]
    fn committed(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        detached(py, || Ok(self.get()?.committed()))
    }

    fn write_file(&self, py: Python<'_>, name: &str, data: &[u8]) -> PyResult<()> {
        detached(py, || self.get()?.write_file(name, data))
    }

    fn copy_file(&self, py: Python<'_>, source: PathBuf, name: &str) -> PyResult<()> {
        detached(py, || self.get()?.copy_file(&source, name))
    }

    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.get()?.finish())?;
        self.close();
        Ok(())
    }

    fn close(&self) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
