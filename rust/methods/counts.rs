//! Counts of a whole tensor, which all workers increment.

use std::sync::atomic::{AtomicU32, Ordering};

/// Counts that one worker increments. It hands them on by and by: differences of bf16 weights take few values, and workers
/// that all increment the count of one of them would wait for each other.
#[derive(Debug)]
pub struct Counts<'a> {
    shared: &'a [AtomicU32],
    /// Place and count of what was not handed on yet, by the place's hash.
    recent: [(u32, u32); RECENT],
}

const RECENT: usize = 256;

impl<'a> Counts<'a> {
    /// Those that are shared.
    #[must_use]
    pub fn new(shared: &'a [AtomicU32]) -> Self {
        Self { shared, recent: [(0, 0); RECENT] }
    }

    /// Adds to the count at a place.
    #[inline(always)]
    pub(super) fn add(&mut self, place: u32, count: u32) {
        // Hashed, since the low bits of differences of bf16 weights are zero.
        let hash = place.wrapping_mul(0x9E37_79B9) >> (u32::BITS - RECENT.ilog2());
        let slot = &mut self.recent[hash as usize];
        if slot.0 == place {
            slot.1 += count;
            return;
        }
        let (old, waiting) = std::mem::replace(slot, (place, count));
        if waiting > 0 {
            self.shared[old as usize].fetch_add(waiting, Ordering::Relaxed);
        }
    }

    /// Sets bits of the number at a place, which is no count.
    pub(super) fn mark(&self, place: u32, bits: u32) {
        let number = &self.shared[place as usize];
        // Mostly they are set; reading disturbs nobody.
        if number.load(Ordering::Relaxed) & bits != bits {
            number.fetch_or(bits, Ordering::Relaxed);
        }
    }

    /// Hands everything on.
    pub fn flush(self) {
        for (place, count) in self.recent {
            if count > 0 {
                self.shared[place as usize].fetch_add(count, Ordering::Relaxed);
            }
        }
    }
}
