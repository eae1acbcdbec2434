//! How a whole output gets its name, how an old one goes, and what is left to do after a kill in between.
//!
//! Beside the output, one rename is the moment: before it stands the old output or nothing, after it the new one. Inside it, a
//! durable list of moves is: whoever finds the list carries it out to its end, however often it takes.

use super::attempt::{self, ATTEMPTS};
use super::disk::{self, FileId, Steps};
use super::fault::Point;
use super::inputs::Inputs;
use super::lock::{LOCK, Lock};
use super::mark::{self, Mark, Standing};
use super::name::FileName;
pub(super) use super::name::{MAKING, MOVES};
use super::placement::Place;
use super::record::{RECORD, Record};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The old output, where directories cannot be exchanged.
const OLD: &str = "old";
/// The old output, while it is removed before the new one is there.
const DOOMED: &str = "doomed";
const MOVES_PARTIAL: &str = ".publish.json.partial";
/// A hundred thousand names.
const LARGEST: u64 = 64 << 20;

/// What names of a job directory stand for something else than a file of the caller's.
pub(super) fn is_reserved(name: &str) -> bool {
    name.starts_with('.')
        || [LOCK, RECORD, "journal", MAKING, OLD, DOOMED, MOVES, ATTEMPTS].contains(&name)
}

/// How a publication inside the output goes on.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Moves {
    /// Files of the new output.
    add: BTreeSet<FileName>,
    /// Files of the old one.
    remove: BTreeSet<FileName>,
}

impl Moves {
    /// The list in a job directory, if its publication has begun.
    pub(super) fn read(job: &Path) -> Result<Option<Self>> {
        let Some(bytes) = disk::read_capped(&job.join(MOVES), LARGEST)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            let problem = format!("holds a {MOVES} that is not safemerge-fast's ({error})");
            Error::output(job, format!("{problem}; move it away"))
        })
    }

    fn write(&self, job: &Path) -> Result<()> {
        let path = job.join(MOVES);
        let bytes = serde_json::to_vec(self).map_err(|error| Error::write(&path, error.into()))?;
        let steps = Steps {
            create: Point::MovesCreate,
            write: Point::MovesWrite,
            sync: Point::MovesSync,
            rename: Point::MovesRename,
            directory: Point::MovesDirectorySync,
        };
        let needed = bytes.len() as u64;
        disk::place(&steps, &job.join(MOVES_PARTIAL), &path, needed, |file| {
            disk::write_all(steps.write, file, &bytes)
                .map_err(|error| disk::failure(&path, needed, error))
        })
    }

    /// Carries the list out, from wherever it stopped.
    pub(super) fn carry_out(&self, place: &Place) -> Result<()> {
        let (making, output) = (place.job.join(MAKING), &place.output);
        // A file of both outputs is the old one as long as the new one has not been moved.
        let is_old = |name: &FileName| -> Result<bool> {
            Ok(!self.add.contains(name) || disk::look(&making.join(name.as_str()))?.is_some())
        };
        let mut old = Vec::new();
        for name in &self.remove {
            if is_old(name)? {
                old.push(name.as_str());
            }
        }
        remove_files(output, &old, Point::MoveRemove, Point::MoveSync)?;
        for marks in [false, true] {
            for name in self.add.iter().filter(|name| name.is_mark() == marks) {
                let (from, to) = (making.join(name.as_str()), output.join(name.as_str()));
                if disk::look(&from)?.is_none() {
                    continue;
                }
                let parents: Vec<&Path> = parents(output, &to);
                for parent in parents.into_iter().rev() {
                    disk::make_directory(Point::MoveDirectory, parent)
                        .map_err(|error| disk::failure(parent, 0, error))?;
                }
                disk::rename_new(Point::MoveRename, &from, &to)?;
            }
            let files: Vec<PathBuf> =
                self.add.iter().map(|name| output.join(name.as_str())).collect();
            let inner = files.iter().flat_map(|file| parents(output, file));
            let touched: BTreeSet<&Path> = inner.chain([output.as_path()]).collect();
            for directory in touched {
                disk::sync_directory(Point::MoveSync, directory)?;
            }
        }
        Ok(())
    }
}

/// The directories between an output and one of its files, innermost first.
fn parents<'a>(output: &Path, file: &'a Path) -> Vec<&'a Path> {
    file.ancestors().skip(1).take_while(|&path| path != output).collect()
}

/// Removes files of an output, those that make it look complete first and its report last, and directories that are empty then.
fn remove_files(output: &Path, names: &[&str], file: Point, sync: Point) -> Result<()> {
    let is_mark = |name: &str| FileName::new(name).is_some_and(|name| name.is_mark());
    for marks in [true, false] {
        let chosen = names.iter().filter(|name| is_mark(name) == marks && **name != mark::REPORT);
        for name in chosen {
            disk::remove_file(file, &output.join(name))?;
        }
        disk::sync_directory(sync, output)?;
    }
    if names.contains(&mark::REPORT) {
        disk::remove_file(file, &output.join(mark::REPORT))?;
    }
    let paths: Vec<PathBuf> = names.iter().map(|name| output.join(name)).collect();
    let directories: BTreeSet<&Path> =
        paths.iter().flat_map(|path| parents(output, path)).collect();
    for directory in directories.into_iter().rev() {
        disk::remove_directory(file, directory)?;
    }
    Ok(())
}

fn changed(place: &Place) -> Error {
    Error::output(
        &place.output,
        "has changed while the merge ran; move what stands there away and continue with --resume",
    )
}

/// The old output, if it still is the one that the job was begun to replace; `None` if there is nothing.
fn replaced(place: &Place, record: &Record, inputs: &Inputs) -> Result<Option<Mark>> {
    match mark::look(&place.output, place.inside)? {
        Standing::Absent | Standing::Empty => Ok(None),
        Standing::Ours(mark) if record.replaced == Some(mark.directory) => {
            inputs.check_files(&place.output, &place.output)?;
            Ok(Some(mark))
        }
        _ => Err(changed(place)),
    }
}

/// Removes the old output before the new one is there.
pub(super) fn make_room(place: &Place, record: &Record, inputs: &Inputs) -> Result<()> {
    let Some(mark) = replaced(place, record, inputs)? else { return Ok(()) };
    if place.inside {
        let names: Vec<&str> = mark.names().collect();
        return remove_files(&place.output, &names, Point::DoomFile, Point::DoomSync);
    }
    let doomed = place.job.join(DOOMED);
    disk::rename_new(Point::DoomRename, &place.output, &doomed)?;
    disk::sync_directory(Point::DoomSync, &place.parent)?;
    disk::sync_directory(Point::DoomSync, &place.job)?;
    disk::remove_tree(Point::DoomFile, Point::DoomDirectory, &doomed)
}

/// Gives the whole output its name. What it replaces is in the job directory then.
pub(super) fn publish(place: &Place, record: &Record, inputs: &Inputs) -> Result<()> {
    let making = place.job.join(MAKING);
    let inner = disk::walk(&making)?;
    let (directories, files): (Vec<_>, Vec<_>) =
        inner.into_iter().partition(|(_, directory)| *directory);
    for (name, _) in directories {
        disk::sync_directory(Point::PublishSync, &making.join(name))?;
    }
    disk::sync_directory(Point::PublishSync, &making)?;
    let old = replaced(place, record, inputs)?;
    if place.inside {
        let add = files.iter().filter_map(|(name, _)| FileName::new(name.to_str()?)).collect();
        let remove = old.iter().flat_map(Mark::names).filter_map(FileName::new).collect();
        let moves = Moves { add, remove };
        moves.write(&place.job)?;
        return moves.carry_out(place);
    }
    let output = &place.output;
    let occupied = |error: Error| match error {
        Error::Write { source, .. }
            if matches!(
                source.kind(),
                std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::DirectoryNotEmpty
            ) =>
        {
            changed(place)
        }
        error => error,
    };
    if old.is_none() {
        if disk::look(output)?.is_none() {
            disk::rename_new(Point::PublishRename, &making, output).map_err(occupied)?;
        } else {
            disk::rename(Point::PublishRename, &making, output).map_err(occupied)?;
        }
    } else if !disk::exchange(Point::PublishExchange, &making, output)? {
        let aside = place.job.join(OLD);
        disk::rename_new(Point::PublishSetAside, output, &aside)?;
        if let Err(error) = disk::rename_new(Point::PublishMoveIn, &making, output) {
            drop(disk::rename_new(Point::PutBack, &aside, output));
            return Err(occupied(error));
        }
    }
    Ok(())
}

/// Makes the output's name durable, and only then removes what it replaces.
pub(super) fn clean_up(place: &Place, record: &Record, inputs: &Inputs) -> Result<()> {
    if place.inside {
        return Ok(());
    }
    disk::sync_directory(Point::PublishParentSync, &place.parent)?;
    disk::sync_directory(Point::PublishJobSync, &place.job)?;
    remove_replaced(place, record, inputs)
}

/// Whether a path holds a directory that was known in this job. Numbers of devices change when a machine starts anew, so that
/// the directory's is compared with the job's.
fn is_known(place: &Place, path: &Path, known: FileId) -> Result<bool> {
    let Some(job) = FileId::at(&place.job)? else { return Ok(false) };
    Ok(FileId::at(path)? == Some(FileId { device: job.device, inode: known.inode }))
}

/// Removes the old output from the job directory, after the new one has its name.
fn remove_replaced(place: &Place, record: &Record, inputs: &Inputs) -> Result<()> {
    for name in [MAKING, OLD] {
        let path = place.job.join(name);
        if disk::look(&path)?.is_none() {
            continue;
        }
        let Some(replaced) = record.replaced else {
            return Err(Error::output(
                &place.job,
                format!("holds a strange `{name}`; move it away"),
            ));
        };
        if !is_known(place, &path, replaced)? {
            return Err(Error::output(
                &place.job,
                format!("holds a strange `{name}`; move it away"),
            ));
        }
        inputs.check_files(&path, &place.job)?;
        disk::remove_tree(Point::OldFile, Point::OldDirectory, &path)?;
    }
    Ok(())
}

/// Looks at a job directory beside its output after a kill. Returns true if the output had been published: what it replaced is
/// gone then. Otherwise an old output that was set aside is back, and one that was to go is gone.
pub(super) fn settle(place: &Place, record: &Record, inputs: &Inputs) -> Result<bool> {
    let (making, output) = (place.job.join(MAKING), &place.output);
    let published = if is_known(place, &making, record.making)? {
        false
    } else if is_known(place, output, record.making)? {
        true
    } else {
        disk::look(&making)?.is_none()
            && matches!(
                mark::look(output, false)?,
                Standing::Ours(mark) if mark.identity == record.identity
            )
    };
    if published {
        clean_up(place, record, inputs)?;
        return Ok(true);
    }
    let aside = place.job.join(OLD);
    if disk::look(&aside)?.is_some() {
        if disk::look(output)?.is_some() {
            let problem =
                format!("stands where {} belongs; move one of them away", aside.display());
            return Err(Error::output(output, problem));
        }
        disk::rename_new(Point::PutBack, &aside, output)?;
        disk::sync_directory(Point::PutBackSync, &place.parent)?;
        disk::sync_directory(Point::PutBackSync, &place.job)?;
    }
    let doomed = place.job.join(DOOMED);
    inputs.check_files(&doomed, &place.job)?;
    disk::remove_tree(Point::DoomFile, Point::DoomDirectory, &doomed)?;
    Ok(false)
}

/// Names of the files that the caller keeps in a job directory.
pub(super) fn job_files(place: &Place) -> Result<Vec<String>> {
    let names = entries(&place.job)?.into_iter().filter_map(|name| name.into_string().ok());
    Ok(names.filter(|name| !is_reserved(name)).collect())
}

/// The names in a directory.
pub(super) fn entries(directory: &Path) -> Result<Vec<OsString>> {
    let failed = |error| Error::read(directory, error);
    let found = std::fs::read_dir(directory).map_err(failed)?;
    found.map(|entry| entry.map(|entry| entry.file_name()).map_err(failed)).collect()
}

/// Removes all of a job directory but its lock. What says that there is a job goes last, so that a kill in between leaves one
/// that is known for what it is.
pub(super) fn clear(place: &Place) -> Result<()> {
    let job = &place.job;
    attempt::clear(job)?;
    let last = [RECORD, MOVES];
    for name in entries(job)? {
        if name != LOCK && !last.iter().any(|&kept| name == kept) {
            disk::remove_tree(Point::DiscardFile, Point::DiscardDirectory, &job.join(name))?;
        }
    }
    for name in last {
        disk::remove_file(Point::DiscardFile, &job.join(name))?;
    }
    Ok(())
}

/// Removes a job directory, its lock last.
pub(super) fn discard(place: &Place, lock: Lock) -> Result<()> {
    clear(place)?;
    lock.remove()?;
    // Another job may have begun in it already.
    disk::remove_directory(Point::DiscardJob, &place.job).map(drop)
}
