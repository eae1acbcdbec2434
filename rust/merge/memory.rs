//! How much memory an execution takes at most: what each worker holds, and what workers share of the tensors they are in.

use super::loader::LEFT_BLOCK;
use super::reading::ACROSS;
use super::requantising::{COMPARED, HELD};
use super::tile::ASSEMBLED;
use super::windows::AHEAD;
use super::work::{CHUNK, SUB_TILE, TILE_ALIGNMENT};
use crate::checkpoint::{ReadBackend, bound_blocks};
use crate::plan::{
    Computation, EncodedTarget, Operand, Operation, Order, OutputTensor, Plan, PlannedShard, Target,
};
use crate::{Error, Result};

/// Bytes of counters for an operand of a tensor that is observed: 2^20 of them, and a copy when a pass is concluded.
const COUNTERS: usize = 8 << 20;
/// Pages that are mapped around the ends of a window, at each end.
const AROUND: usize = 64 << 10;

/// How inputs are read: some may be mapped, and others by position.
#[derive(Debug, Clone, Copy)]
struct Ways {
    mapped: bool,
    positioned: bool,
}

/// What the tensors of some shards take at most. Sums of maxima, so that no order of the work takes more.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Demand {
    /// Bytes of input windows for each byte of a tile, rounded up.
    window_per_byte: usize,
    /// Bytes of input windows at most, however large the tile.
    largest_window: usize,
    /// Bytes of input windows and sums while a chunk is observed.
    observing: usize,
    /// Bytes of a worker's other buffers.
    buffers: usize,
    /// Bytes that are shared of one tensor.
    shared: usize,
    /// Tensors of which anything is shared.
    sharing: usize,
    /// Bytes of a header.
    header: usize,
    /// Whether inputs lie in a store, of which blocks are held for all workers.
    remote: bool,
}

impl Demand {
    /// What these shards of a plan take.
    ///
    /// # Errors
    /// Those of [`Plan::tensor`].
    pub(super) fn of(plan: &Plan, shards: &[&PlannedShard]) -> Result<Self> {
        let mapped = plan.backends().any(|backend| backend != ReadBackend::Pread);
        let ways = Ways { mapped, positioned: plan.is_remote() || !mapped };
        let mut demand = Self { remote: plan.is_remote(), ..Self::default() };
        for shard in shards {
            demand.header = demand.header.max(shard.layout.header);
            for number in 0..shard.layout.len() {
                demand.add(&plan.tensor(shard, number)?, ways);
            }
        }
        Ok(demand)
    }

    fn add(&mut self, tensor: &OutputTensor, ways: Ways) {
        let mapped = ways.mapped;
        let assembly = match &tensor.operation {
            Operation::Copy(input) => {
                self.window_per_byte = self.window_per_byte.max(usize::from(mapped));
                self.largest_window = self.largest_window.max(input.range.len() + 2 * AROUND);
                return;
            }
            Operation::Compute(assembly) => assembly,
        };
        let (mut element, mut around) = (0, 0);
        let mut shared = 0;
        for piece in &assembly.pieces {
            let Computation { method, operands, .. } = &piece.computation;
            let elements = piece.region.len();
            // Of what is read in another order, the pages around each element are mapped.
            let widths = operands.iter().map(|operand| operand.tensor.width());
            let own: usize = widths.sum();
            element = element.max(own);
            around += operands.len() * 2 * AROUND;
            let row = method.row().unwrap_or(SUB_TILE).max(SUB_TILE);
            let loaded = row.min(elements.max(SUB_TILE)) * 4;
            let mut buffers = (operands.len() + 2) * loaded;
            if assembly.pieces.len() > 1 {
                buffers += 2 * 4 * ASSEMBLED;
            }
            if let Target::Encoded(target) = &assembly.target {
                buffers += requantising(target);
            }
            for operand in operands {
                let (held, common) = operand_bytes(operand, elements, ways);
                buffers += held;
                shared += common;
            }
            if method.passes() > 0 {
                let request = method.request(&method.start());
                let chunk = elements
                    .min(method.row().map_or(CHUNK, |row| CHUNK.next_multiple_of(row.max(1))));
                let windows = if mapped { chunk * own + operands.len() * 2 * AROUND } else { 0 };
                // A chunk's sums wait for their turn; the total becomes facts.
                let sums = request.sums * size_of::<f64>();
                self.observing = self.observing.max(windows + 2 * sums);
                shared += 2 * sums + operands.len() * COUNTERS;
            }
            self.buffers = self.buffers.max(buffers);
        }
        if mapped {
            let bytes = match &assembly.target {
                Target::Plain(float) => element.div_ceil(float.size()),
                Target::Encoded(target) => element * target.like.encoding.code.per_byte(),
            };
            self.window_per_byte = self.window_per_byte.max(bytes);
            self.largest_window = self.largest_window.max(assembly.elements * element + around);
        }
        self.shared = self.shared.max(shared);
        self.sharing += usize::from(shared > 0);
    }

    /// Bytes that so many workers with such tiles take at most.
    pub(super) fn bytes(&self, threads: usize, tile: usize) -> usize {
        let window = tile.saturating_mul(self.window_per_byte).min(self.largest_window);
        let worker = tile.saturating_add(self.buffers).saturating_add(window.max(self.observing));
        // One tensor more than workers: the one whose next piece nobody has taken yet.
        let tensors = self.sharing.min(threads.saturating_add(1));
        threads
            .saturating_mul(worker)
            .saturating_add(tensors.saturating_mul(self.shared))
            .saturating_add(self.header)
    }

    /// At most so many threads, and tiles of at most so many bytes, that fit a budget: fewer threads first, then smaller
    /// tiles. Of inputs in stores half of the budget, and at most 256 MiB, is for blocks that were asked for.
    ///
    /// # Errors
    /// [`Error::Option`] if not even one worker with the smallest tile fits.
    pub(super) fn fit(&self, threads: usize, tile: usize, budget: usize) -> Result<(usize, usize)> {
        let blocks = if self.remote { bound_blocks(Some(budget)) } else { 0 };
        let least = self.bytes(1, TILE_ALIGNMENT);
        if least > budget - blocks {
            let least = if self.remote { 2 * least } else { least };
            return Err(Error::Option(format!(
                "a memory budget of {budget} bytes is below the {least} that one worker needs"
            )));
        }
        let budget = budget - blocks;
        let (mut threads, mut tile) = (threads, tile);
        while threads > 1 && self.bytes(threads, tile) > budget {
            threads -= 1;
        }
        while tile > TILE_ALIGNMENT && self.bytes(threads, tile) > budget {
            tile = (tile / 2).next_multiple_of(TILE_ALIGNMENT);
        }
        Ok((threads, tile))
    }
}

/// Bytes that a worker holds of a band, beside its codes, to quantise it.
fn requantising(target: &EncodedTarget) -> usize {
    let band = &target.like.band;
    let compared = COMPARED.max(band.columns);
    let held = (band.rows * band.columns).min(HELD.max(band.columns));
    (held + 2 * compared) * size_of::<f32>()
        + band.rows.min(target.like.encoding.rows()) * band.row_bytes()
}

/// Bytes that a worker holds of an operand beside the window on its matrix, and bytes that all workers share of it.
fn operand_bytes(operand: &Operand, elements: usize, ways: Ways) -> (usize, usize) {
    let (columns, float) = (operand.columns, size_of::<f32>());
    let rows = elements.checked_div(columns).unwrap_or(0);
    // What is read by position is read ahead; of what is mapped, pages around it are mapped, too.
    let window = |bytes: usize| bytes.min(if ways.positioned { AHEAD } else { 2 * AROUND });
    let mut held = if ways.positioned { window(operand.tensor.input.range.len()) } else { 0 };
    if let Some(view) = &operand.tensor.view
        && !matches!(view.order(), Order::Runs)
    {
        held += float * 2 * ACROSS.max(view.row());
    }
    let mut shared = 0;
    if let Some(replaced) = &operand.rows {
        held += replaced.tensor.input.range.len();
    }
    for term in &operand.low_rank {
        let block = (rows * term.rank).min(LEFT_BLOCK.max(term.rank));
        held += block * float + window(term.left().input.range.len());
        // Of a factor that is read by whoever makes it for all.
        held += window(term.right().input.range.len());
        shared += term.rank * columns * float;
    }
    if let Some(magnitude) = &operand.magnitude {
        held += window(magnitude.tensor.input.range.len()) + columns * (float + size_of::<f64>());
        if magnitude.transpose {
            shared += columns * float;
        } else {
            held += rows * float;
        }
    }
    (held, shared)
}
