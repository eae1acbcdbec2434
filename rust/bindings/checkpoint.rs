//! `Checkpoint`: headers, and rows of tensors.

use super::error::{detached, to_python};
use crate::checkpoint::{
    self, Encoding, InputFile, LogicalTensor, ReadBackend, Shard, TensorEntry, TensorId,
};
use crate::error::printable;
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
    /// Where it is stored, or its codes are.
    id: TensorId,
    /// Whether it is quantised and spoken of as what it stands for.
    encoded: bool,
}

/// The dtype that a quantised tensor stands for: what models that are quantised were trained in.
const STANDS_FOR: &str = "BF16";

impl TensorInfo {
    fn entry(&self) -> (&Shard, TensorEntry<'_>) {
        self.checkpoint.entry(self.id)
    }

    /// How it is encoded. Found each time: kept, 100,000 of them would take tens of megabytes.
    fn found(&self, py: Python<'_>) -> PyResult<Option<Encoding>> {
        if !self.encoded {
            return Ok(None);
        }
        self.checkpoint.encoding_of(self.id).map_err(|error| to_python(py, &error))
    }
}

#[pymethods]
impl TensorInfo {
    #[getter]
    fn name(&self, py: Python<'_>) -> PyResult<Cow<'_, str>> {
        let found = self.found(py)?.map(|encoding| Cow::Owned(encoding.name));
        Ok(found.unwrap_or(Cow::Borrowed(self.entry().1.name)))
    }

    #[getter]
    fn dtype(&self) -> Cow<'_, str> {
        match self.encoded {
            true => Cow::Borrowed(STANDS_FOR),
            false => Cow::Owned(self.entry().1.dtype.to_string()),
        }
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        match self.found(py)? {
            Some(encoding) => PyTuple::new(py, encoding.shape),
            None => PyTuple::new(py, self.entry().1.shape),
        }
    }

    #[getter]
    fn encoding(&self, py: Python<'_>) -> PyResult<Option<String>> {
        Ok(self.found(py)?.map(|encoding| encoding.format.to_string()))
    }

    #[getter]
    fn stored<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let name = |id| self.checkpoint.entry(id).1.name;
        match self.found(py)? {
            Some(encoding) => PyTuple::new(py, encoding.stored().map(name).collect::<Vec<_>>()),
            None => PyTuple::new(py, [name(self.id)]),
        }
    }

    #[getter]
    fn scales(&self, py: Python<'_>) -> PyResult<Option<&str>> {
        let scales = self.found(py)?.and_then(|encoding| encoding.scales);
        Ok(scales.map(|scales| self.checkpoint.entry(scales.tensor).1.name))
    }

    #[getter]
    fn file(&self) -> &str {
        &self.entry().0.name
    }

    #[getter]
    fn nbytes(&self, py: Python<'_>) -> PyResult<usize> {
        let bytes = |id| self.checkpoint.entry(id).1.range.len();
        Ok(match self.found(py)? {
            Some(encoding) => encoding.stored().map(bytes).sum(),
            None => bytes(self.id),
        })
    }

    #[getter]
    fn parameters(&self, py: Python<'_>) -> PyResult<usize> {
        let encoding = self.found(py)?;
        Ok(encoding.map_or_else(|| self.entry().1.elements(), |encoding| encoding.elements()))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (shard, TensorEntry { name, dtype, shape, .. }) = self.entry();
        Ok(match self.found(py)? {
            Some(Encoding { name, shape, format, .. }) => {
                format!("TensorInfo({name:?}, {format}, {shape:?}, {:?})", shard.name)
            }
            None => format!("TensorInfo({name:?}, {dtype}, {shape:?}, {:?})", shard.name),
        })
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

    #[getter]
    fn etag(&self) -> Option<&str> {
        self.inner.etag.as_deref()
    }

    #[getter]
    fn version(&self) -> Option<&str> {
        self.inner.version.as_deref()
    }

    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let written = PyDict::new(py);
        written.set_item("size", self.inner.size)?;
        written.set_item("mtime_ns", self.inner.mtime_ns)?;
        if let Some(etag) = &self.inner.etag {
            written.set_item("etag", etag)?;
        } else {
            written.set_item("ctime_ns", self.inner.ctime_ns)?;
            written.set_item("inode", self.inner.inode)?;
        }
        if let Some(version) = &self.inner.version {
            written.set_item("version", version)?;
        }
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
    fn names(&self, py: Python<'_>) -> PyResult<Vec<&str>> {
        detached(py, || Ok(self.inner.logical()?.map(|tensor| tensor.name).collect()))
    }

    #[getter]
    fn tensors(&self, py: Python<'_>) -> PyResult<Vec<TensorInfo>> {
        let list = || Ok(self.inner.logical()?.map(|tensor| self.logical(&tensor)).collect());
        detached(py, list)
    }

    #[getter]
    fn stored_tensors(&self) -> Vec<TensorInfo> {
        self.inner.ids().map(|id| self.info(id, false)).collect()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.tensors().map(|(_, entry)| entry.range.len()).sum()
    }

    #[getter]
    fn parameters(&self, py: Python<'_>) -> PyResult<usize> {
        detached(py, || {
            let mut sum = 0;
            for tensor in self.inner.logical()? {
                let encoding =
                    if tensor.encoded { self.inner.encoding_of(tensor.id)? } else { None };
                sum += encoding.map_or_else(
                    || self.inner.entry(tensor.id).1.elements(),
                    |encoding| encoding.elements(),
                );
            }
            Ok(sum)
        })
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        detached(py, || Ok(self.inner.logical()?.count()))
    }

    fn __contains__(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        let found = self.inner.logical_tensor(name).map_err(|error| to_python(py, &error))?;
        Ok(found.is_some())
    }

    fn tensor(&self, py: Python<'_>, name: &str) -> PyResult<TensorInfo> {
        let found = self.inner.logical_tensor(name).map_err(|error| to_python(py, &error))?;
        let found = found.ok_or_else(|| to_python(py, &self.inner.absent(name)))?;
        Ok(self.logical(&found))
    }

    fn identity(&self) -> BTreeMap<&str, FileIdentity> {
        let identity = |shard: &Shard| FileIdentity { inner: shard.header.identity.clone() };
        self.inner.shards().iter().map(|shard| (shard.name.as_str(), identity(shard))).collect()
    }

    fn check_unchanged(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.inner.check_unchanged())
    }

    #[pyo3(signature = (name, start, stop, *, stored = false))]
    fn rows(
        &self,
        py: Python<'_>,
        name: &str,
        start: usize,
        stop: usize,
        stored: bool,
    ) -> PyResult<Rows> {
        detached(py, || {
            if !stored {
                self.refuse_encoded(name)?;
            }
            self.find_rows(name, start, stop)
        })
    }

    #[pyo3(signature = (name, *, stored = false))]
    fn release(&self, py: Python<'_>, name: &str, stored: bool) -> PyResult<()> {
        let release = || {
            let encoding = if stored { None } else { self.inner.encoding(name)? };
            let whole = || self.inner.id(name).ok_or_else(|| self.inner.absent(name));
            let parts = match &encoding {
                Some(encoding) => encoding.stored().collect(),
                None => vec![whole()?],
            };
            for id in parts {
                let file = self.inner.file(self.inner.shard_of(id))?;
                file.release(self.inner.entry(id).1.range);
            }
            Ok(())
        };
        detached(py, release)
    }
}

impl Checkpoint {
    fn info(&self, id: TensorId, encoded: bool) -> TensorInfo {
        TensorInfo { checkpoint: Arc::clone(&self.inner), id, encoded }
    }

    fn logical(&self, tensor: &LogicalTensor<'_>) -> TensorInfo {
        self.info(tensor.id, tensor.encoded)
    }

    /// Stored bytes of a quantised tensor are not its numbers; who wants them must say so.
    fn refuse_encoded(&self, name: &str) -> Result<()> {
        match self.inner.encoding(name)? {
            Some(encoding) => Err(Error::Option(format!(
                "tensor `{}` is encoded as {}, and its stored bytes are not its numbers; ask for stored=True",
                printable(name),
                encoding.format
            ))),
            None => Ok(()),
        }
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
