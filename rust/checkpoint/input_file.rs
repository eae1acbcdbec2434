//! Input files as a merge reads them: mapped where that is fast and safe, by positioned reads elsewhere.
//!
//! On a network or FUSE file system a fault can take as long as the server likes, fetches little, and turns a lost
//! connection into SIGBUS; positioned reads of a window fetch much and fail with an error.

use super::MappedFile;
use crate::{Error, Result};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How input files are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ReadBackend {
    /// Mapped, but by positioned reads on network and FUSE file systems and where mapping is refused.
    #[default]
    Auto,
    /// Mapped.
    Mmap,
    /// Positioned reads.
    Pread,
}

impl ReadBackend {
    /// The backend of this name.
    ///
    /// # Errors
    /// [`Error::Option`] if there is none.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "mmap" => Ok(Self::Mmap),
            "pread" => Ok(Self::Pread),
            _ => Err(Error::Option(format!(
                "there is no read backend `{name}`; choose auto, mmap or pread"
            ))),
        }
    }
}

/// An open input file.
#[derive(Debug)]
pub struct InputFile {
    path: PathBuf,
    file: File,
    size: u64,
    mapping: Option<MappedFile>,
}

impl InputFile {
    /// Opens the file at `path`, which must have `size` bytes.
    ///
    /// # Errors
    /// [`Error::Read`] if it cannot be opened, or not be mapped though it must; [`Error::InputChanged`] if its size is
    /// another.
    pub fn open(path: &Path, size: u64, backend: ReadBackend) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::read(path, e))?;
        let found = file.metadata().map_err(|e| Error::read(path, e))?.len();
        if found != size {
            return Err(Error::InputChanged { path: path.to_owned(), what: "its size differs" });
        }
        let mapping = match backend {
            ReadBackend::Mmap => Some(MappedFile::open(path, size)?),
            ReadBackend::Auto if !is_remote(&file) => MappedFile::open(path, size).ok(),
            ReadBackend::Auto | ReadBackend::Pread => None,
        };
        Ok(Self { path: path.to_owned(), file, size, mapping })
    }

    /// Its bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The mapping, if the file is mapped.
    #[must_use]
    pub fn mapping(&self) -> Option<&MappedFile> {
        self.mapping.as_ref()
    }

    /// Reads `range` into `out`, which is as long.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::InputChanged`] if the file ends before the range does.
    pub fn read(&self, range: &Range<usize>, out: &mut [u8]) -> Result<()> {
        if let Some(mapping) = &self.mapping {
            out.copy_from_slice(&mapping.bytes()[range.clone()]);
            return Ok(());
        }
        self.file.read_exact_at(out, range.start as u64).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::InputChanged { path: self.path.clone(), what: "it has become shorter" }
            }
            _ => Error::read(&self.path, error),
        })
    }

    /// Starts to read a range that is about to be used, if the file is mapped.
    pub fn prefetch(&self, range: Range<usize>) {
        if let Some(mapping) = &self.mapping {
            mapping.prefetch(range);
        }
    }

    /// Gives resident pages of the range back, if the file is mapped.
    pub fn release(&self, range: Range<usize>) {
        if let Some(mapping) = &self.mapping {
            mapping.release(range);
        }
    }
}

/// Whether the file lies on a file system whose data comes from elsewhere, by the kernel's magic numbers.
#[cfg(target_os = "linux")]
fn is_remote(file: &File) -> bool {
    const REMOTE: &[u32] = &[
        0x0000_6969, // NFS
        0xFF53_4D42, // CIFS
        0xFE53_4D42, // SMB2
        0x0000_517B, // SMB
        0x6573_5546, // FUSE
        0x00C3_6400, // Ceph
        0x0BD0_0BD0, // Lustre
        0x4750_4653, // GPFS
        0x1983_0326, // BeeGFS
        0x0102_1997, // 9P
        0x6B41_4653, // AFS
    ];
    let Ok(system) = rustix::fs::fstatfs(file) else { return false };
    // The field's type differs between architectures; the numbers have 32 bits.
    let magic = u64::try_from(system.f_type).unwrap_or_default() & u64::from(u32::MAX);
    REMOTE.iter().any(|&known| u64::from(known) == magic)
}

/// Elsewhere nobody asks.
#[cfg(not(target_os = "linux"))]
fn is_remote(_: &File) -> bool {
    false
}
