//! Threads that take tiles from a queue, while the calling thread watches for an interruption.

use super::Progress;
use super::tile::prefetch;
use crate::plan::PlannedShard;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// How often the calling thread looks for an interruption.
const POLL: Duration = Duration::from_millis(50);

/// How many tiles before its turn a tile's inputs start to be read.
const PREFETCH: usize = 4;

/// One tile: the number of its shard, and its bytes within that shard's file.
pub(super) struct Tile {
    pub shard: usize,
    pub span: Range<usize>,
}

/// The tiles of several shards, in file order, handed out one by one.
pub(super) struct TileQueue<'a> {
    shards: &'a [&'a PlannedShard],
    tile_bytes: usize,
    /// `ends[i]` tiles lie in the shards up to and including `i`.
    ends: Vec<usize>,
    next: AtomicUsize,
}

impl<'a> TileQueue<'a> {
    pub(super) fn new(shards: &'a [&'a PlannedShard], tile_bytes: usize) -> Self {
        let mut total = 0;
        let ends = shards
            .iter()
            .map(|shard| {
                total += shard.layout.size.div_ceil(tile_bytes);
                total
            })
            .collect();
        Self { shards, tile_bytes, ends, next: AtomicUsize::new(0) }
    }

    /// Number of tiles of one shard.
    pub(super) fn tiles_of(&self, shard: usize) -> usize {
        self.shards[shard].layout.size.div_ceil(self.tile_bytes)
    }

    fn take(&self) -> Option<Tile> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(ahead) = self.tile(number + PREFETCH) {
            prefetch(self.shards[ahead.shard], &ahead.span);
        }
        self.tile(number)
    }

    fn tile(&self, number: usize) -> Option<Tile> {
        let shard = self.ends.partition_point(|&end| end <= number);
        let size = self.shards.get(shard)?.layout.size;
        let first = if shard == 0 { 0 } else { self.ends[shard - 1] };
        let start = (number - first) * self.tile_bytes;
        Some(Tile { shard, span: start..size.min(start + self.tile_bytes) })
    }
}

/// Runs `threads` workers, each with a state from `start`, until the queue is empty, one of them fails, or `progress`
/// is cancelled. `poll` is called on the calling thread about every 50 ms; when it returns false the work is cancelled.
/// Returns the workers' states.
pub(super) fn run<State: Send>(
    queue: &TileQueue<'_>,
    threads: usize,
    progress: &Progress,
    poll: &mut dyn FnMut() -> bool,
    start: impl Fn() -> Result<State> + Sync,
    work: impl Fn(&mut State, Tile) -> Result<()> + Sync,
) -> Result<Vec<State>> {
    let failure = Mutex::new(None);
    let fail = |error: Error| {
        let mut first = failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        first.get_or_insert(error);
    };
    let failed = || failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_some();
    let worker = || {
        let mut state = match start() {
            Ok(state) => state,
            Err(error) => {
                fail(error);
                return None;
            }
        };
        while !progress.cancelled() && !failed() {
            let Some(tile) = queue.take() else { return Some(state) };
            if let Err(error) = work(&mut state, tile) {
                fail(error);
            }
        }
        None
    };
    let states: Vec<Option<State>> = std::thread::scope(|scope| {
        let (finished, finishes) = mpsc::channel::<()>();
        let worker = &worker;
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let finished = finished.clone();
                scope.spawn(move || {
                    let state = worker();
                    drop(finished);
                    state
                })
            })
            .collect();
        drop(finished);
        // Nothing is ever sent: the channel closes when the last worker, finished or panicked, drops its sender.
        while let Err(mpsc::RecvTimeoutError::Timeout) = finishes.recv_timeout(POLL) {
            if !poll() {
                progress.cancel();
            }
        }
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(error);
    }
    states.into_iter().collect::<Option<Vec<State>>>().ok_or(Error::Interrupted)
}
