//! Blocks of objects that were asked for and are wanted, or may be wanted again: so many bytes at most, for all files.

use super::failure::Failure;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

/// Bytes that are asked for at a time.
pub(super) const BLOCK: u64 = 8 << 20;
/// Requests and reads after which a block that nobody has read is taken for one that nobody wants.
const STALE: u64 = 2000;
/// Bytes of all blocks, where nobody has set a bound.
const ROOM: usize = 256 << 20;

/// Numbers of a file and of a block in it.
type Name = (u64, u64);

/// Where the bytes of a block will be.
#[derive(Debug, Default)]
pub(super) struct Slot {
    state: Mutex<Option<Result<Bytes, Failure>>>,
    there: Condvar,
}

impl Slot {
    fn fill(&self, result: Result<Bytes, Failure>) {
        self.lock().get_or_insert(result);
        self.there.notify_all();
    }

    pub(super) fn wait(&self) -> Result<Bytes, Failure> {
        let mut state = self.lock();
        loop {
            if let Some(result) = &*state {
                return result.clone();
            }
            state = self.there.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn is_there(&self) -> bool {
        self.lock().is_some()
    }

    fn has_failed(&self) -> bool {
        matches!(*self.lock(), Some(Err(_)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Result<Bytes, Failure>>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is under way: whoever waits for it hears of its end, however it ends.
#[derive(Debug)]
pub(super) struct Filling(pub Arc<Slot>);

impl Filling {
    pub(super) fn fill(self, result: Result<Bytes, Failure>) {
        self.0.fill(result);
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.0.fill(Err(Failure::Refused("the request was given up; this is a bug".to_owned())));
    }
}

#[derive(Debug)]
struct Entry {
    slot: Arc<Slot>,
    length: usize,
    /// When it was last asked for or read.
    time: u64,
    /// Whether any of it was read, and whether its end was.
    touched: bool,
    spent: bool,
}

/// The blocks of all files of this process.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<Name, Entry>,
    bytes: usize,
    time: u64,
}

static CACHE: LazyLock<Mutex<Cache>> = LazyLock::new(Mutex::default);
static CAPACITY: AtomicUsize = AtomicUsize::new(ROOM);

/// Bounds what blocks take, of a memory budget if there is one: half of it, and at most 256 MiB. Returns the bound.
pub(crate) fn bound(budget: Option<usize>) -> usize {
    let most = budget.map_or(ROOM, |budget| (budget / 2).min(ROOM));
    CAPACITY.store(most, Ordering::Relaxed);
    most
}

impl Cache {
    fn lock() -> MutexGuard<'static, Self> {
        CACHE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the bytes of a block of this name and length will be, and whether the caller is to ask for them. Without
    /// `needed` only if there is room for it.
    pub(super) fn get(name: Name, length: usize, needed: bool) -> Option<(Arc<Slot>, bool)> {
        let mut cache = Self::lock();
        cache.time += 1;
        let time = cache.time;
        if let Some(entry) = cache.entries.get_mut(&name)
            // What has failed is tried again by whoever needs it.
            && !entry.slot.has_failed()
        {
            entry.time = time;
            return Some((Arc::clone(&entry.slot), false));
        }
        cache.remove(name);
        if !cache.make_room(length, needed) && !needed {
            return None;
        }
        let slot = Arc::new(Slot::default());
        let entry = Entry { slot: Arc::clone(&slot), length, time, touched: false, spent: false };
        cache.entries.insert(name, entry);
        cache.bytes += length;
        Some((slot, true))
    }

    /// Whether a block is at hand or asked for.
    pub(super) fn holds(name: Name) -> bool {
        Self::lock().entries.contains_key(&name)
    }

    /// Some of a block was read; all of it, if its end was.
    pub(super) fn used(name: Name, end: bool) {
        let mut cache = Self::lock();
        cache.time += 1;
        let time = cache.time;
        if let Some(entry) = cache.entries.get_mut(&name) {
            (entry.time, entry.touched, entry.spent) = (time, true, entry.spent || end);
        }
    }

    /// Lets all blocks of a file go.
    pub(super) fn forget(file: u64) {
        let mut cache = Self::lock();
        cache.entries.retain(|(of, _), _| *of != file);
        cache.bytes = cache.entries.values().map(|entry| entry.length).sum();
    }

    /// Lets blocks go until there is room for so many bytes more: first those that were read to their end, then those
    /// that were read, the longest unused first; what was not read yet only for what is `needed`, or if it has become
    /// stale. False if that is not enough.
    fn make_room(&mut self, length: usize, needed: bool) -> bool {
        let capacity = CAPACITY.load(Ordering::Relaxed);
        while self.bytes + length > capacity {
            let old = self.time.saturating_sub(STALE);
            let may_go = |it: &Entry| (it.touched || needed || it.time < old) && it.slot.is_there();
            let candidates = self.entries.iter().filter(|(_, it)| may_go(it));
            let oldest = candidates.min_by_key(|(_, it)| (!it.spent, !it.touched, it.time));
            let Some((&name, _)) = oldest else { return false };
            self.remove(name);
        }
        true
    }

    fn remove(&mut self, name: Name) {
        if let Some(entry) = self.entries.remove(&name) {
            self.bytes -= entry.length;
        }
    }
}
