//! `Checkpoint`: headers, and rows of tensors.

use super::error::{detached, to_python};
use crate::checkpoint::{self, InputFile, ReadBackend, Shard, TensorEntry, TensorId};
use crate::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Name, dtype, shape and place of one tensor, from a header. A reference into the checkpoint's tables.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct TensorInfo {
    checkpoint: Arc<checkpoint::Checkpoint>,
    id: TensorId,
}

impl TensorInfo {
    fn entry(&self) -> (&Shard, TensorEntry<'_>) {
        self.checkpoint.entry(self.id)
    }
}

#[pymethods]
impl TensorInfo {
    #[getter]
    fn name(&self) -> &str {
        self.entry().1.name
    }

    #[getter]
    fn dtype(&self) -> String {
        self.entry().1.dtype.to_string()
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.entry().1.shape)
    }

    #[getter]
    fn file(&self) -> &str {
        &self.entry().0.name
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.entry().1.range.len()
    }

    #[getter]
    fn parameters(&self) -> usize {
        self.entry().1.elements()
    }

    fn __repr__(&self) -> String {
        let (shard, TensorEntry { name, dtype, shape, .. }) = self.entry();
        format!("TensorInfo({name:?}, {dtype}, {shape:?}, {:?})", shard.name)
    }
}

/// What was seen of a shard when its header was read.
#[pyclass(frozen, eq, hash, module = "safemerge_fast._engine")]
#[derive(PartialEq, Eq, Hash)]
pub struct FileIdentity {
    inner: checkpoint::FileIdentity,
}

#[pymethods]
impl FileIdentity {
    #[getter]
    fn size(&self) -> u64 {
        self.inner.size
    }

    #[getter]
    fn mtime_ns(&self) -> i64 {
        self.inner.mtime_ns
    }

    #[getter]
    fn ctime_ns(&self) -> i64 {
        self.inner.ctime_ns
    }

    #[getter]
    fn inode(&self) -> u64 {
        self.inner.inode
    }

    #[getter]
    fn device(&self) -> u64 {
        self.inner.device
    }

    #[getter]
    fn header_digest(&self) -> &str {
        &self.inner.header_digest
    }

    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let written = PyDict::new(py);
        written.set_item("size", self.inner.size)?;
        written.set_item("mtime_ns", self.inner.mtime_ns)?;
        written.set_item("ctime_ns", self.inner.ctime_ns)?;
        written.set_item("inode", self.inner.inode)?;
        written.set_item("header_digest", &self.inner.header_digest)?;
        Ok(written)
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.inner)
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
        let open = || {
            let backend = ReadBackend::named(read_backend)?;
            checkpoint::Checkpoint::open_with(&path, backend)
        };
        Ok(Self { inner: Arc::new(detached(py, open)?) })
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
    fn names(&self) -> Vec<&str> {
        self.inner.tensors().map(|(_, entry)| entry.name).collect()
    }

    #[getter]
    fn tensors(&self) -> Vec<TensorInfo> {
        self.inner.ids().map(|id| self.info(id)).collect()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.tensors().map(|(_, entry)| entry.range.len()).sum()
    }

    #[getter]
    fn parameters(&self) -> usize {
        self.inner.tensors().map(|(_, entry)| entry.elements()).sum()
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    fn __contains__(&self, name: &str) -> bool {
        self.inner.id(name).is_some()
    }

    fn tensor(&self, py: Python<'_>, name: &str) -> PyResult<TensorInfo> {
        match self.inner.id(name) {
            Some(id) => Ok(self.info(id)),
            None => Err(to_python(py, &self.inner.absent(name))),
        }
    }

    fn identity(&self) -> BTreeMap<&str, FileIdentity> {
        let identity = |shard: &Shard| FileIdentity { inner: shard.header.identity.clone() };
        self.inner.shards().iter().map(|shard| (shard.name.as_str(), identity(shard))).collect()
    }

    fn check_unchanged(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.inner.check_unchanged())
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
    fn info(&self, id: TensorId) -> TensorInfo {
        TensorInfo { checkpoint: Arc::clone(&self.inner), id }
    }

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
