//! The journal: which shards are committed, one JSON line each.
//!
//! A line says that a shard is committed, or takes that back, or that an attempt at one is about to begin. The last word on a file counts. A line that cannot be read is
//! nobody's: it is passed over, and every line begins with a line break of its own, so that one cut short swallows nothing.

use super::attempt::AttemptId;
use super::disk;
use super::fault::Point;
use super::name::FileName;
use crate::plan::Changes;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Its name.
const JOURNAL: &str = "journal";

/// More than a hundred thousand shards need.
const LARGEST: u64 = 64 << 20;

/// A shard that was renamed and synced.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub size: u64,
    /// Digest of the plan and input identities that made it.
    pub digest: String,
    /// How far requantised tensors changed, for the report of a run that goes on.
    pub changes: Changes,
}

impl Entry {
    /// A shard of this size.
    pub(super) fn new(size: u64, digest: &str, changes: &Changes) -> Self {
        Self { size, digest: digest.to_owned(), changes: changes.clone() }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Commit {
        file: FileName,
        size: u64,
        digest: String,
        #[serde(default, skip_serializing_if = "Changes::is_empty")]
        changes: Changes,
    },
    Revoke {
        revoked: FileName,
    },
    Attempt {
        attempt: AttemptId,
        at: FileName,
    },
}

/// What a journal says.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub entries: BTreeMap<FileName, Entry>,
    attempts: BTreeMap<AttemptId, FileName>,
}

impl Known {
    /// Of the job in a directory, which somebody else may be writing.
    pub(super) fn of(job: &Path) -> Result<Self> {
        Ok(Self::read(&job.join(JOURNAL))?.unwrap_or_default())
    }

    fn read(path: &Path) -> Result<Option<Self>> {
        let Some(bytes) = disk::read_capped(path, LARGEST)? else { return Ok(None) };
        let mut known = Self::default();
        for line in bytes.split(|&byte| byte == b'\n') {
            match serde_json::from_slice(line) {
                Ok(Line::Commit { file, size, digest, changes }) => {
                    known.entries.insert(file, Entry { size, digest, changes });
                }
                Ok(Line::Revoke { revoked }) => {
                    known.entries.remove(&revoked);
                }
                Ok(Line::Attempt { attempt, at }) => {
                    known.attempts.insert(attempt, at);
                }
                Err(_) => {}
            }
        }
        Ok(Some(known))
    }
}

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    entries: BTreeMap<FileName, Entry>,
    attempts: BTreeMap<AttemptId, FileName>,
    /// Whether a line could not be entered: then nobody knows what stands in the file.
    failed: bool,
}

impl Journal {
    /// Opens the journal of a job directory, or creates it.
    pub(super) fn open(job: &Path) -> Result<Self> {
        let path = job.join(JOURNAL);
        let known = Known::read(&path)?;
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o666);
        let file = disk::retry(Point::JournalOpen, || options.open(&path))
            .map_err(|error| disk::failure(&path, 0, error))?;
        if known.is_none() {
            disk::sync_directory(Point::JournalDirectorySync, job)?;
        }
        let Known { entries, attempts } = known.unwrap_or_default();
        Ok(Self { file, path, entries, attempts, failed: false })
    }

    /// The committed shards.
    pub(super) fn entries(&self) -> &BTreeMap<FileName, Entry> {
        &self.entries
    }

    /// How far requantised tensors of a committed shard changed.
    pub(super) fn changes(&self, file: &FileName) -> Changes {
        self.entries.get(file).map_or_else(Changes::new, |entry| entry.changes.clone())
    }

    /// The shard that an attempt of this job is at.
    pub(super) fn attempted(&self, attempt: &AttemptId) -> Option<&FileName> {
        self.attempts.get(attempt)
    }

    /// Enters attempts durably, under numbers that no attempt of this job had.
    pub(super) fn begin(&mut self, files: &[FileName]) -> Result<Vec<AttemptId>> {
        let last = self.attempts.keys().filter_map(AttemptId::number).max().unwrap_or(0);
        let numbers = (last + 1..).map(AttemptId::numbered);
        let begun: Vec<_> = numbers.zip(files.iter().cloned()).collect();
        self.adopt(&begun)?;
        Ok(begun.into_iter().map(|(attempt, _)| attempt).collect())
    }

    /// Enters attempts durably that somebody else has named.
    pub(super) fn adopt(&mut self, attempts: &[(AttemptId, FileName)]) -> Result<()> {
        let lines = attempts.iter().cloned();
        let lines: Vec<_> = lines.map(|(attempt, at)| Line::Attempt { attempt, at }).collect();
        self.append(Point::AttemptWrite, Point::AttemptSync, &lines)?;
        self.attempts.extend(attempts.iter().cloned());
        Ok(())
    }

    /// Forgets, in memory alone, what is not there as it is listed.
    pub(super) fn retain(&mut self, is_there: impl Fn(&FileName, &Entry) -> bool) {
        self.entries.retain(|file, entry| is_there(file, entry));
    }

    /// Enters a shard durably; it has its name already.
    pub(super) fn commit(&mut self, file: &FileName, entry: Entry) -> Result<()> {
        let Entry { size, digest, changes } = entry.clone();
        let line = Line::Commit { file: file.clone(), size, digest, changes };
        self.append(Point::CommitWrite, Point::CommitSync, &[line])?;
        self.entries.insert(file.clone(), entry);
        Ok(())
    }

    /// Takes an entry back durably, before the file gets other bytes.
    pub(super) fn revoke(&mut self, file: &FileName) -> Result<()> {
        let line = Line::Revoke { revoked: file.clone() };
        self.append(Point::RevokeWrite, Point::RevokeSync, &[line])?;
        self.entries.remove(file);
        Ok(())
    }

    fn append(&mut self, write: Point, sync: Point, lines: &[Line]) -> Result<()> {
        if self.failed {
            // What else is committed could not be known from it.
            let problem = std::io::Error::other("an earlier line of this job could not be written");
            return Err(Error::write(&self.path, problem));
        }
        let mut bytes = Vec::new();
        for line in lines {
            bytes.push(b'\n');
            serde_json::to_writer(&mut bytes, line)
                .map_err(|error| Error::write(&self.path, error.into()))?;
            bytes.push(b'\n');
        }
        disk::write_all(write, &self.file, &bytes)
            .and_then(|()| disk::retry(sync, || self.file.sync_data()))
            .map_err(|error| {
                self.failed = true;
                disk::failure(&self.path, bytes.len() as u64, error)
            })
    }
}
