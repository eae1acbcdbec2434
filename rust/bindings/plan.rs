//! `Plan` and `Progress`: validation, execution and verification; and their results.

use super::arguments::{json_bytes, shared_sources};
use super::checkpoint::Checkpoint;
use super::error::{detached, interruptible, to_python};
use super::job::JobDirectory;
use crate::checkpoint::ReadBackend;
use crate::kernels::Kernels;
use crate::merge::{self, stream, verify};
use crate::writer::WriteMode;
use crate::{Error, Result, plan};
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Counters that workers advance and any thread may poll; cancel() stops the work within a tile.
#[pyclass(frozen, module = "safemerge_fast._engine")]
#[derive(Default)]
pub struct Progress {
    pub(super) inner: Arc<merge::Progress>,
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

/// An input tensor that was merged though it holds NaN or infinity.
#[pyclass(frozen, get_all, eq, hash, skip_from_py_object, module = "safemerge_fast._engine")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct NonFinite {
    tensor: String,
    path: String,
}

#[pymethods]
impl NonFinite {
    fn __repr__(&self) -> String {
        format!("NonFinite(tensor={:?}, path={:?})", self.tensor, self.path)
    }
}

/// What happened to one output shard.
#[pyclass(frozen, get_all, module = "safemerge_fast._engine")]
pub struct ShardFacts {
    file: String,
    bytes_written: usize,
    seconds: f64,
    write: &'static str,
    resumed: bool,
    nonfinite_inputs: Vec<NonFinite>,
    survival: BTreeMap<String, f64>,
    retained: BTreeMap<String, f64>,
}

impl From<stream::ShardFacts> for ShardFacts {
    fn from(facts: stream::ShardFacts) -> Self {
        let nonfinite_inputs = facts.nonfinite_inputs.into_iter().map(|place| NonFinite {
            path: place.path.to_string_lossy().into_owned(),
            tensor: place.tensor,
        });
        // Where nothing was to change there is no share of it.
        let mut changes = facts.changes;
        changes.retain(|_, change| change.wanted > 0.0);
        let share = |of: fn(&plan::Change) -> f64| {
            changes.iter().map(|(tensor, change)| (tensor.clone(), rounded(of(change)))).collect()
        };
        Self {
            survival: share(|change| (change.stored / change.wanted).sqrt()),
            retained: share(|change| change.along / change.wanted),
            file: facts.file,
            bytes_written: facts.bytes_written,
            seconds: facts.seconds,
            write: facts.write,
            resumed: facts.resumed,
            nonfinite_inputs: nonfinite_inputs.collect(),
        }
    }
}

/// A share to nine decimals: workers add up parts of it in any order, which moves the last digits.
fn rounded(share: f64) -> f64 {
    (share * 1e9).round() / 1e9
}

/// The first byte of a tile that differs from the plan.
#[pyclass(frozen, get_all, eq, skip_from_py_object, module = "safemerge_fast._engine")]
#[derive(Clone, PartialEq, Eq)]
pub struct Mismatch {
    file: String,
    tensor: Option<String>,
    offset: usize,
}

#[pymethods]
impl Mismatch {
    fn __repr__(&self) -> String {
        let Self { file, tensor, offset } = self;
        format!("Mismatch(file={file:?}, tensor={tensor:?}, offset={offset})")
    }
}

/// What a verification looked at and found.
#[pyclass(frozen, get_all, module = "safemerge_fast._engine")]
pub struct Verification {
    files: usize,
    bytes_checked: usize,
    bytes_total: usize,
    mismatches: Vec<Mismatch>,
}

/// A validated plan: what every output tensor is made of.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Plan {
    pub(super) inner: plan::Plan,
}

#[pymethods]
impl Plan {
    #[new]
    #[pyo3(signature = (json, *, sources = None, read_backend = "auto", directory = None))]
    fn new(
        py: Python<'_>,
        json: &Bound<'_, PyAny>,
        sources: Option<BTreeMap<String, Bound<'_, Checkpoint>>>,
        read_backend: &str,
        directory: Option<PathBuf>,
    ) -> PyResult<Self> {
        let json = json_bytes(json)?;
        let sources = shared_sources(&sources.unwrap_or_default());
        let inner = detached(py, || {
            let backend = ReadBackend::named(read_backend)?;
            plan::Plan::open(&json, backend, &sources, directory.as_deref())
        })?;
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

    #[pyo3(signature = (*, threads = None, memory_budget = None, tile_bytes = None))]
    fn memory(
        &self,
        py: Python<'_>,
        threads: Option<usize>,
        memory_budget: Option<usize>,
        tile_bytes: Option<usize>,
    ) -> PyResult<usize> {
        detached(py, || {
            let defaults = stream::Options::default();
            let options = stream::Options {
                threads: threads.unwrap_or(defaults.threads),
                tile_bytes: tile_bytes.unwrap_or(defaults.tile_bytes),
                memory_budget,
                ..defaults
            };
            stream::memory(&self.inner, &self.inner.select(None)?, &options)
        })
    }

    #[pyo3(signature = (output, *, shards = None, threads = None, memory_budget = None, tile_bytes = None,
                        write = "auto", simd = None, allow_nonfinite = false, progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python method")]
    fn execute(
        &self,
        py: Python<'_>,
        output: &JobDirectory,
        shards: Option<Vec<String>>,
        threads: Option<usize>,
        memory_budget: Option<usize>,
        tile_bytes: Option<usize>,
        write: &str,
        simd: Option<&str>,
        allow_nonfinite: bool,
        progress: Option<&Progress>,
    ) -> PyResult<Vec<ShardFacts>> {
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
        Ok(execution.into_iter().map(ShardFacts::from).collect())
    }

    #[pyo3(signature = (directory, *, shards = None, threads = None, simd = None, sample = 1.0, seed = 0,
                        progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python method")]
    fn verify(
        &self,
        py: Python<'_>,
        directory: PathBuf,
        shards: Option<Vec<String>>,
        threads: Option<usize>,
        simd: Option<&str>,
        sample: f64,
        seed: u64,
        progress: Option<&Progress>,
    ) -> PyResult<Verification> {
        let progress = progress.map(|progress| Arc::clone(&progress.inner)).unwrap_or_default();
        let (found, files) = interruptible(py, |poll| {
            let threads = threads.unwrap_or_else(stream::default_threads);
            let options = verify::Options { threads, sample, seed, kernels: kernels(simd)? };
            let selected = self.inner.select(shards.as_deref())?;
            let found =
                verify::verify(&self.inner, &selected, &directory, &options, &progress, poll)?;
            Ok((found, selected.len()))
        })?;
        let mismatches = found.mismatches.into_iter().map(|mismatch| Mismatch {
            file: mismatch.file,
            tensor: mismatch.tensor,
            offset: mismatch.offset,
        });
        Ok(Verification {
            files,
            bytes_checked: found.bytes_checked,
            bytes_total: found.bytes_total,
            mismatches: mismatches.collect(),
        })
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
