//! An object that is open for reading, by ranges.
//!
//! It is read in aligned blocks, which all readers share: neighbours in a file are mostly wanted soon, and a request
//! costs as much time as a megabyte. What is small and has no neighbour that was read is fetched by itself.

use super::blocks::{BLOCK, Cache, Filling, Slot};
use super::client::{Target, get_range, read_range, start as start_request};
use super::location::Location;
use crate::{Error, Result};
use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Blocks that one read asks for at a time.
const AT_A_TIME: u64 = 4;
/// Longest range that is fetched by itself where nothing near it was read.
const ALONE: u64 = 1 << 20;
/// Blocks that are remembered as read, however long ago.
const REMEMBERED: usize = 64;

/// An open object. Every request says which version of it is meant.
#[derive(Debug)]
pub(in crate::checkpoint) struct RemoteFile {
    url: PathBuf,
    target: Arc<Target>,
    etag: Arc<str>,
    size: u64,
    /// Tells its blocks from those of others.
    number: u64,
    /// Blocks that were read last.
    read: Mutex<VecDeque<u64>>,
}

impl RemoteFile {
    /// Opens the object at an address that has this size and ETag; nothing is asked yet.
    ///
    /// # Errors
    /// Those of making a client.
    pub(in crate::checkpoint) fn open(url: &Path, size: u64, etag: &str) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            url: url.to_owned(),
            target: Arc::new(Target::of(Location::parse(url)?)?),
            etag: etag.into(),
            size,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            read: Mutex::default(),
        })
    }

    /// Reads a range into `out`, which is as long.
    ///
    /// # Errors
    /// [`Error::InputChanged`] if the object is another by now, [`Error::Remote`] if the store does not give it.
    pub(in crate::checkpoint) fn read(&self, range: Range<usize>, out: &mut [u8]) -> Result<()> {
        let range = range.start as u64..range.end as u64;
        if range.is_empty() {
            return Ok(());
        }
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        if range.end - range.start < ALONE && !self.is_near(&blocks) {
            self.remember(&blocks);
            let bytes = read_range(&self.target, range, &self.etag, self.size)?;
            out.copy_from_slice(&bytes);
            return Ok(());
        }
        let follows = self.was_read(blocks.start.wrapping_sub(1));
        let mut waiting: VecDeque<Arc<Slot>> = VecDeque::new();
        let mut next = blocks.start;
        for block in blocks.clone() {
            while next < blocks.end && next < block + AT_A_TIME {
                // The one that is needed now is asked for whatever the room.
                match self.block(next, next == block)? {
                    Some(slot) => waiting.push_back(slot),
                    None => break,
                }
                next += 1;
            }
            if next >= blocks.end && follows {
                // Where blocks are read one after another, the next one will be, too.
                self.block(blocks.end, false)?;
            }
            let Some(slot) = waiting.pop_front() else { continue };
            let bytes = slot.wait().map_err(|failure| failure.error(&self.url))?;
            let from = block * BLOCK;
            let part = range.start.max(from)..range.end.min(from + bytes.len() as u64);
            if part.is_empty() {
                return Err(Error::InputChanged {
                    path: self.url.clone(),
                    what: "it has become shorter",
                });
            }
            let place = |at: u64, start: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
            out[place(part.start, range.start)..place(part.end, range.start)]
                .copy_from_slice(&bytes[place(part.start, from)..place(part.end, from)]);
            Cache::used((self.number, block), part.end == from + bytes.len() as u64);
        }
        self.remember(&blocks);
        Ok(())
    }

    /// Starts to fetch what is about to be read, as far as there is room.
    pub(in crate::checkpoint) fn prefetch(&self, range: &Range<usize>) {
        if range.is_empty() {
            return;
        }
        for block in range.start as u64 / BLOCK..(range.end as u64).div_ceil(BLOCK) {
            // Whoever reads it will meet the error.
            if !matches!(self.block(block, false), Ok(Some(_))) {
                return;
            }
        }
    }

    /// A block, which is asked for if it was not; see [`Cache::get`]. None beyond the end.
    fn block(&self, block: u64, needed: bool) -> Result<Option<Arc<Slot>>> {
        let start = (block * BLOCK).min(self.size);
        let range = start..(start + BLOCK).min(self.size);
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        if length == 0 {
            return Ok(None);
        }
        let (slot, new) = match Cache::get((self.number, block), length, needed) {
            Some(found) => found,
            None => return Ok(None),
        };
        if new {
            let (target, etag, size) =
                (Arc::clone(&self.target), Arc::clone(&self.etag), self.size);
            let filling = Filling(Arc::clone(&slot));
            start_request(
                async move { filling.fill(get_range(&target, range, &etag, size).await) },
            )?;
        }
        Ok(Some(slot))
    }

    /// Whether a block is at hand, or it or a neighbour was read lately.
    fn is_near(&self, blocks: &Range<u64>) -> bool {
        let near = blocks.start.saturating_sub(1)..blocks.end + 1;
        self.read.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|it| near.contains(it))
            || Cache::holds((self.number, blocks.start))
    }

    fn was_read(&self, block: u64) -> bool {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).contains(&block)
    }

    fn remember(&self, blocks: &Range<u64>) {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        for block in blocks.clone() {
            if !read.contains(&block) {
                read.push_back(block);
            }
        }
        while read.len() > REMEMBERED {
            read.pop_front();
        }
    }
}

impl Drop for RemoteFile {
    fn drop(&mut self) {
        Cache::forget(self.number);
    }
}
