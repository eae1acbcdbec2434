//! A job as those see it who prepare its shards, in this process or in another one, here or on another machine.

use super::attempt::{ATTEMPTS, AttemptId, Places, Prepared};
use super::disk::{self, FileId};
use super::journal::Known;
use super::name::{FileName, MAKING};
use super::record::RECORD;
use super::tile_file::{TileFile, WriteMode};
use crate::plan::Changes;
use crate::{Error, Result};
use std::fs::File;
use std::path::{Path, PathBuf};

/// A job directory as a worker sees it, who neither locks it nor writes its journal.
#[derive(Debug)]
pub struct Workplace {
    job: PathBuf,
}

impl Workplace {
    /// Goes to a job directory.
    ///
    /// # Errors
    /// [`Error::Output`] if no job is handed out there.
    pub fn open(job: &Path) -> Result<Self> {
        let is_there = |name: &str| Ok(disk::look(&job.join(name))?.is_some());
        if is_there(RECORD)? && is_there(ATTEMPTS)? {
            return Ok(Self { job: job.to_owned() });
        }
        Err(Error::output(
            job,
            "is no job to work at: it is finished or given up, or this machine does not share that directory",
        ))
    }

    /// Creates the partial file of an attempt.
    ///
    /// # Errors
    /// [`Error::Output`] if the name is none; [`Error::DiskFull`]; [`Error::Write`], also if the attempt has been made before.
    pub fn create(
        &self,
        file: &str,
        attempt: &AttemptId,
        size: usize,
        mode: WriteMode,
    ) -> Result<TileFile> {
        TileFile::create(self.places(file, attempt)?, size, mode)
    }

    /// The same as a clone of an input file of the same bytes; `None` where the file system has no such thing.
    ///
    /// # Errors
    /// As [`Workplace::create`].
    pub fn clone_of(
        &self,
        source: &File,
        file: &str,
        attempt: &AttemptId,
        size: usize,
    ) -> Result<Option<TileFile>> {
        TileFile::clone_of(source, self.places(file, attempt)?, size)
    }

    /// Syncs a fully written shard and leaves it to whoever runs the job.
    ///
    /// # Errors
    /// [`Error::Output`] if the attempt was given up meanwhile; [`Error::DiskFull`], [`Error::Write`].
    pub fn prepare(&self, shard: &TileFile, digest: &str, changes: &Changes) -> Result<Prepared> {
        let prepared = shard.prepare(digest, changes)?;
        if FileId::at(shard.partial())? != Some(shard.id()?) {
            let problem = format!(
                "has given up attempt {} at {}: another one came first, or the job was taken over",
                shard.attempt().as_str(),
                shard.name()
            );
            return Err(Error::output(&self.job, problem));
        }
        shard.keep();
        Ok(prepared)
    }

    /// Whether a shard of this size and digest is committed and there.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn has(&self, file: &str, size: usize, digest: &str) -> Result<bool> {
        let Some(name) = FileName::new(file) else { return Ok(false) };
        let known = Known::of(&self.job)?;
        let size = size as u64;
        let entry = known.entries.get(&name);
        let listed = entry.is_some_and(|entry| entry.size == size && entry.digest == digest);
        let found = disk::look(&self.job.join(MAKING).join(name.as_str()))?;
        Ok(listed && found.is_some_and(|found| found.is_file() && found.len() == size))
    }

    fn places(&self, file: &str, attempt: &AttemptId) -> Result<Places> {
        let name = FileName::new(file).ok_or_else(|| {
            let problem = format!("cannot hold a file named `{}`", file.escape_debug());
            Error::output(&self.job, problem)
        })?;
        Ok(Places::of(&self.job, name, attempt.clone()))
    }
}
