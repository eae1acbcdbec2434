//! The order of the work: before a tile, the observe passes of the large tensors that it is the first to hold.
//!
//! Items are taken in order, and an item waits for nothing but earlier ones; so somebody always has work. Small tensors,
//! those that lie within one tile and one chunk, are nobody else's business: whoever fills the tile enters, observes and
//! leaves them one by one, so that a tile of thousands of them holds but one at a time.

use super::entered::{Entered, EnteredPiece};
use super::work::{CHUNK, chunks, parts};
use crate::Result;
use crate::checkpoint::ReadBackend;
use crate::plan::{Computation, Operand, Operation, Piece, Plan, PlannedShard};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// How many items before its turn an item's inputs start to be read.
pub(super) const PREFETCH: usize = 4;
/// Smaller parts of inputs are left to the kernel's own reading ahead.
const LEAST_PREFETCH: usize = 64 << 10;

/// Elements of all operands together that a first pass leaves in the page cache for the next ones.
const STAYS_CACHED: usize = 1 << 28;

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
    /// Whether it is to be filled.
    pub wanted: bool,
    /// The file's header, if part of it lies in the tile.
    pub header: Option<Arc<Vec<u8>>>,
    /// Those of its tensors that others work on, too, with their numbers in the file.
    pub large: Vec<(usize, Arc<Entered>)>,
}

/// A part of an observe pass over one piece of a tensor.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub tensor: Arc<Entered>,
    /// Number of the piece.
    pub piece: usize,
    pub pass: usize,
    /// Number of the chunk in the pass.
    pub number: usize,
    pub elements: Range<usize>,
}

/// Whether a tile of a shard, given by the shard's number and the tile's start, is to be filled.
pub(super) type Wanted<'a> = &'a (dyn Fn(usize, usize) -> bool + Sync);

/// All work on several shards, handed out piece by piece.
pub(super) struct Queue<'a> {
    plan: &'a Plan,
    shards: &'a [&'a PlannedShard],
    tile_bytes: usize,
    /// Tensors that lie in no tile that is wanted are not observed.
    wanted: Wanted<'a>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where the next tile starts.
    shard: usize,
    offset: usize,
    header: Option<Arc<Vec<u8>>>,
    /// The large tensor that was entered last, with its number.
    last: Option<(usize, Arc<Entered>)>,
    items: VecDeque<Item>,
    /// How many of the items have been read ahead.
    prefetched: usize,
}

impl<'a> Queue<'a> {
    pub(super) fn new(
        plan: &'a Plan,
        shards: &'a [&'a PlannedShard],
        tile_bytes: usize,
        wanted: Wanted<'a>,
    ) -> Self {
        Self { plan, shards, tile_bytes, wanted, state: Mutex::default() }
    }

    /// Number of tiles of one shard.
    pub(super) fn tiles_of(&self, shard: usize) -> usize {
        self.shards[shard].layout.size.div_ceil(self.tile_bytes)
    }

    /// The next piece of work, if any is left.
    ///
    /// # Errors
    /// Those of [`Plan::tensor`].
    pub(super) fn take(&self) -> Result<Option<Item>> {
        let (item, ahead) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            while state.items.len() <= PREFETCH && self.extend(&mut state)? {}
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
            self.prefetch(&item)?;
        }
        Ok(item)
    }

    /// Starts to read what an item needs. Where inputs are read by position, that would have to wait for them.
    fn prefetch(&self, item: &Item) -> Result<()> {
        if !self.plan.is_remote()
            && self.plan.backends().all(|backend| backend == ReadBackend::Pread)
        {
            return Ok(());
        }
        match item {
            Item::Chunk(chunk) => {
                if let Some((piece, _)) = chunk.tensor.piece(chunk.piece)
                    && (chunk.pass == 0 || !stays_cached(piece))
                {
                    prefetch_elements(&piece.computation, &chunk.elements);
                }
            }
            Item::Tile(tile) if tile.wanted => {
                let shard = self.shards[tile.shard];
                for part in parts(&shard.layout, &tile.span) {
                    if part.bytes.len() < LEAST_PREFETCH {
                        continue;
                    }
                    match tile.large.iter().find(|(number, _)| *number == part.tensor) {
                        Some((_, tensor)) => prefetch_bytes(tensor, &part.bytes, observed),
                        None => {
                            let tensor = Entered::new(self.plan, shard, tile.shard, part.tensor)?;
                            prefetch_bytes(&tensor, &part.bytes, |_| false);
                        }
                    }
                }
            }
            Item::Tile(_) => {}
        }
        Ok(())
    }

    /// Appends the next tile and what must come before it; false if there is none.
    fn extend(&self, state: &mut State) -> Result<bool> {
        while self.shards.get(state.shard).is_some_and(|shard| state.offset >= shard.layout.size) {
            (state.shard, state.offset, state.last, state.header) =
                (state.shard + 1, 0, None, None);
        }
        let Some(&planned) = self.shards.get(state.shard) else { return Ok(false) };
        let (shard, start) = (state.shard, state.offset);
        let span = start..planned.layout.size.min(start + self.tile_bytes);
        let wanted = (self.wanted)(shard, start);
        let mut tile = Tile { shard, span, wanted, header: None, large: Vec::new() };
        if wanted {
            if start >= planned.layout.header {
                state.header = None;
            } else if state.header.is_none() {
                state.header = Some(Arc::new(self.plan.header(planned)?));
            }
            tile.header.clone_from(&state.header);
            for part in parts(&planned.layout, &tile.span) {
                let elements = part.bytes.len() / Plan::element_bytes(planned, part.tensor);
                if part.whole && elements <= CHUNK {
                    continue;
                }
                let tensor = match &state.last {
                    Some((number, tensor)) if *number == part.tensor => Arc::clone(tensor),
                    _ => Self::enter(state, self.plan, planned, part.tensor)?,
                };
                tile.large.push((part.tensor, tensor));
            }
        }
        state.offset = tile.span.end;
        // A tensor that ends here will not be met again.
        if state.last.as_ref().is_some_and(|(_, last)| last.output.range.end <= state.offset) {
            state.last = None;
        }
        state.items.push_back(Item::Tile(tile));
        Ok(true)
    }

    /// Enters a large tensor, and appends the passes over it.
    fn enter(
        state: &mut State,
        plan: &Plan,
        planned: &PlannedShard,
        number: usize,
    ) -> Result<Arc<Entered>> {
        let tensor = Arc::new(Entered::new(plan, planned, state.shard, number)?);
        state.last = Some((number, Arc::clone(&tensor)));
        for (place, (piece, _)) in tensor.pieces().enumerate() {
            let method = &piece.computation.method;
            for pass in 0..method.passes() {
                for (number, elements) in chunks(piece.region.len(), method.row()).enumerate() {
                    let tensor = Arc::clone(&tensor);
                    let chunk = Chunk { tensor, piece: place, pass, number, elements };
                    state.items.push_back(Item::Chunk(chunk));
                }
            }
        }
        Ok(tensor)
    }
}

/// Whether a large tensor's piece has been read by the passes before its tiles.
fn observed(entered: &EnteredPiece) -> bool {
    entered.observation.is_some()
}

/// Starts to read what some bytes of a tensor are made of, but for pieces that were read before and stay cached.
fn prefetch_bytes(tensor: &Entered, bytes: &Range<usize>, read: fn(&EnteredPiece) -> bool) {
    match &tensor.output.operation {
        Operation::Copy(input) => input.prefetch(bytes),
        Operation::Compute(assembly) => {
            let elements = assembly.elements_of(bytes);
            for (piece, entered) in tensor.pieces() {
                if !read(entered) || !stays_cached(piece) {
                    prefetch_elements(&piece.computation, &piece.region.within(&elements));
                }
            }
        }
    }
}

/// Whether what one pass over a piece has read is still cached when the next one comes. Advice on what is cached costs as
/// much as a tenth of the work. Of stores little is kept, and to wait for them costs more.
fn stays_cached(piece: &Piece) -> bool {
    let operands = &piece.computation.operands;
    let near = |operand: &Operand| !operand.tensor.input.file().is_ok_and(|file| file.is_remote());
    piece.region.len().saturating_mul(operands.len()) <= STAYS_CACHED && operands.iter().all(near)
}

/// Starts to read what some elements are computed from.
fn prefetch_elements(computation: &Computation, elements: &Range<usize>) {
    if elements.is_empty() {
        return;
    }
    for operand in &computation.operands {
        operand.tensor.prefetch(elements);
    }
}
