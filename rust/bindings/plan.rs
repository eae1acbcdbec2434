//! `Plan` and `Progress`: validation, execution and verification.

use super::error::{detached, interruptible, to_python};
use super::job::JobDirectory;
use crate::checkpoint::ReadBackend;
use crate::kernels::Kernels;
use crate::merge::{self, stream, verify};
use crate::writer::WriteMode;
use crate::{Error, Result, plan};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;

/// Counters that workers advance and any thread may poll; cancel() stops the work within a tile.
#[pyclass(frozen, module = "safemerge_fast._engine")]
#[derive(Default)]
pub struct Progress {
    inner: Arc<merge::Progress>,
}

#[pymethods]
impl Progress {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    #[getter]
    fn bytes_done(&self) -> usize {
        self.inner.bytes()
    }

    #[getter]
    fn shards_done(&self) -> usize {
        self.inner.shards()
    }

    #[getter]
    fn cancelled(&self) -> bool {
        self.inner.cancelled()
    }

    fn cancel(&self) {
        self.inner.cancel();
    }
}

/// A validated plan: what every output tensor is made of.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Plan {
    inner: plan::Plan,
}

#[pymethods]
impl Plan {
    #[new]
    #[pyo3(signature = (json, *, read_backend = "auto"))]
    fn new(py: Python<'_>, json: &str, read_backend: &str) -> PyResult<Self> {
        let inner = detached(py, || plan::Plan::open(json, ReadBackend::named(read_backend)?))?;
        Ok(Self { inner })
    }

    #[getter]
    fn shards(&self) -> Vec<&str> {
        self.inner.shards().iter().map(|shard| shard.file.as_str()).collect()
    }

    #[getter]
    fn bytes_read(&self) -> usize {
        self.inner.traffic().0
    }

    #[getter]
    fn bytes_written(&self) -> usize {
        self.inner.traffic().1
    }

    fn shard_digest(&self, py: Python<'_>, file: &str) -> PyResult<String> {
        let selected = self.inner.select(Some(&[file.to_owned()]));
        let shards = selected.map_err(|error| to_python(py, &error))?;
        Ok(shards.into_iter().map(|shard| shard.digest.clone()).collect())
    }

    #[pyo3(signature = (output, *, shards = None, threads = None, memory_budget = None, tile_bytes = None,
                        write = "auto", simd = None, allow_nonfinite = false, progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python method")]
    fn execute<'py>(
        &self,
        py: Python<'py>,
        output: &JobDirectory,
        shards: Option<Vec<String>>,
        threads: Option<usize>,
        memory_budget: Option<usize>,
        tile_bytes: Option<usize>,
        write: &str,
        simd: Option<&str>,
        allow_nonfinite: bool,
        progress: Option<&Progress>,
    ) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let progress = progress.map(|progress| Arc::clone(&progress.inner)).unwrap_or_default();
        let execution = interruptible(py, |poll| {
            let defaults = stream::Options::default();
            let options = stream::Options {
                threads: threads.unwrap_or(defaults.threads),
                tile_bytes: tile_bytes.unwrap_or(defaults.tile_bytes),
                memory_budget,
                write: write_mode(write)?,
                kernels: kernels(simd)?,
                allow_nonfinite,
            };
            let selected = self.inner.select(shards.as_deref())?;
            stream::execute(&self.inner, &selected, &*output.get()?, &options, &progress, poll)
        })?;
        let facts = execution.into_iter().map(|shard| {
            let fact = PyDict::new(py);
            fact.set_item("file", shard.file)?;
            fact.set_item("bytes_written", shard.bytes_written)?;
            fact.set_item("seconds", shard.seconds)?;
            fact.set_item("write", shard.write)?;
            fact.set_item("resumed", shard.resumed)?;
            fact.set_item("nonfinite_inputs", shard.nonfinite_inputs)?;
            Ok(fact)
        });
        facts.collect()
    }

    #[pyo3(signature = (directory, *, shards = None, threads = None, simd = None, sample = 1.0, seed = 0,
                        progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python method")]
    fn verify<'py>(
        &self,
        py: Python<'py>,
        directory: PathBuf,
        shards: Option<Vec<String>>,
        threads: Option<usize>,
        simd: Option<&str>,
        sample: f64,
        seed: u64,
        progress: Option<&Progress>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let progress = progress.map(|progress| Arc::clone(&progress.inner)).unwrap_or_default();
        let (found, files) = interruptible(py, |poll| {
            let threads = threads.unwrap_or_else(stream::default_threads);
            let options = verify::Options { threads, sample, seed, kernels: kernels(simd)? };
            let selected = self.inner.select(shards.as_deref())?;
            let found = verify::verify(&selected, &directory, &options, &progress, poll)?;
            Ok((found, selected.len()))
        })?;
        let mismatches = found.mismatches.into_iter().map(|mismatch| {
            let entry = PyDict::new(py);
            entry.set_item("file", mismatch.file)?;
            entry.set_item("tensor", mismatch.tensor)?;
            entry.set_item("offset", mismatch.offset)?;
            Ok(entry)
        });
        let result = PyDict::new(py);
        result.set_item("files", files)?;
        result.set_item("bytes_checked", found.bytes_checked)?;
        result.set_item("bytes_total", found.bytes_total)?;
        result.set_item("mismatches", mismatches.collect::<PyResult<Vec<_>>>()?)?;
        Ok(result)
    }
}

fn write_mode(name: &str) -> Result<WriteMode> {
    match name {
        "auto" => Ok(WriteMode::Auto),
        "direct" => Ok(WriteMode::Direct),
        "buffered" => Ok(WriteMode::Buffered),
        _ => Err(Error::Option(format!(
            "there is no write mode `{name}`; choose auto, direct or buffered"
        ))),
    }
}

fn kernels(name: Option<&str>) -> Result<Kernels> {
    name.map_or_else(|| Ok(Kernels::detect()), Kernels::named)
}
