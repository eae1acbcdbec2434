//! Opening what should be a regular file: a FIFO or a device under its name is refused at once, not waited for.

use super::remote;
use crate::{Error, Result};
use rustix::fs::OFlags;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
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

/// How the file begins that git leaves in place of one that git-lfs keeps elsewhere.
const LFS_POINTER: &[u8] = b"version https://git-lfs";
/// What to do about such a file.
pub(super) const LFS_ADVICE: &str =
    "it is a git-lfs pointer, not the file itself; run `git lfs pull` in its directory";

/// How other kinds of files begin that come under a name of weights, and what to do about them. Read as the length of a
/// header, each is far beyond what a header may have.
const OTHER_KINDS: [(&[u8], &str); 6] = [
    (b"GGUF", "it is a GGUF file; give the model that it was made of"),
    (b"PK\x03\x04", PICKLE),
    (b"\x80\x02", PICKLE),
    (b"<!DOCTYP", PAGE),
    (b"<!doctyp", PAGE),
    (b"<html", PAGE),
];
const PICKLE: &str = "it is a pickle, which is not opened; convert it: load the model with transformers and \
                      save_pretrained it";
const PAGE: &str =
    "it is a web page, such as one that says why a download failed; download the file again";

/// What a file is that begins like this and is no safetensors file, if that is known.
pub(super) fn other_kind(start: [u8; 8]) -> Option<&'static str> {
    OTHER_KINDS.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, problem)| *problem)
}

/// Whether the file is a pointer of git-lfs.
pub(super) fn is_lfs_pointer(file: &File) -> bool {
    let mut start = [0; LFS_POINTER.len()];
    file.read_exact_at(&mut start, 0).is_ok() && begins_lfs_pointer(&start)
}

/// Whether bytes are how a pointer of git-lfs begins.
pub(super) fn begins_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(LFS_POINTER)
}

/// Reads a small file whole.
///
/// # Errors
/// [`Error::Read`] as [`open`], and [`Error::Unusable`] if it has more than `most` bytes or is a pointer of git-lfs.
pub(super) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    if remote::is_url(path) {
        return remote::read_small(path, most);
    }
    let (file, metadata) = open(path).map_err(|e| Error::read(path, e))?;
    if is_lfs_pointer(&file) {
        return Err(Error::unusable(path, LFS_ADVICE));
    }
    let mut bytes = Vec::new();
    // The size is a hint: the file may grow, or be one of /proc, which all claim to be empty.
    let hint = metadata.len().min(most);
    bytes.reserve_exact(usize::try_from(hint).unwrap_or_default());
    file.take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::read(path, e))?;
    if bytes.len() as u64 > most {
        return Err(Error::unusable(
            path,
            format!("it has more than {most} bytes, the most allowed"),
        ));
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
