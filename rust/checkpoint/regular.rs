//! Opening what should be a regular file: a FIFO or a device under its name is refused at once, not waited for.

use crate::{Error, Result};
use rustix::fs::OFlags;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file for reading.
///
/// # Errors
/// Those of the operating system, and [`io::ErrorKind::InvalidInput`] if it is anything else than a regular file.
pub(super) fn open(path: &Path) -> io::Result<(File, Metadata)> {
    // Without O_NONBLOCK, opening a FIFO waits for a writer. It changes nothing for regular files.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a directory" } else { "a pipe, socket or device" };
        let problem = format!("it is {what}, not a regular file");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    Ok((file, metadata))
}

/// Reads a small file whole.
///
/// # Errors
/// [`Error::Read`] as [`open`], and [`Error::Limit`] if it has more than `most` bytes.
pub(super) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let (file, metadata) = open(path).map_err(|e| Error::read(path, e))?;
    let mut bytes = Vec::new();
    // The size is a hint: the file may grow, or be one of /proc, which all claim to be empty.
    let hint = metadata.len().min(most);
    bytes.reserve_exact(usize::try_from(hint).unwrap_or_default());
    file.take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::read(path, e))?;
    if bytes.len() as u64 > most {
        let problem = format!("it has more than {most} bytes, the most allowed");
        return Err(Error::Limit { path: path.to_owned(), problem });
    }
    Ok(bytes)
}

/// BLAKE3 of a regular file's bytes, hexadecimal.
///
/// # Errors
/// [`Error::Read`].
pub fn file_digest(path: &Path) -> Result<String> {
    let (mut file, _) = open(path).map_err(|e| Error::read(path, e))?;
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut file, &mut hasher).map_err(|e| Error::read(path, e))?;
    Ok(hasher.finalize().to_hex().to_string())
}
