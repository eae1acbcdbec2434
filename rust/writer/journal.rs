//! The journal: which shards are committed, one JSON line each.
//!
//! A line says that a shard is committed, or takes that back. The last word on a file counts. A line that cannot be read is
//! nobody's: it is passed over, and every line begins with a line break of its own, so that one cut short swallows nothing.

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
}

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    entries: BTreeMap<FileName, Entry>,
}

impl Journal {
    /// Opens the journal of a job directory, or creates it.
    pub(super) fn open(job: &Path) -> Result<Self> {
        let path = job.join("journal");
        let bytes = disk::read_capped(&path, LARGEST)?;
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o666);
        let file = disk::retry(Point::JournalOpen, || options.open(&path))
            .map_err(|error| disk::failure(&path, 0, error))?;
        if bytes.is_none() {
            disk::sync_directory(Point::JournalDirectorySync, job)?;
        }
        let mut entries = BTreeMap::new();
        for line in bytes.unwrap_or_default().split(|&byte| byte == b'\n') {
            match serde_json::from_slice(line) {
                Ok(Line::Commit { file, size, digest, changes }) => {
                    entries.insert(file, Entry { size, digest, changes });
                }
                Ok(Line::Revoke { revoked }) => {
                    entries.remove(&revoked);
                }
                Err(_) => {}
            }
        }
        Ok(Self { file, path, entries })
    }

    /// The committed shards.
    pub(super) fn entries(&self) -> &BTreeMap<FileName, Entry> {
        &self.entries
    }

    /// How far requantised tensors of a committed shard changed.
    pub(super) fn changes(&self, file: &FileName) -> Changes {
        self.entries.get(file).map_or_else(Changes::new, |entry| entry.changes.clone())
    }

    /// Forgets, in memory alone, what is not there as it is listed.
    pub(super) fn retain(&mut self, is_there: impl Fn(&FileName, &Entry) -> bool) {
        self.entries.retain(|file, entry| is_there(file, entry));
    }

    /// Enters a shard durably; it has its name already.
    pub(super) fn commit(&mut self, file: &FileName, entry: Entry) -> Result<()> {
        let Entry { size, digest, changes } = entry.clone();
        let line = Line::Commit { file: file.clone(), size, digest, changes };
        self.append(Point::CommitWrite, Point::CommitSync, &line)?;
        self.entries.insert(file.clone(), entry);
        Ok(())
    }

    /// Takes an entry back durably, before the file gets other bytes.
    pub(super) fn revoke(&mut self, file: &FileName) -> Result<()> {
        self.append(
            Point::RevokeWrite,
            Point::RevokeSync,
            &Line::Revoke { revoked: file.clone() },
        )?;
        self.entries.remove(file);
        Ok(())
    }

    fn append(&mut self, write: Point, sync: Point, line: &Line) -> Result<()> {
        let mut bytes = vec![b'\n'];
        serde_json::to_writer(&mut bytes, line).map_err(|e| Error::write(&self.path, e.into()))?;
        bytes.push(b'\n');
        disk::write_all(write, &self.file, &bytes)
            .and_then(|()| disk::retry(sync, || self.file.sync_data()))
            .map_err(|error| disk::failure(&self.path, bytes.len() as u64, error))
    }
}
