//! The lock of a job directory, which cannot be held twice.

use super::disk::{self, FileId};
use super::fault::Point;
use crate::{Error, Result};
use rustix::fs::{FlockOperation, OFlags, flock};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Name of the file that is locked.
pub(super) const LOCK: &str = "lock";

/// An exclusive lock, let go when dropped.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock of the job directory `job`.
    ///
    /// # Errors
    /// [`Error::Output`] about `output` if somebody holds it; [`Error::Write`], not found, if an earlier holder has removed the
    /// directory or the file meanwhile, so that the caller must begin again.
    pub(super) fn take(job: &Path, output: &Path) -> Result<Self> {
        let path = job.join(LOCK);
        let mut options = OpenOptions::new();
        let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
        options.read(true).write(true).create(true).mode(0o666);
        options.custom_flags(i32::try_from(flags.bits()).unwrap_or_default());
        let file = disk::retry(Point::LockOpen, || options.open(&path))
            .map_err(|error| disk::failure(&path, 0, error))?;
        let take = || Ok(flock(&file, FlockOperation::NonBlockingLockExclusive)?);
        if let Err(error) = disk::retry(Point::LockTake, take) {
            if error.kind() == io::ErrorKind::WouldBlock {
                return Err(Error::output(output, "is locked: another merge is writing it"));
            }
            // A file system without locks (some network ones) is no reason to refuse; a failing disk is.
            if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) {
                return Err(Error::write(&path, error));
            }
        }
        // Its last holder may have unlinked the file after it was opened here: then this lock guards nothing.
        let held = file.metadata().map_err(|error| Error::read(&path, error))?;
        if FileId::at(&path)? == Some(FileId::of(&held)) {
            Ok(Self { file, path })
        } else {
            Err(Error::write(&path, io::ErrorKind::NotFound.into()))
        }
    }

    /// Unlinks the lock's file; whoever opens the path from now on takes another lock.
    pub(super) fn remove(self) -> Result<()> {
        disk::remove_file(Point::DiscardLock, &self.path)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A forked child shares the open file, and would keep the lock beyond its end.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}
