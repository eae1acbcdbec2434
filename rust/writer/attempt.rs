//! Attempts at shards: each is made in a partial file of its own, which only whoever runs the job gives a name.
//!
//! Workers may die, hang and wake up again, here or on another machine, so that two writers of one shard are nothing
//! unusual. They never share a file, what they make has no name that a loader knows, and they touch neither the journal nor
//! the output. All attempts lie in one directory of the job: with that, whatever they left goes.

use super::disk;
use super::fault::Point;
use super::name::{FileName, MAKING};
use crate::plan::Changes;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where attempts lie in a job directory.
pub(super) const ATTEMPTS: &str = "attempts";

/// Where they lie while they are removed.
const GIVEN_UP: &str = ".given-up";

/// Longest name of an attempt.
const LONGEST: usize = 40;

/// What tells an attempt from every other one of its job.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AttemptId(String);

impl AttemptId {
    /// The attempt of this name.
    ///
    /// # Errors
    /// [`Error::Option`] unless it consists of small letters and digits.
    pub fn new(name: &str) -> Result<Self> {
        Self::try_from(name.to_owned()).map_err(Error::Option)
    }

    pub(super) fn numbered(number: u64) -> Self {
        Self(number.to_string())
    }

    /// The number, if whoever runs a job gave it.
    pub(super) fn number(&self) -> Option<u64> {
        self.0.parse().ok()
    }

    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Name of the hidden file in which this attempt makes a shard.
    pub(super) fn partial(&self, file: &FileName) -> String {
        format!(".{}.{}.partial", file.as_str().replace('/', "%"), self.0)
    }
}

impl TryFrom<String> for AttemptId {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        let plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if plain && !name.is_empty() && name.len() <= LONGEST {
            Ok(Self(name))
        } else {
            Err(format!("`{}` names no attempt", name.escape_debug()))
        }
    }
}

impl From<AttemptId> for String {
    fn from(attempt: AttemptId) -> Self {
        attempt.0
    }
}

/// A shard that is written whole and synced, under no name yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    pub(super) file: FileName,
    pub(super) attempt: AttemptId,
    pub(super) size: u64,
    pub(super) digest: String,
    #[serde(default, skip_serializing_if = "Changes::is_empty")]
    pub(super) changes: Changes,
}

impl Prepared {
    /// The shard's name in the output.
    #[must_use]
    pub fn file(&self) -> &str {
        self.file.as_str()
    }

    /// Which attempt at it.
    #[must_use]
    pub fn attempt(&self) -> &AttemptId {
        &self.attempt
    }

    /// Its bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Digest of the plan and input identities that made it.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// How far requantised tensors changed.
    #[must_use]
    pub fn changes(&self) -> &Changes {
        &self.changes
    }
}

/// What became of a prepared shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commit {
    /// It has its name, and stands in the journal.
    Named,
    /// Another attempt came first; this one is removed.
    Late,
    /// Its bytes are not there: it was given up before.
    Gone,
}

/// Where an attempt makes a shard, and what that becomes.
#[derive(Debug)]
pub(super) struct Places {
    pub name: FileName,
    pub attempt: AttemptId,
    /// The file in which it is made.
    pub partial: PathBuf,
    /// The file that it becomes.
    pub target: PathBuf,
}

impl Places {
    /// The places of an attempt of a job.
    pub(super) fn of(job: &Path, name: FileName, attempt: AttemptId) -> Self {
        let partial = job.join(ATTEMPTS).join(attempt.partial(&name));
        Self { partial, target: job.join(MAKING).join(name.as_str()), name, attempt }
    }
}

/// Removes what an attempt made, if anything is there.
pub(super) fn abort(job: &Path, file: &FileName, attempt: &AttemptId) -> Result<()> {
    disk::remove_file(Point::AttemptAbort, &job.join(ATTEMPTS).join(attempt.partial(file)))
}

/// Makes the directory of attempts, if it is not there.
pub(super) fn make(job: &Path) -> Result<()> {
    let path = job.join(ATTEMPTS);
    disk::make_directory(Point::AttemptsMake, &path)
        .map(drop)
        .map_err(|error| disk::failure(&path, 0, error))
}

/// Removes all attempts. Their directory is moved away first: whoever still works at one cannot begin a file there from then
/// on, and what is written into an open one has no name.
pub(super) fn clear(job: &Path) -> Result<()> {
    let (attempts, given_up) = (job.join(ATTEMPTS), job.join(GIVEN_UP));
    disk::remove_tree(Point::AttemptAbort, Point::AttemptsRemove, &given_up)?;
    if disk::look(&attempts)?.is_some() {
        disk::rename(Point::AttemptsGiveUp, &attempts, &given_up)?;
        disk::remove_tree(Point::AttemptAbort, Point::AttemptsRemove, &given_up)?;
    }
    Ok(())
}
