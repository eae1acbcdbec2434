//! The job directory: who may write an output, what is already made of it, and how files become part of it.

use super::attempt::AttemptId;
use super::decision::Request;
use super::disk::{self, Steps};
use super::fault::Point;
use super::inputs::Inputs;
use super::journal::Journal;
use super::lock::Lock;
use super::name::FileName;
use super::opening::{self, Entered, Started};
use super::placement::{self, Place, Placement};
use super::publication::{self, MAKING, MOVES};
use super::record::{Overwrite, Record};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes that a copy holds at a time.
const COPY: usize = 1 << 20;
/// Scores of the largest models take some tens of megabytes.
const LARGEST_JOB_FILE: u64 = 1 << 30;

/// A file of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// Its path from the output on.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3, hexadecimal; `None` for shards, which are compared with their plan instead.
    pub digest: Option<String>,
}

/// A job directory, locked against other writers until [`JobDirectory::publish`], [`JobDirectory::close`] or drop.
#[derive(Debug)]
pub struct JobDirectory {
    pub(super) place: Place,
    pub(super) inputs: Inputs,
    /// Directories above that were made for this job.
    made: Vec<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// `None` once published or closed.
    pub held: Option<Held>,
    complete: bool,
    /// Bytes and digest of the files that are part of the output.
    pub written: BTreeMap<FileName, (u64, Option<String>)>,
}

#[derive(Debug)]
pub(super) struct Held {
    lock: Lock,
    pub record: Record,
    pub journal: Journal,
    /// Whether anything was begun to be written in this session.
    pub begun: bool,
    /// Whether an output that is overwritten in place is gone.
    pub has_room: bool,
    /// Attempts that this process has begun for itself and not used yet.
    pub waiting: BTreeMap<FileName, AttemptId>,
}

impl JobDirectory {
    /// Opens the job that makes the output at `output`, or begins it.
    ///
    /// `identity` tells this job from others: settings, identities of the inputs, version. `inputs` are files and directories that
    /// must stay as they are. An unfinished job goes on with `resume` and is thrown away with `overwrite`, which also lets a
    /// finished output of this program be replaced. With `resume`, a finished output of the same identity is
    /// [complete](Self::is_complete). What this program did not write is never touched.
    ///
    /// # Errors
    /// [`Error::Output`] if the output or the job directory holds something else, is locked, or overlaps one of `inputs`;
    /// [`Error::DiskFull`], [`Error::Read`], [`Error::Write`].
    pub fn open(
        output: &Path,
        identity: &str,
        inputs: &[PathBuf],
        resume: bool,
        overwrite: Overwrite,
    ) -> Result<Self> {
        Self::open_at(output, identity, inputs, resume, overwrite, Placement::Auto)
    }

    /// The same with a say in where the job directory lies.
    ///
    /// # Errors
    /// As [`JobDirectory::open`].
    pub fn open_at(
        output: &Path,
        identity: &str,
        inputs: &[PathBuf],
        resume: bool,
        overwrite: Overwrite,
        placement: Placement,
    ) -> Result<Self> {
        let inputs = Inputs::new(inputs);
        let found = Place::find(output, placement)?;
        inputs.check_apart(&found.output, output)?;
        inputs.check_apart(&found.job, &found.job)?;
        let entered = opening::enter(&found)?;
        let request = Request { identity, inputs: &inputs, resume, overwrite };
        let started = match opening::start(&entered.place, &request) {
            Ok(started) => started,
            Err(error) => {
                entered.leave();
                return Err(error);
            }
        };
        let Entered { place, made, lock } = entered;
        let mut state = State::default();
        if let Some(started) = started {
            let own = started.own().map(|(name, size)| (name.clone(), (size, None)));
            state.written = own.collect();
            let Started { record, journal } = started;
            state.held = Some(Held {
                lock,
                record,
                journal,
                begun: false,
                has_room: false,
                waiting: BTreeMap::new(),
            });
        } else {
            publication::discard(&place, lock)?;
            state.complete = true;
        }
        Ok(Self { place, inputs, made, state: Mutex::new(state) })
    }

    /// The output: absolute, links resolved.
    #[must_use]
    pub fn output(&self) -> &Path {
        &self.place.output
    }

    /// The job directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.place.job
    }

    /// Where the output's files are: in the job directory until it is published.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        if self.is_complete() { self.place.output.clone() } else { self.making() }
    }

    /// Whether the output is whole and has its name.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.lock().complete
    }

    /// The shards that are committed.
    #[must_use]
    pub fn committed(&self) -> Vec<String> {
        let state = self.lock();
        let names = state.held.iter().flat_map(|held| held.journal.entries().keys());
        names.map(|name| name.as_str().to_owned()).collect()
    }

    /// All files of the output so far. Shards of an earlier job with another identity count once they are asked for.
    #[must_use]
    pub fn written(&self) -> Vec<WrittenFile> {
        let state = self.lock();
        let files = state.written.iter().map(|(name, (bytes, digest))| WrittenFile {
            name: name.as_str().to_owned(),
            bytes: *bytes,
            digest: digest.clone(),
        });
        files.collect()
    }

    /// Writes a small file of the output durably: a killed job has the old one, none, or the whole new one.
    ///
    /// # Errors
    /// [`Error::Output`] if the name leaves the directory; [`Error::DiskFull`], [`Error::Write`].
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.place_file(name, bytes.len() as u64, |file, put| put(file, bytes))
    }

    /// Writes a file that is made piece by piece, as [`JobDirectory::write_file`] writes one; `next` gives the pieces.
    ///
    /// # Errors
    /// As [`JobDirectory::write_file`], and what `next` says.
    pub fn write_pieces(
        &self,
        name: &str,
        next: &mut dyn FnMut() -> Option<Result<Vec<u8>>>,
    ) -> Result<()> {
        self.place_file(name, 0, |file, put| {
            while let Some(piece) = next() {
                put(file, &piece?)?;
            }
            Ok(())
        })
    }

    /// Copies a regular file into the output durably, as [`JobDirectory::write_file`] writes one.
    ///
    /// # Errors
    /// As [`JobDirectory::write_file`], and [`Error::Read`] if the source cannot be read.
    pub fn copy_file(&self, source: &Path, name: &str) -> Result<()> {
        let failed = |error| Error::read(source, error);
        let (mut input, size) = disk::open_regular(source).map_err(failed)?;
        self.place_file(name, size, |file, put| {
            let mut buffer = vec![0; COPY];
            loop {
                match input.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(length) => put(file, &buffer[..length])?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(failed(error)),
                }
            }
        })
    }

    /// Appends to a file of the job, which is created if need be and is never part of the output. The data has reached the
    /// kernel when this returns; a failure leaves the file as it was.
    ///
    /// # Errors
    /// [`Error::Output`] if the name is none of a job's file; [`Error::DiskFull`], [`Error::Write`].
    pub fn append(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.job_file(name)?;
        let mut state = self.lock();
        self.held(&mut state)?.begun = true;
        let failed = |error| disk::failure(&path, bytes.len() as u64, error);
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o666);
        let file = disk::retry(Point::JobFileOpen, || options.open(&path)).map_err(failed)?;
        let before = file.metadata().map_err(failed)?.len();
        disk::write_all(Point::JobFileWrite, &file, bytes).map_err(|error| {
            drop(file.set_len(before));
            failed(error)
        })
    }

    /// Reads a file of the job; `None` if there is no such file.
    ///
    /// # Errors
    /// [`Error::Output`] if the name is none of a job's file; [`Error::Read`].
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        disk::read_capped(&self.job_file(name)?, LARGEST_JOB_FILE)
    }

    /// Removes a file of the job, if it is there.
    ///
    /// # Errors
    /// [`Error::Output`] if the name is none of a job's file; [`Error::Write`].
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.job_file(name)?;
        self.held(&mut self.lock())?;
        disk::remove_file(Point::JobFileRemove, &path)
    }

    /// Gives the whole output its name, durably. An old output that it replaces is removed, and so is the job directory.
    ///
    /// # Errors
    /// [`Error::Output`] if the output's place is no longer what it was, or if it is published and something is left to clean
    /// up; [`Error::DiskFull`], [`Error::Write`].
    pub fn publish(&self) -> Result<()> {
        let mut state = self.lock();
        if state.complete {
            return Ok(());
        }
        self.held(&mut state)?.begun = true;
        opening::sweep(&self.making(), &state.written.keys().collect())?;
        publication::publish(&self.place, &self.held(&mut state)?.record, &self.inputs)?;
        state.complete = true;
        let Some(held) = state.held.take() else { return Ok(()) };
        publication::clean_up(&self.place, &held.record, &self.inputs)
            .and_then(|()| publication::discard(&self.place, held.lock))
            .map_err(|error| {
                let problem = format!("is complete; only its job directory could not be cleaned up, which --resume does ({error})");
                Error::output(&self.place.output, problem)
            })
    }

    /// Lets go of the job. Without anything that a later run could use, its directory leaves no trace.
    pub fn close(&self) {
        let Some(held) = self.lock().held.take() else { return };
        // Beside an older output --resume cannot begin anew, so that the job must stay to be resumed.
        let overwriting = held.begun && held.record.replaced.is_some();
        let measured = publication::job_files(&self.place).map_or(true, |names| !names.is_empty());
        // A publication that has begun is carried out by the next run.
        let moving = self.place.job.join(MOVES).exists();
        if !overwriting && !measured && !moving && held.journal.entries().is_empty() {
            // What cannot be removed is an empty job, which the next run may resume.
            drop(publication::discard(&self.place, held.lock));
            placement::remove_empty(&self.made);
        }
    }

    /// Makes a small file of the output; `fill` gives its bytes to the function that it is given.
    fn place_file(
        &self,
        name: &str,
        needed: u64,
        fill: impl FnOnce(&File, &mut dyn FnMut(&File, &[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let name = self.checked(name)?;
        let mut state = self.lock();
        state.written.remove(&name);
        let held = self.held(&mut state)?;
        held.begun = true;
        if held.journal.entries().contains_key(&name) {
            held.journal.revoke(&name)?;
        }
        let making = self.making();
        let target = making.join(name.as_str());
        let inner = target.ancestors().skip(1).take_while(|&path| path != making);
        for directory in inner.collect::<Vec<_>>().into_iter().rev() {
            disk::make_directory(Point::FileDirectory, directory)
                .map_err(|error| disk::failure(directory, 0, error))?;
        }
        let steps = Steps {
            create: Point::FileCreate,
            write: Point::FileWrite,
            sync: Point::FileSync,
            rename: Point::FileRename,
            directory: Point::FileDirectorySync,
        };
        let (mut hasher, mut length) = (blake3::Hasher::new(), 0);
        disk::place(&steps, &making.join(name.partial()), &target, needed, |file| {
            fill(file, &mut |file, bytes| {
                hasher.update(bytes);
                length += bytes.len() as u64;
                disk::write_all(steps.write, file, bytes)
                    .map_err(|error| disk::failure(&target, needed, error))
            })
        })?;
        state.written.insert(name, (length, Some(hasher.finalize().to_hex().to_string())));
        Ok(())
    }

    pub(super) fn checked(&self, name: &str) -> Result<FileName> {
        FileName::new(name).ok_or_else(|| {
            let problem = format!("cannot hold a file named `{}`", name.escape_debug());
            Error::output(&self.place.output, problem)
        })
    }

    fn job_file(&self, name: &str) -> Result<PathBuf> {
        match FileName::new(name) {
            Some(_) if !name.contains('/') && !publication::is_reserved(name) => {
                Ok(self.place.job.join(name))
            }
            _ => {
                let problem = format!("cannot hold a file named `{}`", name.escape_debug());
                Err(Error::output(&self.place.job, problem))
            }
        }
    }

    pub(super) fn held<'a>(&self, state: &'a mut MutexGuard<'_, State>) -> Result<&'a mut Held> {
        let problem = if state.complete { "is complete" } else { "is closed; open it again" };
        state.held.as_mut().ok_or_else(|| Error::output(&self.place.output, problem))
    }

    pub(super) fn making(&self) -> PathBuf {
        self.place.job.join(MAKING)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for JobDirectory {
    fn drop(&mut self) {
        self.close();
    }
}
