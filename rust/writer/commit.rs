//! The output directory: who may write it, what is already in it, and how files become part of it.

use super::JOURNAL;
use super::journal::{Entry, Journal};
use super::tile_file::{TileFile, WriteMode};
use crate::{Error, Result};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An output directory, locked against other writers until [`Output::finish`] or drop.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    /// Whether this value made the directory, and may take it away again.
    created: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    journal: Option<Journal>,
    /// Files of an earlier output are removed before the first new file, not sooner: a run that fails while it only
    /// reads loses nothing.
    wipe: bool,
}

impl Output {
    /// Opens `path` for a merge, creating it if need be.
    ///
    /// An empty or new directory is always fine. One that holds an unfinished merge needs `resume` (go on) or
    /// `overwrite` (start anew); any other content needs `overwrite`.
    ///
    /// # Errors
    /// [`Error::Output`] if the directory holds something, is locked, or overlaps one of `inputs`.
    pub fn open<'a>(
        path: &Path,
        inputs: impl IntoIterator<Item = &'a Path>,
        resume: bool,
        overwrite: bool,
    ) -> Result<Self> {
        check_apart(path, inputs)?;
        if path.exists() && !path.is_dir() {
            return Err(Error::output(path, "is a file; name a directory"));
        }
        let (occupied, unfinished) = contents(path)?;
        let wipe = match (unfinished, occupied) {
            _ if overwrite => true,
            (true, _) if resume => false,
            (true, _) => {
                return Err(Error::output(
                    path,
                    "holds an unfinished merge; continue it with --resume or start anew with --overwrite",
                ));
            }
            (false, true) => {
                return Err(Error::output(
                    path,
                    "exists and is not empty; choose another directory or pass --overwrite",
                ));
            }
            (false, false) => false,
        };
        let created = !path.exists();
        std::fs::create_dir_all(path).map_err(|e| Error::write(path, e))?;
        let path = path.canonicalize().map_err(|e| Error::write(path, e))?;
        let journal = Journal::open(&path, JOURNAL)?;
        remove_matching(&path, |name| name.starts_with('.') && name.ends_with(".partial"))?;
        Ok(Self { path, created, state: Mutex::new(State { journal: Some(journal), wipe }) })
    }

    /// The directory, links resolved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The shards that are committed.
    #[must_use]
    pub fn committed(&self) -> Vec<String> {
        let state = self.lock();
        if state.wipe {
            return Vec::new();
        }
        state.journal.iter().flat_map(Journal::entries).map(|entry| entry.file.clone()).collect()
    }

    /// Whether a shard of this size and digest is committed and still there.
    #[must_use]
    pub fn has(&self, file: &str, size: usize, digest: &str) -> bool {
        let state = self.lock();
        let entry = Entry { file: file.to_owned(), size, digest: digest.to_owned() };
        let listed = state.journal.as_ref().and_then(|journal| {
            // The last entry of a file counts.
            journal.entries().iter().rev().find(|known| known.file == file)
        });
        !state.wipe
            && listed == Some(&entry)
            && std::fs::metadata(self.path.join(file)).is_ok_and(|m| m.len() == size as u64)
    }

    /// Refuses inputs that are this directory, lie in it, or hold it.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn check_apart<'a>(&self, inputs: impl IntoIterator<Item = &'a Path>) -> Result<()> {
        check_apart(&self.path, inputs)
    }

    /// Creates the partial file of a shard.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::Write`].
    pub fn create_shard(&self, file: &str, size: usize, mode: WriteMode) -> Result<TileFile> {
        self.prepare()?;
        TileFile::create(self.partial(file), self.path.join(file), size, mode)
    }

    /// Creates the partial file of a shard as a clone of an input file of the same bytes, which takes no time and no
    /// room; `None` where the file system has no such thing.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn clone_shard(&self, file: &str, size: usize, source: &File) -> Result<Option<TileFile>> {
        self.prepare()?;
        TileFile::clone_of(source, self.partial(file), self.path.join(file), size)
    }

    /// Syncs and names a fully written shard, and enters it into the journal.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::Write`].
    pub fn commit_shard(&self, shard: &TileFile, digest: &str) -> Result<()> {
        let size = shard.publish()?;
        self.sync_directory()?;
        let file = shard.target().file_name().unwrap_or_default().to_string_lossy().into_owned();
        match &mut self.lock().journal {
            Some(journal) => journal.append(Entry { file, size, digest: digest.to_owned() }),
            None => Err(Error::output(&self.path, "was finished before its last shard")),
        }
    }

    /// Writes a small file durably: readers see the old one, none, or the whole new one.
    ///
    /// # Errors
    /// [`Error::Output`] if the name leaves the directory, [`Error::DiskFull`], [`Error::Write`].
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.place(name, |file| file.write_all(bytes), bytes.len() as u64)
    }

    /// Copies a file durably, as [`Output::write_file`] writes one.
    ///
    /// # Errors
    /// As [`Output::write_file`], and [`Error::Read`] if the source cannot be opened.
    pub fn copy_file(&self, source: &Path, name: &str) -> Result<()> {
        let mut input = File::open(source).map_err(|e| Error::read(source, e))?;
        let size = input.metadata().map_err(|e| Error::read(source, e))?.len();
        self.place(name, |file| io::copy(&mut input, file).map(drop), size)
    }

    /// Declares the output complete: the journal goes, and with it the lock.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn finish(&self) -> Result<()> {
        let journal = self.lock().journal.take();
        if let Some(journal) = journal {
            journal.remove()?;
        }
        self.sync_directory()
    }

    fn place(
        &self,
        name: &str,
        fill: impl FnOnce(&mut File) -> io::Result<()>,
        needed: u64,
    ) -> Result<()> {
        let target = self.path.join(name);
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Error::output(&self.path, format!("cannot hold a file named `{name}`")));
        }
        self.prepare()?;
        let failure = |error: io::Error| {
            if error.kind() == io::ErrorKind::StorageFull {
                Error::DiskFull { path: target.clone(), needed }
            } else {
                Error::write(&target, error)
            }
        };
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(failure)?;
        }
        let partial = self.partial(name);
        let written = File::create(&partial)
            .and_then(|mut file| fill(&mut file).and_then(|()| file.sync_all()))
            .and_then(|()| std::fs::rename(&partial, &target));
        if let Err(error) = written {
            drop(std::fs::remove_file(&partial));
            return Err(failure(error));
        }
        self.sync_directory()
    }

    /// Removes what an earlier output left, if it is to be overwritten: first the files that make it look complete.
    fn prepare(&self) -> Result<()> {
        let mut state = self.lock();
        if !std::mem::take(&mut state.wipe) {
            return Ok(());
        }
        if let Some(journal) = &mut state.journal {
            journal.clear()?;
        }
        remove_matching(&self.path, |name| {
            name == "config.json" || name.ends_with(".safetensors.index.json")
        })?;
        self.sync_directory()?;
        remove_matching(&self.path, |name| name.ends_with(".safetensors"))
    }

    /// Name of the hidden partial file of a target; it lies in the directory itself, where stale ones are looked for.
    fn partial(&self, name: &str) -> PathBuf {
        self.path.join(format!(".{}.partial", name.replace('/', "%")))
    }

    fn sync_directory(&self) -> Result<()> {
        File::open(&self.path)
            .and_then(|directory| directory.sync_all())
            .map_err(|e| Error::write(&self.path, e))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Output {
    /// An output that was not finished keeps its journal if anything is committed; otherwise it leaves no trace.
    fn drop(&mut self) {
        let journal = self.lock().journal.take();
        if let Some(journal) = journal
            && journal.entries().is_empty()
        {
            // Failures leave an empty journal, which the next run may resume from.
            drop(journal.remove());
            if self.created {
                drop(std::fs::remove_dir(&self.path));
            }
        }
    }
}

/// Whether a directory holds anything, and whether that is an unfinished merge.
fn contents(path: &Path) -> Result<(bool, bool)> {
    if !path.exists() {
        return Ok((false, false));
    }
    let occupied = std::fs::read_dir(path).map_err(|e| Error::read(path, e))?.next().is_some();
    Ok((occupied, path.join(JOURNAL).exists()))
}

/// Refuses an output that is one of the inputs, lies in one or holds one, links resolved.
fn check_apart<'a>(output: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    let resolved = resolve(output);
    for input in inputs {
        let other = resolve(input);
        let relation = if resolved == other {
            "is"
        } else if resolved.starts_with(&other) {
            "lies inside"
        } else if other.starts_with(&resolved) {
            "contains"
        } else {
            continue;
        };
        return Err(Error::output(
            output,
            format!("{relation} the input {}; choose a directory of its own", input.display()),
        ));
    }
    Ok(())
}

/// The path with links resolved as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut existing = absolute.as_path();
    let mut rest = Vec::new();
    loop {
        if let Ok(resolved) = existing.canonicalize() {
            return rest.iter().rev().fold(resolved, |path, part| path.join(part));
        }
        match (existing.parent(), existing.file_name()) {
            (Some(parent), Some(name)) => {
                rest.push(name.to_owned());
                existing = parent;
            }
            _ => return absolute,
        }
    }
}

fn remove_matching(directory: &Path, doomed: impl Fn(&str) -> bool) -> Result<()> {
    for entry in std::fs::read_dir(directory).map_err(|e| Error::read(directory, e))? {
        let path = entry.map_err(|e| Error::read(directory, e))?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(&doomed) {
            std::fs::remove_file(&path).map_err(|e| Error::write(&path, e))?;
        }
    }
    Ok(())
}
