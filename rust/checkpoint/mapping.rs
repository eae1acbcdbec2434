//! Read-only mappings whose resident pages are given back window by window.

use crate::{Error, Result};
use memmap2::{Advice, Mmap, MmapOptions, UncheckedAdvice};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// Faults map up to 64 KiB around the touched page; giving back whole such spans leaves nothing behind.
const FAULT_AROUND: usize = 64 << 10;
/// The largest piece of the page cache that a fault was seen to map as a whole.
const FOLIO: usize = 1 << 20;

/// A whole file, mapped read-only.
#[derive(Debug)]
pub struct MappedFile {
    bytes: Mmap,
}

impl MappedFile {
    /// Opens and maps the file at `path`, which must have `size` bytes.
    ///
    /// # Errors
    /// [`Error::Read`] if the file cannot be mapped, [`Error::InputChanged`] if its size is another.
    pub fn open(path: &Path, size: u64) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::read(path, e))?;
        Self::map(&file, path, size)
    }

    /// Maps an open file, which must have `size` bytes; `path` is for messages. The mapping outlives the descriptor.
    ///
    /// # Errors
    /// As [`MappedFile::open`].
    pub fn map(file: &File, path: &Path, size: u64) -> Result<Self> {
        // SAFETY: the mapping is private to this process and never written to. If another process truncates the
        // file, an access past its end raises SIGBUS; if it rewrites the file, the bytes change under us. Both are
        // outside this process's power: callers compare size and time before and after each shard.
        let bytes = unsafe { MmapOptions::new().map(file) }.map_err(|e| Error::read(path, e))?;
        if bytes.len() as u64 != size {
            return Err(Error::InputChanged { path: path.to_owned(), what: "its size differs" });
        }
        Ok(Self { bytes })
    }

    /// The bytes of the file.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Starts to read a range that is about to be used, if it is not cached: one large request instead of many faults,
    /// each of which reads ahead 128 KiB only.
    pub fn prefetch(&self, range: Range<usize>) {
        let start = range.start.min(self.bytes.len());
        let end = range.end.min(self.bytes.len());
        if start < end {
            // Advice may be refused; then faults do the reading.
            drop(self.bytes.advise_range(Advice::WillNeed, start, end - start));
        }
    }

    /// Gives resident pages of the range back to the page cache. A later access maps them again, at the cost of a
    /// fault but, while they stay cached, without a read.
    pub fn release(&self, range: Range<usize>) {
        // The fault at its beginning has mapped what lies before it in the same folio again, though it was given back.
        let start = range.start / FOLIO * FOLIO;
        let end = range.end.next_multiple_of(FAULT_AROUND).min(self.bytes.len());
        if start < end {
            // SAFETY: the mapping is read-only and backed by a file, so dropping pages loses nothing: whoever still
            // reads them, on any thread, faults the same bytes in again.
            let released = unsafe {
                self.bytes.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
            };
            // Advice may be refused (an unusual file system); then memory is not bounded, but nothing is wrong.
            drop(released);
        }
    }
}
