//! `Checkpoint`: headers, and rows of tensors.

use super::error::{detached, to_python};
use crate::checkpoint::{self, InputFile, ReadBackend, TensorEntry};
use crate::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Name, dtype, shape and place of one tensor, from a header.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct TensorInfo {
    entry: TensorEntry,
    file: String,
}

#[pymethods]
impl TensorInfo {
    #[getter]
    fn name(&self) -> &str {
        &self.entry.name
    }

    #[getter]
    fn dtype(&self) -> String {
        self.entry.dtype.to_string()
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.entry.shape)
    }

    #[getter]
    fn file(&self) -> &str {
        &self.file
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.entry.range.len()
    }

    fn __repr__(&self) -> String {
        let TensorEntry { name, dtype, shape, .. } = &self.entry;
        format!("TensorInfo({name:?}, {dtype}, {shape:?}, {:?})", self.file)
    }
}

/// The bytes of some rows of a tensor, read-only: a window on the mapped file, or a copy where files are read by position.
/// numpy.asarray takes it without another copy.
///
/// It keeps the mapping or the copy alive. The stable ABI of Python 3.10 has no buffer protocol, hence the array interface.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Rows {
    bytes: RowBytes,
}

enum RowBytes {
    Mapped(Arc<InputFile>, Range<usize>),
    Read(Vec<u8>),
}

impl Rows {
    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            RowBytes::Mapped(file, range) => {
                file.mapped().map_or(&[], |bytes| &bytes[range.clone()])
            }
            RowBytes::Read(bytes) => bytes,
        }
    }
}

#[pymethods]
impl Rows {
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let bytes = self.bytes();
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", (bytes.len(),))?;
        interface.set_item("typestr", "|u1")?;
        let read_only = true;
        interface.set_item("data", (bytes.as_ptr().addr(), read_only))?;
        Ok(interface)
    }

    fn __len__(&self) -> usize {
        self.bytes().len()
    }
}

/// The validated headers of a checkpoint directory or of one .safetensors file; data is opened when it is asked for.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Checkpoint {
    pub(super) inner: Arc<checkpoint::Checkpoint>,
}

#[pymethods]
impl Checkpoint {
    #[new]
    #[pyo3(signature = (path, *, read_backend = "auto"))]
    fn new(py: Python<'_>, path: PathBuf, read_backend: &str) -> PyResult<Self> {
        let inner = detached(py, || {
            checkpoint::Checkpoint::open_with(&path, ReadBackend::named(read_backend)?)
        })?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn path(&self) -> Cow<'_, str> {
        self.inner.path().to_string_lossy()
    }

    #[getter]
    fn index(&self) -> Option<&str> {
        self.inner.index()
    }

    #[getter]
    fn files(&self) -> Vec<&str> {
        self.inner.shards().iter().map(|shard| shard.name.as_str()).collect()
    }

    #[getter]
    fn tensors(&self) -> Vec<TensorInfo> {
        self.inner.tensors().map(|(shard, entry)| info(shard, entry)).collect()
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    fn __contains__(&self, name: &str) -> bool {
        self.inner.find(name).is_some()
    }

    fn tensor(&self, py: Python<'_>, name: &str) -> PyResult<TensorInfo> {
        let (shard, entry) = self.inner.get(name).map_err(|error| to_python(py, &error))?;
        Ok(info(shard, entry))
    }

    fn identity<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let files = PyDict::new(py);
        for shard in self.inner.shards() {
            let identity = PyDict::new(py);
            identity.set_item("size", shard.header.identity.size)?;
            identity.set_item("mtime_ns", shard.header.identity.mtime_ns)?;
            identity.set_item("header_digest", &shard.header.identity.header_digest)?;
            files.set_item(&shard.name, identity)?;
        }
        Ok(files)
    }

    fn rows(&self, py: Python<'_>, name: &str, start: usize, stop: usize) -> PyResult<Rows> {
        detached(py, || self.find_rows(name, start, stop))
    }

    fn release(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        let release = || {
            let (shard, entry) = self.inner.locate(name)?;
            self.inner.file(shard)?.release(entry.range.clone());
            Ok(())
        };
        detached(py, release)
    }
}

impl Checkpoint {
    fn find_rows(&self, name: &str, start: usize, stop: usize) -> Result<Rows> {
        let (shard, entry) = self.inner.locate(name)?;
        // A scalar is one row.
        let rows = entry.shape.first().copied().unwrap_or(1);
        if start > stop || stop > rows {
            return Err(Error::Option(format!(
                "rows {start} to {stop} of tensor `{name}` were asked for, it has {rows}"
            )));
        }
        let row = entry.range.len().checked_div(rows).unwrap_or(0);
        if row * rows != entry.range.len() {
            return Err(Error::Option(format!(
                "tensor `{name}` has rows that do not fill whole bytes"
            )));
        }
        let first = entry.range.start;
        let range = first + start * row..first + stop * row;
        let file = self.inner.file(shard)?;
        if file.mapped().is_some() {
            return Ok(Rows { bytes: RowBytes::Mapped(file, range) });
        }
        let mut bytes = vec![0; range.len()];
        file.read(range, &mut bytes)?;
        Ok(Rows { bytes: RowBytes::Read(bytes) })
    }
}

fn info(shard: &checkpoint::Shard, entry: &TensorEntry) -> TensorInfo {
    TensorInfo { entry: entry.clone(), file: shard.name.clone() }
}
