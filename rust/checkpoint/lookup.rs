//! Numbers of things by their names, four bytes a slot: the names stay where they are, in somebody's arena.

use std::hash::{BuildHasher, RandomState};

/// No number.
const FREE: u32 = u32::MAX;

/// A hash table of numbers. Names come from files that anybody may have made, hence the keyed hash.
#[derive(Debug)]
pub(super) struct Lookup {
    /// A power of two of them, at least a third of them free.
    slots: Vec<u32>,
    hasher: RandomState,
}

impl Lookup {
    /// A table for so many names at most.
    pub(super) fn with_capacity(names: usize) -> Self {
        let slots = (names + names / 2 + 1).next_power_of_two();
        Self { slots: vec![FREE; slots], hasher: RandomState::new() }
    }

    /// The slot of a name: the one that holds its number, or the free one where that belongs.
    fn slot<'a>(&self, name: &str, name_of: impl Fn(u32) -> &'a str) -> usize {
        let mask = self.slots.len() - 1;
        // The low bits are all that is wanted.
        #[expect(clippy::cast_possible_truncation, reason = "a hash")]
        let mut slot = self.hasher.hash_one(name) as usize & mask;
        while self.slots[slot] != FREE && name_of(self.slots[slot]) != name {
            slot = (slot + 1) & mask;
        }
        slot
    }

    /// The number of a name; `name_of` gives the name of a number.
    pub(super) fn find<'a>(&self, name: &str, name_of: impl Fn(u32) -> &'a str) -> Option<u32> {
        Some(self.slots[self.slot(name, name_of)]).filter(|&number| number != FREE)
    }

    /// Gives a name a number, and returns the one that it had before.
    pub(super) fn insert<'a>(
        &mut self,
        name: &str,
        number: u32,
        name_of: impl Fn(u32) -> &'a str,
    ) -> Option<u32> {
        let slot = self.slot(name, name_of);
        let before = std::mem::replace(&mut self.slots[slot], number);
        Some(before).filter(|&number| number != FREE)
    }
}
