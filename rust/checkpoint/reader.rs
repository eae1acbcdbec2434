//! Input files as merge and analysis read them: mapped where that is fast and safe, by positioned reads elsewhere, by
//! requests where a store has them.
//!
//! On a network or FUSE file system a fault can take as long as the server likes, fetches little, and turns a lost
//! connection into SIGBUS; positioned reads of a window fetch much and fail with an error.

use super::remote::RemoteFile;
use super::{FileIdentity, MappedFile};
use crate::{Error, Result};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

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

/// An input file that is open for reading. A mapped one takes no descriptor.
#[derive(Debug)]
pub struct InputFile {
    path: PathBuf,
    size: u64,
    source: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped(MappedFile),
    Read(File),
    Remote(RemoteFile),
}

impl InputFile {
    /// Opens the file at `path`, which must still be the one that has this identity.
    ///
    /// # Errors
    /// [`Error::Read`] if it cannot be opened, or not be mapped though it must; [`Error::Descriptors`] if too many files
    /// are open; [`Error::InputChanged`] if it is another.
    pub fn open(path: &Path, identity: &FileIdentity, backend: ReadBackend) -> Result<Self> {
        if let Some(etag) = &identity.etag {
            let source = Bytes::Remote(RemoteFile::open(path, identity.size, etag)?);
            return Ok(Self { path: path.to_owned(), size: identity.size, source });
        }
        let file = File::open(path).map_err(|e| Error::read(path, e))?;
        let metadata = file.metadata().map_err(|e| Error::read(path, e))?;
        identity.check_metadata(path, &metadata)?;
        let size = identity.size;
        let mapping = match backend {
            ReadBackend::Mmap => Some(MappedFile::map(&file, path, size)?),
            ReadBackend::Auto if !is_remote(&file) => MappedFile::map(&file, path, size).ok(),
            ReadBackend::Auto | ReadBackend::Pread => None,
        };
        let source = mapping.map_or(Bytes::Read(file), Bytes::Mapped);
        Ok(Self { path: path.to_owned(), size, source })
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of its bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All its bytes, if it is mapped.
    #[must_use]
    pub fn mapped(&self) -> Option<&[u8]> {
        match &self.source {
            Bytes::Mapped(mapping) => Some(mapping.bytes()),
            Bytes::Read(_) | Bytes::Remote(_) => None,
        }
    }

    /// Whether it is an object of a store or on a server.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self.source, Bytes::Remote(_))
    }

    /// Reads `range` into `out`, which is as long.
    ///
    /// # Errors
    /// [`Error::Read`] or [`Error::Remote`]; [`Error::InputChanged`] if the file ends before the range does, or the object
    /// is another by now.
    pub fn read(&self, range: Range<usize>, out: &mut [u8]) -> Result<()> {
        let file = match &self.source {
            Bytes::Mapped(mapping) => {
                out.copy_from_slice(&mapping.bytes()[range]);
                return Ok(());
            }
            Bytes::Read(file) => file,
            Bytes::Remote(object) => return object.read(range, out),
        };
        file.read_exact_at(out, range.start as u64).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::InputChanged { path: self.path.clone(), what: "it has become shorter" }
            }
            _ => Error::read(&self.path, error),
        })
    }

    /// Starts to read a range that is about to be used, if the file is mapped or elsewhere.
    pub fn prefetch(&self, range: Range<usize>) {
        match &self.source {
            Bytes::Mapped(mapping) => mapping.prefetch(range),
            Bytes::Remote(object) => object.prefetch(&range),
            Bytes::Read(_) => {}
        }
    }

    /// Gives resident pages of the range back, if the file is mapped.
    pub fn release(&self, range: Range<usize>) {
        if let Bytes::Mapped(mapping) = &self.source {
            mapping.release(range);
        }
    }
}

/// Files that stay open though nobody uses them at the moment: tensors that follow one another mostly lie in one file,
/// or in few where two models are ordered in different ways.
const RECENT: usize = 4;

/// The open files of a checkpoint. A file is opened when it is asked for, shared by all who use it, and closed when nobody
/// does any more, but for the last few.
#[derive(Debug, Default)]
pub(super) struct OpenFiles {
    backend: ReadBackend,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By the number of the shard.
    open: HashMap<usize, Weak<InputFile>>,
    recent: VecDeque<Arc<InputFile>>,
}

impl OpenFiles {
    pub(super) fn new(backend: ReadBackend) -> Self {
        Self { backend, state: Mutex::default() }
    }

    /// How files are opened.
    pub(super) fn backend(&self) -> ReadBackend {
        self.backend
    }

    /// The shard with this number, opened if it is not.
    pub(super) fn get(
        &self,
        number: usize,
        path: &Path,
        identity: &FileIdentity,
    ) -> Result<Arc<InputFile>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = state.open.get(&number).and_then(Weak::upgrade) {
            return Ok(file);
        }
        // Closed first, in case that the last descriptor is needed.
        while state.recent.len() >= RECENT {
            state.recent.pop_front();
        }
        let file = Arc::new(InputFile::open(path, identity, self.backend)?);
        state.open.insert(number, Arc::downgrade(&file));
        state.recent.push_back(Arc::clone(&file));
        Ok(file)
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
