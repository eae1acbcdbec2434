//! Into a job directory: made, locked, decided upon, and prepared.

use super::decision::{self, Decision, Request};
use super::disk::{self, FileId};
use super::fault::Point;
use super::journal::Journal;
use super::lock::Lock;
use super::name::FileName;
use super::placement::{self, Place};
use super::publication::{self, MAKING};
use super::record::{Overwrite, Record};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// How often a job directory may vanish under the hands of a job that begins.
const MOST_TRIES: usize = 100;

/// A job directory with its lock.
#[derive(Debug)]
pub(super) struct Entered {
    pub place: Place,
    /// Directories above that were made for it.
    pub made: Vec<PathBuf>,
    pub lock: Lock,
}

/// Makes the job directory, if it is not there, and locks it.
///
/// # Errors
/// [`Error::Output`] if it is locked or something else; [`Error::DiskFull`], [`Error::Read`], [`Error::Write`].
pub(super) fn enter(found: &Place) -> Result<Entered> {
    let mut made = Vec::new();
    let mut tries = 0..MOST_TRIES;
    loop {
        match try_to_enter(found, &mut made) {
            Ok((place, lock)) => return Ok(Entered { place, made, lock }),
            // Another job that ends takes away what this one has just found.
            Err(error) if error.is_not_found() && tries.next().is_some() => {}
            Err(error) => {
                placement::remove_empty(&made);
                let stands = disk::look(&found.output)?.is_some();
                return Err(if stands { anew_when_full(found, error) } else { error });
            }
        }
    }
}

fn try_to_enter(found: &Place, made: &mut Vec<PathBuf>) -> Result<(Place, Lock)> {
    decision::check_usable(found)?;
    let (place, new) = found.clone().make()?;
    made.extend(new);
    let locked =
        decision::check_usable(&place).and_then(|()| Lock::take(&place.job, &place.output));
    match locked {
        Ok(lock) => Ok((place, lock)),
        Err(error) => {
            drop(std::fs::remove_dir(&place.job));
            Err(error)
        }
    }
}

impl Entered {
    /// Goes out again; a job directory without a job goes too.
    pub(super) fn leave(self) {
        if decision::check_empty(&self.place).is_ok() {
            drop(publication::discard(&self.place, self.lock));
        }
        placement::remove_empty(&self.made);
    }
}

/// A job that can be worked at.
#[derive(Debug)]
pub(super) struct Started {
    pub record: Record,
    pub journal: Journal,
}

impl Started {
    /// The shards that were committed under this very identity, and their sizes.
    pub(super) fn own(&self) -> impl Iterator<Item = (&FileName, u64)> {
        let inherited = &self.record.inherited;
        let entries = self.journal.entries().iter();
        entries
            .filter(|&(name, entry)| inherited.get(name) != Some(&entry.digest))
            .map(|(name, entry)| (name, entry.size))
    }
}

/// Decides, and prepares the job directory; `None` if the output is complete.
///
/// # Errors
/// As [`decision::decide`], and [`Error::DiskFull`].
pub(super) fn start(place: &Place, request: &Request<'_>) -> Result<Option<Started>> {
    match decision::decide(place, request)? {
        Decision::Complete => Ok(None),
        Decision::Begin { overwrite, replaced } => {
            let begun = begin(place, request, overwrite, replaced);
            begun.map(Some).map_err(|error| not_begun(place, replaced, error))
        }
        Decision::GoOn { record, overwrite, replaced } => {
            go_on(place, request, record, overwrite, replaced).map(Some)
        }
    }
}

/// Takes back what was prepared for a job that could not be begun. Beside an older output, a job with a record stays: there,
/// --resume cannot begin anew.
fn not_begun(place: &Place, replaced: Option<FileId>, error: Error) -> Error {
    if replaced.is_none() {
        drop(publication::clear(place));
    }
    if replaced.is_some() { anew_when_full(place, error) } else { error }
}

/// A full disk must not advise --resume beside an older output before there is a job.
fn anew_when_full(place: &Place, error: Error) -> Error {
    match error {
        Error::DiskFull { path, .. } if !decision::is_begun(place) => {
            let problem = format!(
                "cannot be begun, no space left for {}; free some space and run the same again",
                path.display()
            );
            Error::output(&place.output, problem)
        }
        error => error,
    }
}

fn begin(
    place: &Place,
    request: &Request<'_>,
    overwrite: Overwrite,
    replaced: Option<FileId>,
) -> Result<Started> {
    let record = Record {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        identity: request.identity.to_owned(),
        overwrite,
        making: make_output(place)?,
        replaced,
        inherited: BTreeMap::new(),
    };
    record.write(&place.job)?;
    Ok(Started { record, journal: Journal::open(&place.job)? })
}

fn go_on(
    place: &Place,
    request: &Request<'_>,
    old: Record,
    overwrite: Overwrite,
    replaced: Option<FileId>,
) -> Result<Started> {
    let making = make_output(place)?;
    let directory = place.job.join(MAKING);
    let mut journal = Journal::open(&place.job)?;
    journal.retain(|name, entry| {
        let found = std::fs::symlink_metadata(directory.join(name.as_str()));
        found.is_ok_and(|found| found.is_file() && found.len() == entry.size)
    });
    sweep(&directory, &journal.entries().keys().collect())?;
    let mut inherited = old.inherited.clone();
    if old.identity != request.identity {
        // Files of the job stay: each says what it is of. Shards are told apart by their digests.
        let all = journal.entries().iter();
        inherited = all.map(|(name, entry)| (name.clone(), entry.digest.clone())).collect();
    }
    let identity = request.identity.to_owned();
    let record = Record { identity, overwrite, making, replaced, inherited, ..old.clone() };
    if record != old {
        record.write(&place.job)?;
    }
    Ok(Started { record, journal })
}

/// Makes the directory of the output in the making, if it is not there.
fn make_output(place: &Place) -> Result<FileId> {
    let path = place.job.join(MAKING);
    disk::make_directory(Point::OutputMake, &path)
        .map_err(|error| disk::failure(&path, 0, error))?;
    match disk::look(&path)? {
        Some(metadata) if metadata.is_dir() => Ok(FileId::of(&metadata)),
        _ => {
            let problem = format!("holds a strange `{MAKING}`; move it away");
            Err(Error::output(&place.job, problem))
        }
    }
}

/// Removes from the output in the making all files but these, and directories that are empty then.
pub(super) fn sweep(making: &Path, kept: &BTreeSet<&FileName>) -> Result<()> {
    // What a directory holds comes behind it, and so goes first.
    for (name, directory) in disk::walk(making)?.into_iter().rev() {
        let path = making.join(&name);
        if directory {
            disk::remove_directory(Point::SweepDirectory, &path)?;
        } else if !name.to_str().and_then(FileName::new).is_some_and(|name| kept.contains(&name)) {
            disk::remove_file(Point::SweepFile, &path)?;
        }
    }
    Ok(())
}
