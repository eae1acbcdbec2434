//! The merge itself: workers fill tiles and write them; the last tile of a shard hands it over, to be committed at once or later.

use super::Progress;
use super::blending::NonFinite;
use super::memory::Demand;
use super::queue::{Item, Queue};
use super::tile::TileFiller;
use super::work::{DEFAULT_TILE, TILE_ALIGNMENT};
use super::workers;
use crate::kernels::Kernels;
use crate::plan::{Changes, Plan, PlannedShard};
use crate::writer::{JobDirectory, TileBuffer, TileFile, WriteMode};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// How to execute. None of it changes the output's bytes.
#[derive(Debug, Clone)]
pub struct Options {
    /// Worker threads; see [`default_threads`].
    pub threads: usize,
    /// Bytes of a tile, a multiple of 4096.
    pub tile_bytes: usize,
    /// Most bytes that buffers, windows on inputs, factors and counters may take together; lowers `threads`, then
    /// `tile_bytes`.
    pub memory_budget: Option<usize>,
    /// How output files are written.
    pub write: WriteMode,
    /// The kernels.
    pub kernels: Kernels,
    /// Let NaN and infinity of inputs through.
    pub allow_nonfinite: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: default_threads(),
            tile_bytes: DEFAULT_TILE,
            memory_budget: None,
            write: WriteMode::Auto,
            kernels: Kernels::detect(),
            allow_nonfinite: false,
        }
    }
}

/// Two more workers than processors, since a worker that writes waits for the disk; at most 16, which any disk keeps up
/// with, so that their buffers stay within 256 MB.
#[must_use]
pub fn default_threads() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.saturating_add(2).min(16)
}

impl Options {
    /// Threads and tile size within the memory budget, for these shards of a plan.
    pub(super) fn fit(&self, plan: &Plan, shards: &[&PlannedShard]) -> Result<(usize, usize)> {
        let (threads, tile) = (self.threads.max(1), self.tile_bytes);
        if tile == 0 || !tile.is_multiple_of(TILE_ALIGNMENT) {
            return Err(Error::Option(format!(
                "the tile size is {tile}, it must be a positive multiple of {TILE_ALIGNMENT}"
            )));
        }
        match self.memory_budget {
            Some(budget) => Demand::of(plan, shards)?.fit(threads, tile, budget),
            None => Ok((threads, tile)),
        }
    }
}

/// Bytes that [`execute`] takes at most for buffers, windows on inputs, factors and counters.
///
/// # Errors
/// [`Error::Option`] if the tile size is not aligned, or if the memory budget is too small.
pub fn memory(plan: &Plan, shards: &[&PlannedShard], options: &Options) -> Result<usize> {
    let (threads, tile) = options.fit(plan, shards)?;
    Ok(Demand::of(plan, shards)?.bytes(threads, tile))
}

/// What happened to one shard.
#[derive(Debug, Clone)]
pub struct ShardFacts {
    /// Its file name.
    pub file: String,
    /// Bytes written; zero if it had been committed before.
    pub bytes_written: usize,
    /// Seconds from its first tile to its commit.
    pub seconds: f64,
    /// How it was written: "direct" or "buffered", or "cloned" from an input of the same bytes.
    pub write: &'static str,
    /// Whether the journal had it, so that nothing was done.
    pub resumed: bool,
    /// Input tensors that were merged though they hold NaN or infinity, if that was allowed.
    pub nonfinite_inputs: Vec<NonFinite>,
    /// How far requantised tensors changed.
    pub changes: Changes,
}

impl ShardFacts {
    /// Of a shard that had been committed before.
    #[must_use]
    pub fn resumed(shard: &PlannedShard, output: &JobDirectory) -> Self {
        Self {
            file: shard.file.clone(),
            bytes_written: 0,
            seconds: 0.0,
            write: "buffered",
            resumed: true,
            nonfinite_inputs: Vec::new(),
            changes: output.changes(&shard.file),
        }
    }
}

/// Where shards are made, and who takes them when they are whole.
pub(super) trait Sink: Sync {
    /// Creates the file of a shard.
    fn create(&self, shard: &PlannedShard, mode: WriteMode) -> Result<TileFile>;

    /// Creates it as a clone of a file of the same bytes; `None` where the file system cannot do that.
    fn clone_of(&self, shard: &PlannedShard, source: &File) -> Result<Option<TileFile>>;

    /// Takes a shard that is whole.
    fn take(&self, shard: &PlannedShard, file: &TileFile, changes: &Changes) -> Result<()>;
}

/// The job's own process commits a shard as soon as it is prepared.
impl Sink for JobDirectory {
    fn create(&self, shard: &PlannedShard, mode: WriteMode) -> Result<TileFile> {
        self.create_shard(&shard.file, shard.layout.size, mode)
    }

    fn clone_of(&self, shard: &PlannedShard, source: &File) -> Result<Option<TileFile>> {
        self.clone_shard(&shard.file, shard.layout.size, source)
    }

    fn take(&self, shard: &PlannedShard, file: &TileFile, changes: &Changes) -> Result<()> {
        self.commit_shard(file, &shard.digest, changes)
    }
}

/// A shard being written.
struct OpenShard {
    tiles_left: AtomicUsize,
    state: Mutex<Option<(Arc<TileFile>, Instant)>>,
    nonfinite_inputs: Mutex<BTreeSet<NonFinite>>,
    changes: Mutex<Changes>,
}

impl OpenShard {
    /// Moves a worker's findings, mostly none, to the shard.
    fn note(&self, filler: &mut TileFiller) {
        let found = filler.nonfinite_inputs();
        if !found.is_empty() {
            let mut known = self.nonfinite_inputs.lock().unwrap_or_else(PoisonError::into_inner);
            known.extend(found.drain(..));
        }
        let found = filler.changes();
        if !found.is_empty() {
            let mut known = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
            for (tensor, change) in std::mem::take(found) {
                known.entry(tensor).or_default().add(change);
            }
        }
    }

    fn nonfinite_inputs(&self) -> Vec<NonFinite> {
        let known = self.nonfinite_inputs.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().cloned().collect()
    }

    /// The shard's partial file, created by whoever comes first.
    fn file(
        &self,
        sink: &dyn Sink,
        shard: &PlannedShard,
        mode: WriteMode,
    ) -> Result<Arc<TileFile>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((file, _)) = state.as_ref() {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(sink.create(shard, mode)?);
        *state = Some((Arc::clone(&file), Instant::now()));
        Ok(file)
    }
}

/// Executes shards of a plan into a job directory. Shards that its journal lists with the same digest are left
/// alone. `poll` runs on the calling thread every 50 ms and stops the work by returning false.
///
/// # Errors
/// The first failure of any worker; committed shards stay, partial files are removed.
pub fn execute(
    plan: &Plan,
    shards: &[&PlannedShard],
    output: &JobDirectory,
    options: &Options,
    progress: &Progress,
    poll: &mut dyn FnMut() -> bool,
) -> Result<Vec<ShardFacts>> {
    let (resumed, pending): (Vec<&PlannedShard>, Vec<&PlannedShard>) =
        shards.iter().partition(|shard| output.has(&shard.file, shard.layout.size, &shard.digest));
    for shard in &resumed {
        progress.advance(shard.layout.size);
        progress.finish_shard();
    }
    if !pending.is_empty() {
        // Attempts of an earlier run, which may still be working at them, come to nothing from here on.
        output.take_over()?;
        let files: Vec<&str> = pending.iter().map(|shard| shard.file.as_str()).collect();
        output.begin_own_attempts(&files)?;
    }
    let mut written = make(plan, pending, output, options, progress, poll)?;
    written.extend(resumed.iter().map(|shard| ShardFacts::resumed(shard, output)));
    written.sort_by_key(|fact| shards.iter().position(|shard| shard.file == fact.file));
    Ok(written)
}

/// Makes shards and gives them to a sink.
///
/// # Errors
/// The first failure of any worker; partial files are removed.
pub(super) fn make(
    plan: &Plan,
    shards: Vec<&PlannedShard>,
    sink: &dyn Sink,
    options: &Options,
    progress: &Progress,
    poll: &mut dyn FnMut() -> bool,
) -> Result<Vec<ShardFacts>> {
    let (cloned, pending) = clone_equal(plan, shards, sink, options.write, progress)?;
    let (threads, tile_bytes) = options.fit(plan, &pending)?;
    let queue = Queue::new(plan, &pending, tile_bytes, &|_, _| true);
    let open: Vec<OpenShard> = (0..pending.len())
        .map(|number| OpenShard {
            tiles_left: AtomicUsize::new(queue.tiles_of(number)),
            state: Mutex::new(None),
            nonfinite_inputs: Mutex::default(),
            changes: Mutex::default(),
        })
        .collect();
    let facts = Mutex::new(cloned);
    let scales = Arc::default();
    workers::run(
        &queue,
        threads,
        progress,
        poll,
        || {
            let buffer = TileBuffer::new(tile_bytes)?;
            let filler = TileFiller::new(options.kernels, options.allow_nonfinite, &scales);
            Ok((buffer, filler))
        },
        |(buffer, filler), item, stopped| {
            let tile = match item {
                Item::Tile(tile) => tile,
                Item::Chunk(chunk) => {
                    return filler.observe(pending[chunk.tensor.shard], &chunk, stopped);
                }
            };
            let (shard, slot) = (pending[tile.shard], &open[tile.shard]);
            let file = slot.file(sink, shard, options.write)?;
            filler.fill(plan, shard, &tile, buffer.filled(tile.span.len()), stopped)?;
            slot.note(filler);
            file.write(buffer, tile.span.start)?;
            progress.advance(tile.span.len());
            // The release of every earlier tile is seen by the worker that takes the last one.
            if slot.tiles_left.fetch_sub(1, Ordering::AcqRel) == 1 {
                let fact = hand_over(plan, shard, slot, sink)?;
                facts.lock().unwrap_or_else(PoisonError::into_inner).push(fact);
                progress.finish_shard();
            }
            Ok(())
        },
    )?;
    Ok(facts.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Clones the shards that equal an input file, where the file system shares blocks. Returns what was done, and the
/// shards that are left.
fn clone_equal<'a>(
    plan: &Plan,
    shards: Vec<&'a PlannedShard>,
    sink: &dyn Sink,
    write: WriteMode,
    progress: &Progress,
) -> Result<(Vec<ShardFacts>, Vec<&'a PlannedShard>)> {
    if write != WriteMode::Auto {
        return Ok((Vec::new(), shards));
    }
    let (mut facts, mut left) = (Vec::new(), Vec::new());
    // One refusal is enough: the others lie in the same directories.
    let mut refused = false;
    for shard in shards {
        let started = Instant::now();
        let input = if refused { None } else { plan.equal_input(shard)? };
        let Some(input) = input else {
            left.push(shard);
            continue;
        };
        let size = shard.layout.size;
        let source = File::open(input.path()).map_err(|e| Error::read(input.path(), e))?;
        let Some(file) = sink.clone_of(shard, &source)? else {
            refused = true;
            left.push(shard);
            continue;
        };
        plan.check_inputs_unchanged(shard)?;
        sink.take(shard, &file, &Changes::new())?;
        progress.advance(size);
        progress.finish_shard();
        facts.push(ShardFacts {
            file: shard.file.clone(),
            bytes_written: size,
            seconds: started.elapsed().as_secs_f64(),
            write: "cloned",
            resumed: false,
            nonfinite_inputs: Vec::new(),
            changes: Changes::new(),
        });
    }
    Ok((facts, left))
}

/// Gives a fully written shard away, provided that its inputs held still meanwhile.
fn hand_over(
    plan: &Plan,
    shard: &PlannedShard,
    slot: &OpenShard,
    sink: &dyn Sink,
) -> Result<ShardFacts> {
    plan.check_inputs_unchanged(shard)?;
    let taken = slot.state.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((file, started)) = taken else {
        return Err(Error::Plan(format!("{} was handed over twice", shard.file)));
    };
    let changes = std::mem::take(&mut *slot.changes.lock().unwrap_or_else(PoisonError::into_inner));
    sink.take(shard, &file, &changes)?;
    Ok(ShardFacts {
        file: shard.file.clone(),
        bytes_written: shard.layout.size,
        seconds: started.elapsed().as_secs_f64(),
        write: if file.is_direct() { "direct" } else { "buffered" },
        resumed: false,
        nonfinite_inputs: slot.nonfinite_inputs(),
        changes,
    })
}
