//! Shards that workers prepare and a job commits: `prepare_shard`, `commit_shard`, `committed_shards`, `Prepared`.

use super::error::{detached, interruptible, to_python};
use super::job::JobDirectory;
use super::plan::{Plan, Progress, ShardFacts};
use crate::Error;
use crate::merge::preparing::{self, PreparedShard};
use crate::merge::stream;
use crate::writer::{AttemptId, Commit, Workplace};
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;

/// A shard that a worker wrote and synced, under no name yet.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Prepared {
    inner: PreparedShard,
}

#[pymethods]
impl Prepared {
    #[getter]
    fn file(&self) -> &str {
        self.inner.shard.file()
    }

    #[getter]
    fn attempt(&self) -> &str {
        self.inner.shard.attempt().as_str()
    }

    #[getter]
    fn size(&self) -> u64 {
        self.inner.shard.size()
    }

    #[getter]
    fn digest(&self) -> &str {
        self.inner.shard.digest()
    }

    #[getter]
    fn facts(&self) -> ShardFacts {
        self.inner.facts.clone().into()
    }

    fn to_json(&self, py: Python<'_>) -> PyResult<Vec<u8>> {
        self.inner.to_json().map_err(|error| to_python(py, &error))
    }

    #[staticmethod]
    fn from_json(py: Python<'_>, json: &[u8]) -> PyResult<Self> {
        let inner = PreparedShard::from_json(json).map_err(|error| to_python(py, &error))?;
        Ok(Self { inner })
    }
}

/// Makes a shard of a plan in an attempt of its own.
#[pyfunction]
#[pyo3(signature = (plan, job, file, attempt, *, threads = None, memory_budget = None, allow_nonfinite = false,
                    progress = None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of the Python function")]
pub fn prepare_shard(
    py: Python<'_>,
    plan: &Plan,
    job: PathBuf,
    file: &str,
    attempt: &str,
    threads: Option<usize>,
    memory_budget: Option<usize>,
    allow_nonfinite: bool,
    progress: Option<&Progress>,
) -> PyResult<Prepared> {
    let progress = progress.map(|progress| Arc::clone(&progress.inner)).unwrap_or_default();
    let inner = interruptible(py, |poll| {
        let attempt = AttemptId::new(attempt)?;
        let workplace = Workplace::open(&job)?;
        let defaults = stream::Options::default();
        let threads = threads.unwrap_or(defaults.threads);
        let options = stream::Options { threads, memory_budget, allow_nonfinite, ..defaults };
        let selected = plan.inner.select(Some(&[file.to_owned()]))?;
        let shard = selected.into_iter().next();
        let shard = shard.ok_or_else(|| Error::Plan(format!("it has no output file {file}")))?;
        preparing::prepare(&plan.inner, shard, &workplace, &attempt, &options, &progress, poll)
    })?;
    Ok(Prepared { inner })
}

/// Gives a prepared shard its name: "named", "late" if another attempt came first, "gone" if its bytes are not there.
#[pyfunction]
pub fn commit_shard(
    py: Python<'_>,
    plan: &Plan,
    output: &JobDirectory,
    prepared: &Prepared,
) -> PyResult<&'static str> {
    detached(py, || {
        Ok(match prepared.inner.commit(&plan.inner, &*output.get()?)? {
            Commit::Named => "named",
            Commit::Late => "late",
            Commit::Gone => "gone",
        })
    })
}

/// The shards of a plan that are not committed, as a worker sees it.
#[pyfunction]
pub fn open_shards(py: Python<'_>, plan: &Plan, job: PathBuf) -> PyResult<Vec<String>> {
    detached(py, || {
        let place = Workplace::open(&job)?;
        let mut open = Vec::new();
        for shard in plan.inner.shards() {
            if !place.has(&shard.file, shard.layout.size, &shard.digest)? {
                open.push(shard.file.clone());
            }
        }
        Ok(open)
    })
}

/// The shards of a plan that are committed.
#[pyfunction]
pub fn committed_shards(
    py: Python<'_>,
    plan: &Plan,
    output: &JobDirectory,
) -> PyResult<Vec<ShardFacts>> {
    detached(py, || {
        let output = output.get()?;
        let shards = plan.inner.shards().iter();
        let known = shards
            .filter(|shard| output.has(&shard.file, shard.layout.size, &shard.digest))
            .map(|shard| stream::ShardFacts::resumed(shard, &output).into());
        Ok(known.collect())
    })
}
