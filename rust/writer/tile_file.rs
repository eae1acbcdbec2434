//! One output shard, written in aligned tiles: past the page cache where the file system allows it.

use super::attempt::{AttemptId, Places, Prepared};
use super::disk::{self, FileId};
use super::fault::Point;
use super::name::FileName;
use crate::plan::Changes;
use crate::{Error, Result};
use memmap2::MmapMut;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Direct writes must start and end at multiples of the disk's block size; no disk has a larger one.
const BLOCK: usize = 4096;

/// How an output file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteMode {
    /// Direct where possible.
    Auto,
    /// Direct (O_DIRECT), an error where the file system refuses it.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// A page-aligned buffer for one tile, reused for all tiles of a worker.
#[derive(Debug)]
pub struct TileBuffer {
    memory: MmapMut,
    filled: usize,
}

impl TileBuffer {
    /// A buffer for tiles of at most `capacity` bytes, a multiple of the block size.
    ///
    /// # Errors
    /// [`Error::Option`] if the system has no memory for it.
    pub fn new(capacity: usize) -> Result<Self> {
        let memory = MmapMut::map_anon(capacity)
            .map_err(|e| Error::Option(format!("no memory for a tile of {capacity} bytes: {e}")))?;
        Ok(Self { memory, filled: 0 })
    }

    /// The first `length` bytes, to be filled; they are the tile from now on.
    pub fn filled(&mut self, length: usize) -> &mut [u8] {
        self.filled = length;
        &mut self.memory[..length]
    }

    /// The tile with zeros up to the next multiple of the block size.
    fn padded(&mut self) -> &[u8] {
        let end = self.filled.next_multiple_of(BLOCK).min(self.memory.len());
        self.memory[self.filled..end].fill(0);
        &self.memory[..end]
    }
}

/// A partial output file. Dropped before it is committed or left to whoever commits it, it is removed.
#[derive(Debug)]
pub struct TileFile {
    file: File,
    places: Places,
    size: usize,
    mode: WriteMode,
    direct: AtomicBool,
    /// Whether this object no longer answers for the file.
    kept: AtomicBool,
}

impl TileFile {
    pub(super) fn create(places: Places, size: usize, mode: WriteMode) -> Result<Self> {
        let new = Self::open(places, size, mode)?;
        new.allocate()?;
        Ok(new)
    }

    fn open(places: Places, size: usize, mode: WriteMode) -> Result<Self> {
        let (file, direct) = open(&places.partial, size, mode)?;
        let (direct, kept) = (AtomicBool::new(direct), AtomicBool::new(false));
        Ok(Self { file, places, size, mode, direct, kept })
    }

    /// A file that shares the blocks of `source`, an input of the same size; `None` where the file system cannot do that.
    pub(super) fn clone_of(source: &File, places: Places, size: usize) -> Result<Option<Self>> {
        let new = Self::open(places, size, WriteMode::Buffered)?;
        #[cfg(target_os = "linux")]
        let cloned =
            disk::retry(Point::ShardClone, || Ok(rustix::fs::ioctl_ficlone(&new.file, source)?));
        #[cfg(not(target_os = "linux"))]
        let cloned = {
            let _ = source;
            disk::retry(Point::ShardClone, || Err::<(), _>(io::ErrorKind::Unsupported.into()))
        };
        Ok(cloned.is_ok().then_some(new))
    }

    /// Reserves the whole file at once: fewer extents, and a full disk shows before any work is done.
    fn allocate(&self) -> Result<()> {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{FallocateFlags, fallocate};
            let size = self.size as u64;
            let call = || Ok(fallocate(&self.file, FallocateFlags::empty(), 0, size)?);
            if let Err(error) = disk::retry(Point::ShardAllocate, call) {
                let missing = matches!(
                    error.kind(),
                    io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput
                );
                // A file system without preallocation still takes the writes.
                return if missing { Ok(()) } else { Err(self.failure(error)) };
            }
        }
        Ok(())
    }

    /// Writes a tile at `offset`, a multiple of the block size.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::Write`].
    pub fn write(&self, tile: &mut TileBuffer, offset: usize) -> Result<()> {
        let length = tile.filled;
        if self.is_direct() {
            let tile = tile.padded();
            match disk::write_all_at(Point::ShardWrite, &self.file, tile, offset as u64, BLOCK) {
                Err(error)
                    if error.kind() == io::ErrorKind::InvalidInput
                        && self.mode == WriteMode::Auto =>
                {
                    self.fall_back()?;
                }
                result => return result.map_err(|error| self.failure(error)),
            }
        }
        let tile = &tile.memory[..length];
        disk::write_all_at(Point::ShardWrite, &self.file, tile, offset as u64, 1)
            .map_err(|error| self.failure(error))
    }

    /// Goes on through the page cache: some file systems accept the flag at opening and refuse the write.
    fn fall_back(&self) -> Result<()> {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
            fcntl_getfl(&self.file)
                .and_then(|flags| fcntl_setfl(&self.file, flags - OFlags::DIRECT))
                .map_err(|errno| self.failure(errno.into()))?;
        }
        self.direct.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Whether writes bypass the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    /// The shard's name in the output.
    pub(super) fn name(&self) -> &FileName {
        &self.places.name
    }

    /// Which attempt at the shard it is.
    pub(super) fn attempt(&self) -> &AttemptId {
        &self.places.attempt
    }

    /// Where it lies.
    pub(super) fn partial(&self) -> &Path {
        &self.places.partial
    }

    /// What tells the open file from others.
    pub(super) fn id(&self) -> Result<FileId> {
        let metadata = self.file.metadata().map_err(|error| self.failure(error))?;
        Ok(FileId::of(&metadata))
    }

    /// Cuts the padding off and syncs the data.
    pub(super) fn prepare(&self, digest: &str, changes: &Changes) -> Result<Prepared> {
        disk::retry(Point::ShardTruncate, || self.file.set_len(self.size as u64))
            .and_then(|()| disk::retry(Point::ShardSync, || self.file.sync_data()))
            .map_err(|error| self.failure(error))?;
        Ok(Prepared {
            file: self.places.name.clone(),
            attempt: self.places.attempt.clone(),
            size: self.size as u64,
            digest: digest.to_owned(),
            changes: changes.clone(),
        })
    }

    /// Leaves the file to whoever commits it.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    fn failure(&self, error: io::Error) -> Error {
        disk::failure(&self.places.target, self.size as u64, error)
    }
}

impl Drop for TileFile {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed) {
            // A failure leaves a hidden partial file, which the next run removes.
            drop(std::fs::remove_file(&self.places.partial));
        }
    }
}

/// Opens a new partial file, directly if the mode wants it and the file system can; says which it was.
fn open(partial: &Path, size: usize, mode: WriteMode) -> Result<(File, bool)> {
    let mut options = OpenOptions::new();
    // Only the owner's umask decides on permissions, unlike temporary files, which are private.
    options.write(true).create_new(true).mode(0o666);
    let failed = |error| disk::failure(partial, size as u64, error);
    if mode != WriteMode::Buffered
        && let Some(flag) = direct_flag()
    {
        let mut direct = options.clone();
        direct.custom_flags(flag);
        match disk::retry(Point::ShardCreate, || direct.open(partial)) {
            Ok(file) => return Ok((file, true)),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                // The refused open may have created the file all the same.
                drop(std::fs::remove_file(partial));
            }
            Err(error) => return Err(failed(error)),
        }
    }
    if mode == WriteMode::Direct {
        return Err(Error::Option(format!(
            "the file system of {} refuses direct writes; choose the write mode auto or buffered",
            partial.display()
        )));
    }
    disk::retry(Point::ShardCreate, || options.open(partial))
        .map(|file| (file, false))
        .map_err(failed)
}

#[cfg(target_os = "linux")]
fn direct_flag() -> Option<i32> {
    i32::try_from(rustix::fs::OFlags::DIRECT.bits()).ok()
}

#[cfg(not(target_os = "linux"))]
fn direct_flag() -> Option<i32> {
    None
}
