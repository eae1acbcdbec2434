//! `JobDirectory`: an output in the making, locked.

use super::error::{detached, to_python};
use crate::checkpoint;
use crate::writer::{self, AttemptId, Overwrite};
use crate::{Error, Result};
use pyo3::prelude::*;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// A file of an output: name, size, digest.
#[pyclass(frozen, get_all, module = "safemerge_fast._engine")]
pub struct WrittenFile {
    name: String,
    bytes: u64,
    digest: Option<String>,
}

/// BLAKE3 of a regular file's bytes, hexadecimal.
#[pyfunction]
pub fn file_digest(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    detached(py, || checkpoint::file_digest(&path))
}

/// The directory in which an output is made, locked until it is published or closed.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct JobDirectory {
    output: PathBuf,
    path: PathBuf,
    /// `None` once closed. Shared with running executions, which keep the lock until they end.
    inner: Mutex<Option<Arc<writer::JobDirectory>>>,
    /// What the job said when it was closed.
    last: Mutex<Last>,
}

#[derive(Clone, Default)]
struct Last {
    complete: bool,
    committed: Vec<String>,
    written: Vec<writer::WrittenFile>,
}

impl Last {
    fn of(job: &writer::JobDirectory) -> Self {
        Self { complete: job.is_complete(), committed: job.committed(), written: job.written() }
    }
}

impl JobDirectory {
    pub(super) fn get(&self) -> Result<Arc<writer::JobDirectory>> {
        self.open().ok_or_else(|| Error::Output {
            path: self.output.clone(),
            problem: "is closed; open it again to write to it".to_owned(),
        })
    }

    fn open(&self) -> Option<Arc<writer::JobDirectory>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The job's state now, or as it was when it was closed.
    fn state(&self) -> Last {
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.open().map_or_else(last, |job| Last::of(&job))
    }
}

#[pymethods]
impl JobDirectory {
    #[new]
    #[pyo3(signature = (output, *, identity, inputs = Vec::new(), resume = false, overwrite = "no"))]
    fn new(
        py: Python<'_>,
        output: PathBuf,
        identity: &str,
        inputs: Vec<PathBuf>,
        resume: bool,
        overwrite: &str,
    ) -> PyResult<Self> {
        let inner = detached(py, || {
            let overwrite = Overwrite::named(overwrite)?;
            writer::JobDirectory::open(&output, identity, &inputs, resume, overwrite)
        })?;
        Ok(Self {
            output: inner.output().to_owned(),
            path: inner.path().to_owned(),
            inner: Mutex::new(Some(Arc::new(inner))),
            last: Mutex::default(),
        })
    }

    #[getter]
    fn output(&self) -> &OsStr {
        self.output.as_os_str()
    }

    #[getter]
    fn path(&self) -> &OsStr {
        self.path.as_os_str()
    }

    #[getter]
    fn files(&self, py: Python<'_>) -> OsString {
        let files = py.detach(|| self.open().map(|job| job.files()));
        files.unwrap_or_else(|| self.output.clone()).into_os_string()
    }

    #[getter]
    fn complete(&self, py: Python<'_>) -> bool {
        py.detach(|| self.state().complete)
    }

    #[getter]
    fn committed(&self, py: Python<'_>) -> Vec<String> {
        py.detach(|| self.state().committed)
    }

    #[getter]
    fn written(&self, py: Python<'_>) -> Vec<WrittenFile> {
        let written = py.detach(|| self.state().written);
        let files = written.into_iter().map(|file| WrittenFile {
            name: file.name,
            bytes: file.bytes,
            digest: file.digest,
        });
        files.collect()
    }

    fn write_file(&self, py: Python<'_>, name: &str, data: &[u8]) -> PyResult<()> {
        detached(py, || self.get()?.write_file(name, data))
    }

    fn write_pieces(&self, name: &str, pieces: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = pieces.py();
        let mut pieces = pieces.try_iter()?;
        // What the iterator raises is raised here; the engine only needs to know that there is nothing more.
        let mut raised = None;
        let written = self.get().and_then(|job| {
            job.write_pieces(name, &mut || match pieces.next()?.and_then(|piece| piece.extract()) {
                Ok(piece) => Some(Ok(piece)),
                Err(error) => {
                    raised = Some(error);
                    Some(Err(Error::Interrupted))
                }
            })
        });
        match raised {
            Some(error) => Err(error),
            None => written.map_err(|error| to_python(py, &error)),
        }
    }

    fn copy_file(&self, py: Python<'_>, source: PathBuf, name: &str) -> PyResult<()> {
        detached(py, || self.get()?.copy_file(&source, name))
    }

    fn append(&self, py: Python<'_>, name: &str, data: &[u8]) -> PyResult<()> {
        detached(py, || self.get()?.append(name, data))
    }

    fn read(&self, py: Python<'_>, name: &str) -> PyResult<Option<Vec<u8>>> {
        detached(py, || self.get()?.read(name))
    }

    fn remove(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        detached(py, || self.get()?.remove(name))
    }

    fn take_over(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.get()?.take_over())
    }

    fn hand_out(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            let job = self.get()?;
            job.make_room()?;
            job.hand_out()
        })
    }

    fn begin_attempt(&self, py: Python<'_>, file: &str) -> PyResult<String> {
        detached(py, || {
            let job = self.get()?;
            job.make_room()?;
            Ok(job.begin_attempts(&[file])?.into_iter().map(String::from).collect())
        })
    }

    fn adopt(&self, py: Python<'_>, file: &str, attempt: &str) -> PyResult<()> {
        detached(py, || self.get()?.adopt(file, &AttemptId::new(attempt)?))
    }

    fn abort(&self, py: Python<'_>, file: &str, attempt: &str) -> PyResult<()> {
        detached(py, || self.get()?.abort(file, &AttemptId::new(attempt)?))
    }

    fn publish(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.get()?.publish())?;
        self.close(py);
        Ok(())
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            let state = self.state();
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = state;
            drop(self.inner.lock().unwrap_or_else(PoisonError::into_inner).take());
        });
    }
}

/// The names of the engine's fail points; none in a build without the feature `faults`.
#[pyfunction]
pub fn fault_points() -> Vec<&'static str> {
    writer::fault_points().to_vec()
}

/// Reads what the tests want to fail from the environment.
#[cfg(feature = "faults")]
pub(super) fn set_faults_up() {
    // For the rest of the process: dropped, it would take the points back.
    std::mem::forget(fail::FailScenario::setup());
}
