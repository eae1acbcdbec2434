//! The order of the work: before a tile, the observe passes of the tensors that it is the first to hold.
//!
//! Items are taken in order, and an item waits for nothing but earlier ones; so somebody always has work.

use super::tile::{prefetch_elements, prefetch_tile};
use crate::plan::{Operation, PlannedShard};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// How many items before its turn an item's inputs start to be read.
const PREFETCH: usize = 4;

/// Elements of a chunk of an observe pass, about.
pub(super) const CHUNK: usize = 1 << 20;

/// A piece of work.
#[derive(Debug, Clone)]
pub(super) enum Item {
    /// Bytes of an output file.
    Tile(Tile),
    /// A part of one observe pass.
    Chunk(Chunk),
}

/// The number of a shard, and bytes of that shard's file.
#[derive(Debug, Clone)]
pub(super) struct Tile {
    pub shard: usize,
    pub span: Range<usize>,
}

/// A part of an observe pass over one tensor.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub shard: usize,
    /// Number of the tensor in the shard.
    pub tensor: usize,
    pub pass: usize,
    /// Number of the chunk in the pass.
    pub number: usize,
    pub elements: Range<usize>,
}

/// The elements of each chunk of a tensor.
pub(super) fn chunks(elements: usize, row: Option<usize>) -> impl Iterator<Item = Range<usize>> {
    // Whole rows, for methods that need them.
    let step = row.map_or(CHUNK, |row| CHUNK.next_multiple_of(row.max(1)));
    (0..elements).step_by(step).map(move |start| start..elements.min(start + step))
}

/// All work on several shards, handed out piece by piece.
pub(super) struct Queue<'a> {
    shards: &'a [&'a PlannedShard],
    tile_bytes: usize,
    /// Whether a tile will be filled at all; tensors that lie in no such tile are not observed.
    wanted: &'a (dyn Fn(&Tile) -> bool + Sync),
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where the next tile starts.
    shard: usize,
    offset: usize,
    /// Tensors of that shard before this one have been observed.
    observed: usize,
    items: VecDeque<Item>,
    /// How many of the items have been read ahead.
    prefetched: usize,
}

impl<'a> Queue<'a> {
    pub(super) fn new(
        shards: &'a [&'a PlannedShard],
        tile_bytes: usize,
        wanted: &'a (dyn Fn(&Tile) -> bool + Sync),
    ) -> Self {
        Self { shards, tile_bytes, wanted, state: Mutex::default() }
    }

    /// Number of tiles of one shard.
    pub(super) fn tiles_of(&self, shard: usize) -> usize {
        self.shards[shard].layout.size.div_ceil(self.tile_bytes)
    }

    /// The next piece of work, if any is left.
    pub(super) fn take(&self) -> Option<Item> {
        let (item, ahead) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            while state.items.len() <= PREFETCH && self.extend(&mut state) {}
            let item = state.items.pop_front();
            let done = state.prefetched.saturating_sub(1);
            let until = state.items.len().min(PREFETCH).max(done);
            state.prefetched = until;
            let ahead: Vec<Item> = state
                .items
                .range(done.min(state.items.len())..until.min(state.items.len()))
                .cloned()
                .collect();
            (item, ahead)
        };
        for item in ahead {
            self.prefetch(&item);
        }
        item
    }

    fn prefetch(&self, item: &Item) {
        match item {
            Item::Tile(tile) if (self.wanted)(tile) => {
                prefetch_tile(self.shards[tile.shard], &tile.span);
            }
            Item::Tile(_) => {}
            Item::Chunk(chunk) => {
                prefetch_elements(&self.shards[chunk.shard].tensors[chunk.tensor], &chunk.elements);
            }
        }
    }

    /// Appends the next tile and what must come before it; false if there is none.
    fn extend(&self, state: &mut State) -> bool {
        while self.shards.get(state.shard).is_some_and(|shard| state.offset >= shard.layout.size) {
            (state.shard, state.offset, state.observed) = (state.shard + 1, 0, 0);
        }
        let Some(shard) = self.shards.get(state.shard) else { return false };
        let end = shard.layout.size.min(state.offset + self.tile_bytes);
        let tile = Tile { shard: state.shard, span: state.offset..end };
        if (self.wanted)(&tile) {
            let held = shard.tensors.partition_point(|tensor| tensor.range.end <= tile.span.start);
            let first = held.max(state.observed);
            let last = shard.tensors.partition_point(|tensor| tensor.range.start < tile.span.end);
            for tensor in first..last {
                Self::observe(shard, state, tensor);
            }
            state.observed = last.max(state.observed);
        }
        state.items.push_back(Item::Tile(tile));
        state.offset = end;
        true
    }

    fn observe(planned: &PlannedShard, state: &mut State, tensor: usize) {
        let output = &planned.tensors[tensor];
        let Operation::Compute { method, dtype, .. } = &output.operation else { return };
        let elements = output.range.len() / dtype.size();
        for pass in 0..method.passes() {
            for (number, elements) in chunks(elements, method.row()).enumerate() {
                let shard = state.shard;
                state.items.push_back(Item::Chunk(Chunk { shard, tensor, pass, number, elements }));
            }
        }
    }
}
