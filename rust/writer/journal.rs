//! The journal: which shards are committed, one JSON line each, and the lock on the output directory.

use crate::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// One committed shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub file: String,
    pub size: usize,
    /// Digest of the plan and input identities that made it.
    pub digest: String,
}

/// An open, exclusively locked journal.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    entries: Vec<Entry>,
}

impl Journal {
    /// Opens or creates the journal and locks it for the life of this value.
    pub(super) fn open(directory: &Path, name: &str) -> Result<Self> {
        let path = directory.join(name);
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(|e| Error::write(&path, e))?;
        if let Err(errno) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // A file system without locks (some network ones) is no reason to refuse; a lock held elsewhere is.
            if errno == rustix::io::Errno::WOULDBLOCK {
                return Err(Error::output(directory, "is locked: another merge is writing it"));
            }
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(|e| Error::read(&path, e))?;
        let torn = text.last().is_some_and(|&byte| byte != b'\n');
        if torn {
            // A line cut short by a crash must not swallow the next one.
            file.write_all(b"\n").map_err(|e| Error::write(&path, e))?;
        }
        let entries = text
            .split(|&byte| byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect();
        Ok(Self { file, path, entries })
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Appends an entry durably.
    pub(super) fn append(&mut self, entry: Entry) -> Result<()> {
        let mut line =
            serde_json::to_vec(&entry).map_err(|e| Error::write(&self.path, e.into()))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .and_then(|()| self.file.sync_data())
            .map_err(|e| Error::write(&self.path, e))?;
        self.entries.push(entry);
        Ok(())
    }

    /// Forgets every entry: the shards are about to go.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.entries.clear();
        self.file
            .set_len(0)
            .and_then(|()| self.file.sync_data())
            .map_err(|e| Error::write(&self.path, e))
    }

    pub(super) fn remove(&self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|e| Error::write(&self.path, e))
    }
}
