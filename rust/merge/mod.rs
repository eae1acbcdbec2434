//! Execution of plans: output files are cut into tiles and tensors into chunks (`work`); a tensor is entered (`entered`),
//! its operands are read (`reading`) and changed by adapters (`loader`), observed whole where a method asks for it (`observation`),
//! blended (`blending`), put together where it has pieces (`assembling`), and written into tiles (`tile`), quantised where
//! that is asked for (`requantising`, `scales`). A queue puts all that in order (`queue`); workers stream the tiles to disk
//! ([`stream`]) or compare them with what is there ([`verify`]).
//! What all that takes is known beforehand (`memory`).

mod assembling;
mod blending;
mod entered;
pub(crate) mod loader;
mod memory;
mod observation;
mod once;
mod pages;
pub mod preparing;
mod queue;
mod reading;
mod requantising;
mod scales;
pub mod stream;
mod tile;
pub mod verify;
mod windows;
mod work;
mod workers;

pub use blending::NonFinite;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Counters that workers advance and anyone may read, and the flag that stops them.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicUsize,
    shards: AtomicUsize,
    cancelled: AtomicBool,
}

impl Progress {
    /// Output bytes finished so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Output files finished so far.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.shards.load(Ordering::Relaxed)
    }

    /// Asks the workers to stop, within a tile.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether someone asked.
    #[must_use]
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn advance(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn finish_shard(&self) {
        self.shards.fetch_add(1, Ordering::Relaxed);
    }
}
