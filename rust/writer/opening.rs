//! What to do with what stands under an output's name and in its job directory. The lock is held.

use super::disk::{self, FileId};
use super::fault::Point;
use super::inputs::Inputs;
use super::journal::Journal;
use super::lock::LOCK;
use super::mark::{self, Standing};
use super::name::FileName;
use super::placement::Place;
use super::publication::{self, MAKING, MOVES, Moves};
use super::record::{Overwrite, RECORD, RECORD_PARTIAL, Record};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What the caller wants.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub identity: &'a str,
    pub inputs: &'a Inputs,
    pub resume: bool,
    pub overwrite: Overwrite,
}

/// What is to be done.
#[derive(Debug)]
enum Decision {
    /// Nothing: the output is there.
    Complete,
    /// A new job, in a job directory without an old one.
    Begin { overwrite: Overwrite, replaced: Option<FileId> },
    /// The job that lies there, its record as it was.
    GoOn { record: Record, overwrite: Overwrite, replaced: Option<FileId> },
}

/// Decides, after it has ended what a killed publication left.
///
/// # Errors
/// [`Error::Output`] with the way out; [`Error::Read`], [`Error::Write`].
fn decide(place: &Place, request: &Request<'_>) -> Result<Decision> {
    let output = &place.output;
    request.inputs.check_files(&place.job, output)?;
    let unfinished = unfinished(place, request.inputs)?;
    let found = match mark::look(output, place.inside)? {
        Standing::File => return Err(Error::output(output, "is a file; name a directory")),
        Standing::Foreign(problem) => return Err(Error::output(output, problem)),
        Standing::Absent | Standing::Empty => None,
        Standing::Ours(mark) => {
            request.inputs.check_files(output, output)?;
            Some(mark)
        }
    };
    let replaced = found.as_ref().map(|mark| mark.directory);
    if let Some(record) = unfinished {
        return go_on_or_begin(place, request, record, replaced);
    }
    let Some(mark) = found else {
        return Ok(Decision::Begin { overwrite: request.overwrite, replaced });
    };
    if request.resume && mark.identity == request.identity {
        if let Some(name) = mark.damage(output) {
            let problem =
                format!("lacks {name} as its report lists it; make it again with --overwrite");
            // Overwriting was asked for: that is making it again.
            if request.overwrite == Overwrite::No {
                return Err(Error::output(output, problem));
            }
        } else {
            return Ok(Decision::Complete);
        }
    }
    match (request.overwrite, request.resume) {
        (Overwrite::No, true) => Err(Error::output(
            output,
            "is complete, and was made of other inputs or with other settings; replace it with --overwrite or choose \
             another directory",
        )),
        (Overwrite::No, false) => Err(Error::output(
            output,
            "exists and is complete; pass --overwrite to replace it or choose another directory",
        )),
        (overwrite, _) => Ok(Decision::Begin { overwrite, replaced }),
    }
}

/// A job directory holds a job that was not finished.
fn go_on_or_begin(
    place: &Place,
    request: &Request<'_>,
    record: Record,
    replaced: Option<FileId>,
) -> Result<Decision> {
    if request.resume {
        // An overwriting job is resumed as one, without being told so again.
        let overwrite = match request.overwrite {
            Overwrite::No => record.overwrite,
            asked => asked,
        };
        if overwrite == Overwrite::No && replaced.is_some() {
            return Err(Error::output(
                &place.output,
                format!(
                    "has appeared while its merge in {} was unfinished; move it away, or replace it with --overwrite",
                    place.job.display()
                ),
            ));
        }
        return Ok(Decision::GoOn { record, overwrite, replaced });
    }
    if request.overwrite == Overwrite::No {
        return Err(Error::output(
            &place.output,
            format!(
                "has an unfinished merge in {}; continue it with --resume or start anew with --overwrite",
                place.job.display()
            ),
        ));
    }
    publication::clear(place)?;
    Ok(Decision::Begin { overwrite: request.overwrite, replaced })
}

/// The record of the unfinished job in a job directory, if one lies there. Finishes what is only to be cleaned up.
fn unfinished(place: &Place, inputs: &Inputs) -> Result<Option<Record>> {
    if place.inside
        && let Some(moves) = Moves::read(&place.job)?
    {
        inputs.check_files(&place.output, &place.output)?;
        moves.carry_out(place)?;
        publication::clear(place)?;
        return Ok(None);
    }
    if let Some(record) = Record::read(&place.job)? {
        if place.inside || !publication::settle(place, &record, inputs)? {
            return Ok(Some(record));
        }
        publication::clear(place)?;
        return Ok(None);
    }
    check_empty(place)?;
    Ok(None)
}

/// Refuses what is no job directory, before anything is made in it.
pub(super) fn check_usable(place: &Place) -> Result<()> {
    let Some(metadata) = disk::look(&place.job)? else { return Ok(()) };
    if !metadata.is_dir() {
        let problem = format!("needs {} for the merge, which is no directory", place.job.display());
        return Err(Error::output(&place.output, format!("{problem}; move it away")));
    }
    if is_begun(place) { Ok(()) } else { check_empty(place) }
}

/// Refuses a job directory that holds anything besides what a job that was just begun leaves.
fn check_empty(place: &Place) -> Result<()> {
    let refuse = |what: String| Err(Error::output(&place.output, what));
    for (name, directory) in disk::walk(&place.job)? {
        let known = match name.to_str() {
            Some(LOCK | RECORD_PARTIAL) => !directory,
            Some(MAKING) => directory,
            _ => false,
        };
        if !known {
            return refuse(format!(
                "needs {} for the merge, which holds {} of something else; move it away",
                place.job.display(),
                name.display()
            ));
        }
    }
    Ok(())
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
/// As [`decide`], and [`Error::DiskFull`].
pub(super) fn start(place: &Place, request: &Request<'_>) -> Result<Option<Started>> {
    match decide(place, request)? {
        Decision::Complete => Ok(None),
        Decision::Begin { overwrite, replaced } => {
            let begun = begin(place, request, overwrite, replaced);
            begun.map(Some).map_err(|error| match error {
                // A job that has no record cannot be resumed beside an older output.
                Error::DiskFull { path, .. } if overwrite != Overwrite::No && !is_begun(place) => {
                    let problem = format!(
                        "cannot be begun, no space left for {}; free some space and run the same again",
                        path.display()
                    );
                    Error::output(&place.output, problem)
                }
                error => error,
            })
        }
        Decision::GoOn { record, overwrite, replaced } => {
            go_on(place, request, record, overwrite, replaced).map(Some)
        }
    }
}

/// Whether a job directory says of itself that it holds a job.
pub(super) fn is_begun(place: &Place) -> bool {
    [RECORD, MOVES].iter().any(|name| place.job.join(name).exists())
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
        // What another job has measured says nothing here. Shards are told apart by their digests.
        for name in publication::job_files(place)? {
            disk::remove_tree(Point::SweepFile, Point::SweepDirectory, &place.job.join(name))?;
        }
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
