//! The system calls that change the disk: tried again when a signal interrupts them, each with a fail point in front.

use super::fault::{self, Point};
use crate::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What is the same under all names of a file or directory.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub(super) struct FileId {
    pub device: u64,
    pub inode: u64,
}

impl FileId {
    pub(super) fn of(metadata: &std::fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// The identity of what stands under this very path, links not followed; `None` if nothing does.
    pub(super) fn at(path: &Path) -> Result<Option<Self>> {
        Ok(look(path)?.as_ref().map(Self::of))
    }
}

/// What stands under a path, links not followed.
pub(super) fn look(path: &Path) -> Result<Option<std::fs::Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::read(path, error)),
    }
}

/// The error of a failed write to `path`; a full disk has one of its own.
pub(super) fn failure(path: &Path, needed: u64, error: io::Error) -> Error {
    let full = matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    );
    if full { Error::DiskFull { path: path.to_owned(), needed } } else { Error::write(path, error) }
}

/// Calls until no signal interrupts.
pub(super) fn retry<T>(point: Point, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match fault::at(point).and_then(|()| call()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Writes all of it, however many calls that takes.
pub(super) fn write_all(point: Point, mut file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match fault::room(point, bytes.len(), 1).and_then(|room| file.write(&bytes[..room])) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of it at an offset; `unit` is what direct writes must be multiples of.
pub(super) fn write_all_at(
    point: Point,
    file: &File,
    mut bytes: &[u8],
    mut offset: u64,
    unit: usize,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let room = fault::room(point, bytes.len(), unit);
        match room.and_then(|room| file.write_at(&bytes[..room], offset)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(point: Point, path: &Path) -> Result<()> {
    sync_names(point, path).map_err(|error| failure(path, 0, error))
}

/// The same, with the bare error.
pub(super) fn sync_names(point: Point, path: &Path) -> io::Result<()> {
    retry(point, || match File::open(path)?.sync_all() {
        // A file system that cannot sync a directory does not need it, or cannot be helped.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result,
    })
}

/// Gives a file or directory another name, over what may stand there.
pub(super) fn rename(point: Point, from: &Path, to: &Path) -> Result<()> {
    retry(point, || std::fs::rename(from, to)).map_err(|error| failure(to, 0, error))
}

/// Whether a rename with flags is more than this system or file system can do.
#[cfg(any(target_os = "linux", target_os = "macos"))]
fn is_missing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let missing = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP];
    error
        .raw_os_error()
        .is_some_and(|code| missing.iter().any(|errno| errno.raw_os_error() == code))
}

/// Gives a directory a name that nothing has.
pub(super) fn rename_new(point: Point, from: &Path, to: &Path) -> Result<()> {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        let call = || Ok(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?);
        match retry(point, call) {
            Err(error) if is_missing(&error) => {}
            result => return result.map_err(|error| failure(to, 0, error)),
        }
    }
    if look(to)?.is_some() {
        return Err(Error::write(to, io::ErrorKind::AlreadyExists.into()));
    }
    rename(point, from, to)
}

/// Exchanges two directories at once; false where the file system cannot do that.
pub(super) fn exchange(point: Point, one: &Path, other: &Path) -> Result<bool> {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        let call = || Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?);
        match retry(point, call) {
            Err(error) if is_missing(&error) => Ok(false),
            result => result.map(|()| true).map_err(|error| failure(other, 0, error)),
        }
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    {
        let _ = (point, one, other);
        Ok(false)
    }
}

/// Makes a directory; false if it was there.
pub(super) fn make_directory(point: Point, path: &Path) -> io::Result<bool> {
    match retry(point, || std::fs::create_dir(path)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes a file or link, if it is there.
pub(super) fn remove_file(point: Point, path: &Path) -> Result<()> {
    match retry(point, || std::fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failure(path, 0, error)),
        _ => Ok(()),
    }
}

/// Removes a directory if it is there and empty; false if it holds something.
pub(super) fn remove_directory(point: Point, path: &Path) -> Result<bool> {
    match retry(point, || std::fs::remove_dir(path)) {
        Ok(()) => Ok(true),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => Ok(true),
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => Ok(false),
            _ => Err(failure(path, 0, error)),
        },
    }
}

/// Removes a directory with all it holds, or a file; links are removed, not followed.
pub(super) fn remove_tree(file: Point, directory: Point, path: &Path) -> Result<()> {
    let Some(metadata) = look(path)? else { return Ok(()) };
    if !metadata.is_dir() {
        return remove_file(file, path);
    }
    for entry in std::fs::read_dir(path).map_err(|error| Error::read(path, error))? {
        let entry = entry.map_err(|error| Error::read(path, error))?;
        remove_tree(file, directory, &entry.path())?;
    }
    remove_directory(directory, path).map(drop)
}

/// All that lies under a directory, links not followed: paths from it on, a directory before what it holds, and whether each
/// is a directory. Sorted.
pub(super) fn walk(directory: &Path) -> Result<Vec<(PathBuf, bool)>> {
    let mut found = Vec::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(inner) = waiting.pop() {
        let path = directory.join(&inner);
        for entry in std::fs::read_dir(&path).map_err(|error| Error::read(&path, error))? {
            let entry = entry.map_err(|error| Error::read(&path, error))?;
            let kind = entry.file_type().map_err(|error| Error::read(&entry.path(), error))?;
            let name = inner.join(entry.file_name());
            if kind.is_dir() {
                waiting.push(name.clone());
            }
            found.push((name, kind.is_dir()));
        }
    }
    found.sort();
    Ok(found)
}

/// Opens a regular file for reading, whatever else may stand under its name: no pipe or device can hold the caller up.
pub(super) fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let mut options = OpenOptions::new();
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = options.read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok((file, metadata.len()))
}

/// The bytes of a file of at most `cap`; `None` if there is no such file.
pub(super) fn read_capped(path: &Path, cap: u64) -> Result<Option<Vec<u8>>> {
    let (file, size) = match open_regular(path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::read(path, error)),
    };
    let mut bytes = Vec::new();
    let read = file.take(cap + 1).read_to_end(&mut bytes);
    if size > cap || bytes.len() as u64 > cap {
        let problem = io::Error::other(format!("it has more than {cap} bytes"));
        return Err(Error::read(path, problem));
    }
    read.map(|_| Some(bytes)).map_err(|error| Error::read(path, error))
}

/// The points that one durable file passes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Steps {
    pub create: Point,
    pub write: Point,
    pub sync: Point,
    pub rename: Point,
    pub directory: Point,
}

/// Makes a file durably: readers see the old one, none, or the whole new one. It is filled under the name `partial`, in the
/// directory that is synced after the rename together with the target's.
pub(super) fn place(
    steps: &Steps,
    partial: &Path,
    target: &Path,
    needed: u64,
    fill: impl FnOnce(&File) -> Result<()>,
) -> Result<()> {
    let failed = |error| failure(target, needed, error);
    let made = || -> Result<()> {
        let mut options = OpenOptions::new();
        // The owner's umask decides on permissions, unlike for temporary files, which are private.
        options.write(true).create(true).truncate(true).mode(0o666);
        let file = retry(steps.create, || options.open(partial)).map_err(failed)?;
        fill(&file)?;
        retry(steps.sync, || file.sync_all()).map_err(failed)?;
        rename(steps.rename, partial, target)
    };
    if let Err(error) = made() {
        drop(std::fs::remove_file(partial));
        return Err(error);
    }
    sync_directory(steps.directory, target.parent().unwrap_or(target))
}
