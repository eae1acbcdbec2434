//! One attempt at one shard, by a worker that does not run the job: what it prepared, and what it found, as plain data.

use super::Progress;
use super::blending::NonFinite;
use super::stream::{self, Options, ShardFacts, Sink};
use crate::plan::{Changes, Plan, PlannedShard};
use crate::writer::{AttemptId, Commit, JobDirectory, Prepared, TileFile, Workplace, WriteMode};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// Version of the document.
const VERSION: u32 = 1;

/// A shard that is prepared, and what its worker found meanwhile.
#[derive(Debug, Clone)]
pub struct PreparedShard {
    /// The shard.
    pub shard: Prepared,
    /// What happened to it.
    pub facts: ShardFacts,
}

/// The same as JSON has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    shard: Prepared,
    seconds: f64,
    write: Way,
    /// Tensors with NaN or infinity, and the files they lie in.
    nonfinite: Vec<(String, String)>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Way {
    Direct,
    Buffered,
    Cloned,
}

impl Way {
    fn named(name: &str) -> Self {
        match name {
            "direct" => Self::Direct,
            "cloned" => Self::Cloned,
            _ => Self::Buffered,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Buffered => "buffered",
            Self::Cloned => "cloned",
        }
    }
}

impl PreparedShard {
    /// As JSON, for another process.
    ///
    /// # Errors
    /// [`Error::Plan`] if a number in it is none that JSON has.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let nonfinite = self.facts.nonfinite_inputs.iter();
        let document = Document {
            version: VERSION,
            shard: self.shard.clone(),
            seconds: self.facts.seconds,
            write: Way::named(self.facts.write),
            nonfinite: nonfinite
                .map(|place| (place.tensor.clone(), place.path.to_string_lossy().into_owned()))
                .collect(),
        };
        serde_json::to_vec(&document).map_err(|error| Error::Plan(error.to_string()))
    }

    /// Reads what [`PreparedShard::to_json`] wrote.
    ///
    /// # Errors
    /// [`Error::Plan`] if it is something else.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let problem =
            |what: String| Error::Plan(format!("it has a prepared shard that is none: {what}"));
        let document: Document =
            serde_json::from_slice(json).map_err(|error| problem(error.to_string()))?;
        if document.version != VERSION {
            return Err(problem(format!(
                "its format has version {}, not {VERSION}",
                document.version
            )));
        }
        let nonfinite = document.nonfinite.into_iter();
        let facts = ShardFacts {
            file: document.shard.file().to_owned(),
            bytes_written: usize::try_from(document.shard.size()).unwrap_or(usize::MAX),
            seconds: document.seconds,
            write: document.write.name(),
            resumed: false,
            nonfinite_inputs: nonfinite
                .map(|(tensor, path)| NonFinite { tensor, path: PathBuf::from(path) })
                .collect(),
            changes: document.shard.changes().clone(),
        };
        Ok(Self { shard: document.shard, facts })
    }

    /// Commits it, if it is of this very plan.
    ///
    /// # Errors
    /// [`Error::Plan`] if it is of another one; those of [`JobDirectory::commit`].
    pub fn commit(&self, plan: &Plan, output: &JobDirectory) -> Result<Commit> {
        let file = self.shard.file();
        let selected = plan.select(Some(&[file.to_owned()]))?;
        let of_plan = |shard: &&PlannedShard| {
            shard.digest == self.shard.digest() && shard.layout.size as u64 == self.shard.size()
        };
        if !selected.iter().any(of_plan) {
            return Err(Error::Plan(format!(
                "{file} was prepared for another plan or other inputs"
            )));
        }
        output.make_room()?;
        output.commit(&self.shard)
    }
}

/// Prepares shards as attempts of one name each.
struct Attempt<'a> {
    workplace: &'a Workplace,
    attempt: &'a AttemptId,
    prepared: Mutex<Vec<Prepared>>,
}

impl Sink for Attempt<'_> {
    fn create(&self, shard: &PlannedShard, mode: WriteMode) -> Result<TileFile> {
        self.workplace.create(&shard.file, self.attempt, shard.layout.size, mode)
    }

    fn clone_of(&self, shard: &PlannedShard, source: &File) -> Result<Option<TileFile>> {
        self.workplace.clone_of(source, &shard.file, self.attempt, shard.layout.size)
    }

    fn take(&self, shard: &PlannedShard, file: &TileFile, changes: &Changes) -> Result<()> {
        let prepared = self.workplace.prepare(file, &shard.digest, changes)?;
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).push(prepared);
        Ok(())
    }
}

/// Prepares a shard of a plan, to be committed by whoever runs the job.
///
/// # Errors
/// As [`stream::execute`]; [`Error::Output`] if the attempt or the job was given up meanwhile.
pub fn prepare(
    plan: &Plan,
    shard: &PlannedShard,
    workplace: &Workplace,
    attempt: &AttemptId,
    options: &Options,
    progress: &Progress,
    poll: &mut dyn FnMut() -> bool,
) -> Result<PreparedShard> {
    let sink = Attempt { workplace, attempt, prepared: Mutex::default() };
    let mut facts = stream::make(plan, vec![shard], &sink, options, progress, poll)?;
    let mut prepared = sink.prepared.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (prepared.pop(), facts.pop()) {
        (Some(shard), Some(facts)) => Ok(PreparedShard { shard, facts }),
        _ => Err(Error::Plan(format!("{} was not prepared", shard.file))),
    }
}
