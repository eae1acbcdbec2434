//! Shards of a job: attempts at them are begun, and what they prepare is committed, here alone.

use super::attempt::{self, AttemptId, Commit, Places, Prepared};
use super::disk;
use super::fault::Point;
use super::job::{Held, JobDirectory};
use super::journal::Entry;
use super::name::FileName;
use super::publication;
use super::record::Overwrite;
use super::tile_file::{TileFile, WriteMode};
use crate::plan::Changes;
use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

impl JobDirectory {
    /// Whether a shard of this size and digest is committed and still there.
    #[must_use]
    pub fn has(&self, file: &str, size: usize, digest: &str) -> bool {
        let Some(name) = FileName::new(file) else { return false };
        let mut state = self.lock();
        let held = state.held.as_ref();
        let known =
            held.is_some_and(|held| is_committed(held, &self.making(), &name, size as u64, digest));
        if known {
            state.written.insert(name, (size as u64, None));
        }
        known
    }

    /// How far requantised tensors of a committed shard changed.
    pub fn changes(&self, file: &str) -> Changes {
        let (state, name) = (self.lock(), FileName::new(file));
        let found = state.held.as_ref().zip(name);
        found.map_or_else(Changes::new, |(held, name)| held.journal.changes(&name))
    }

    /// Gives up all attempts that were begun before, in this process or another, and what they made.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn take_over(&self) -> Result<()> {
        let mut state = self.lock();
        self.held(&mut state)?.waiting.clear();
        attempt::clear(&self.place.job)
    }

    /// Makes the place where attempts lie, for workers who name their attempts themselves.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::Write`].
    pub fn hand_out(&self) -> Result<()> {
        let mut state = self.lock();
        self.held(&mut state)?.begun = true;
        attempt::make(&self.place.job)
    }

    /// Begins an attempt at each of these shards: they stand in the journal when this returns.
    ///
    /// # Errors
    /// [`Error::Output`] if a name leaves the directory; [`Error::DiskFull`], [`Error::Write`].
    pub fn begin_attempts(&self, files: &[&str]) -> Result<Vec<AttemptId>> {
        let names = files.iter().map(|file| self.checked(file)).collect::<Result<Vec<_>>>()?;
        let mut state = self.lock();
        let held = self.held(&mut state)?;
        held.begun = true;
        attempt::make(&self.place.job)?;
        held.journal.begin(&names)
    }

    /// The same for shards that this process creates later.
    ///
    /// # Errors
    /// As [`JobDirectory::begin_attempts`].
    pub fn begin_own_attempts(&self, files: &[&str]) -> Result<()> {
        let begun = self.begin_attempts(files)?;
        let names = files.iter().map(|file| self.checked(file)).collect::<Result<Vec<_>>>()?;
        self.held(&mut self.lock())?.waiting.extend(names.into_iter().zip(begun));
        Ok(())
    }

    /// Enters an attempt that its worker has named into the journal, so that what it prepared can be committed.
    ///
    /// # Errors
    /// As [`JobDirectory::begin_attempts`].
    pub fn adopt(&self, file: &str, attempt: &AttemptId) -> Result<()> {
        let name = self.checked(file)?;
        let mut state = self.lock();
        self.held(&mut state)?.journal.adopt(&[(attempt.clone(), name)])
    }

    /// Gives an attempt up: what it made, or is making, is removed.
    ///
    /// # Errors
    /// [`Error::Output`] if the name leaves the directory; [`Error::Write`].
    pub fn abort(&self, file: &str, attempt: &AttemptId) -> Result<()> {
        attempt::abort(&self.place.job, &self.checked(file)?, attempt)
    }

    /// Before the first byte of a shard: an output that is overwritten in place goes now.
    ///
    /// # Errors
    /// [`Error::Output`], [`Error::Write`].
    pub fn make_room(&self) -> Result<()> {
        let mut state = self.lock();
        let held = self.held(&mut state)?;
        held.begun = true;
        if !held.has_room && held.record.overwrite == Overwrite::InPlace {
            publication::make_room(&self.place, &held.record, &self.inputs)?;
        }
        held.has_room = true;
        Ok(())
    }

    /// Creates the partial file of a shard, of the attempt that was begun or of a new one.
    ///
    /// # Errors
    /// [`Error::Output`] if the name leaves the directory; [`Error::DiskFull`], [`Error::Write`].
    pub fn create_shard(&self, file: &str, size: usize, mode: WriteMode) -> Result<TileFile> {
        TileFile::create(self.places(file)?, size, mode)
    }

    /// Creates the partial file of a shard as a clone of an input file of the same bytes, which takes no time and no
    /// room; `None` where the file system has no such thing.
    ///
    /// # Errors
    /// As [`JobDirectory::create_shard`].
    pub fn clone_shard(&self, file: &str, size: usize, source: &File) -> Result<Option<TileFile>> {
        TileFile::clone_of(source, self.places(file)?, size)
    }

    fn places(&self, file: &str) -> Result<Places> {
        let name = self.checked(file)?;
        self.make_room()?;
        if !self.held(&mut self.lock())?.waiting.contains_key(&name) {
            self.begin_own_attempts(&[file])?;
        }
        let waiting = self.held(&mut self.lock())?.waiting.remove(&name);
        let attempt = waiting.ok_or_else(|| self.lost(&name))?;
        Ok(Places::of(&self.place.job, name, attempt))
    }

    /// Prepares and commits a fully written shard.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::Write`]; [`Error::Output`] if its file has been taken away.
    pub fn commit_shard(&self, shard: &TileFile, digest: &str, changes: &Changes) -> Result<()> {
        match self.commit(&shard.prepare(digest, changes)?)? {
            Commit::Gone => Err(self.lost(shard.name())),
            Commit::Named | Commit::Late => {
                shard.keep();
                Ok(())
            }
        }
    }

    /// Gives a prepared shard its name and enters it into the journal; the first that was prepared wins. The digest must be that
    /// of the job's plan, which the caller compares.
    ///
    /// # Errors
    /// [`Error::Output`] if no such attempt stands in the journal; [`Error::DiskFull`], [`Error::Write`]. After a line of the
    /// journal could not be written, nothing more is committed.
    pub fn commit(&self, prepared: &Prepared) -> Result<Commit> {
        let Prepared { file, attempt, size, digest, changes } = prepared;
        let making = self.making();
        let places = Places::of(&self.place.job, file.clone(), attempt.clone());
        let mut state = self.lock();
        let held = self.held(&mut state)?;
        if held.journal.attempted(attempt) != Some(file) {
            let problem = format!("has begun no attempt {} at {file}", attempt.as_str());
            return Err(Error::output(&self.place.job, problem));
        }
        if is_committed(held, &making, file, *size, digest) {
            attempt::abort(&self.place.job, file, attempt)?;
            state.written.insert(file.clone(), (*size, None));
            return Ok(Commit::Late);
        }
        let found = disk::look(&places.partial)?;
        if !found.is_some_and(|found| found.is_file() && found.len() == *size) {
            return Ok(Commit::Gone);
        }
        state.written.remove(file);
        let journal = &mut self.held(&mut state)?.journal;
        if journal.entries().contains_key(file) {
            // Killed behind the rename, the journal must not take these bytes for those.
            journal.revoke(file)?;
        }
        disk::rename(Point::ShardRename, &places.partial, &places.target)?;
        disk::sync_directory(Point::ShardDirectorySync, &making)?;
        journal.commit(file, Entry::new(*size, digest, changes))?;
        state.written.insert(file.clone(), (*size, None));
        Ok(Commit::Named)
    }

    fn lost(&self, file: &FileName) -> Error {
        let problem =
            format!("has lost the file of an attempt at {file}; leave its directory alone");
        Error::output(&self.place.job, problem)
    }
}

/// Whether the journal lists a shard of this size and digest, and it is there.
fn is_committed(held: &Held, making: &Path, name: &FileName, size: u64, digest: &str) -> bool {
    let known = held.journal.entries().get(name);
    let listed = known.is_some_and(|entry| entry.size == size && entry.digest == digest);
    let found = listed.then(|| std::fs::symlink_metadata(making.join(name.as_str())));
    found.is_some_and(|found| found.is_ok_and(|found| found.is_file() && found.len() == size))
}
