//! What is to be done about what stands under an output's name and in its job directory.

use super::disk::{self, FileId};
use super::inputs::Inputs;
use super::lock::LOCK;
use super::mark::{self, Standing};
use super::placement::Place;
use super::publication::{self, MAKING, MOVES, Moves};
use super::record::{Overwrite, RECORD, RECORD_PARTIAL, Record};
use crate::{Error, Result};
use std::ffi::OsString;
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
pub(super) enum Decision {
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
pub(super) fn decide(place: &Place, request: &Request<'_>) -> Result<Decision> {
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

/// Refuses what is no job directory, before anything is made in it. The lock is not held: others may begin and end there
/// meanwhile. Since a job's lock comes first and goes last, one listing with something else and without it is no job's.
pub(super) fn check_usable(place: &Place) -> Result<()> {
    let Some(metadata) = disk::look(&place.job)? else { return Ok(()) };
    if !metadata.is_dir() {
        let problem = format!("needs {} for the merge, which is no directory", place.job.display());
        return Err(Error::output(&place.output, format!("{problem}; move it away")));
    }
    let names = publication::entries(&place.job)?;
    let known = |name: &OsString| [LOCK, RECORD, MOVES].iter().any(|&known| name == known);
    match names.first() {
        Some(name) if !names.iter().any(known) => Err(of_something_else(place, Path::new(name))),
        _ => Ok(()),
    }
}

fn of_something_else(place: &Place, name: &Path) -> Error {
    let (job, name) = (place.job.display(), name.display());
    let problem = format!("needs {job} for the merge, which holds {name} of something else");
    Error::output(&place.output, format!("{problem}; move it away"))
}

/// Refuses a job directory that holds anything besides what a job that was just begun leaves.
pub(super) fn check_empty(place: &Place) -> Result<()> {
    for (name, directory) in disk::walk(&place.job)? {
        let known = match name.to_str() {
            Some(LOCK | RECORD_PARTIAL) => !directory,
            Some(MAKING) => directory,
            _ => false,
        };
        if !known {
            return Err(of_something_else(place, &name));
        }
    }
    Ok(())
}

/// Whether a job directory says of itself that it holds a job.
pub(super) fn is_begun(place: &Place) -> bool {
    [RECORD, MOVES].iter().any(|name| place.job.join(name).exists())
}
