//! Verification: the plan is evaluated again and compared with the bytes on disk.

use super::Progress;
use super::queue::{Item, Queue};
use super::tile::TileFiller;
use super::work::DEFAULT_TILE;
use super::workers;
use crate::checkpoint::MappedFile;
use crate::kernels::Kernels;
use crate::plan::{Plan, PlannedShard};
use crate::{Error, Result};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What to verify.
#[derive(Debug, Clone)]
pub struct Options {
    /// Worker threads.
    pub threads: usize,
    /// Share of the tiles to compare, above 0 and at most 1.
    pub sample: f64,
    /// Decides which tiles a sample takes.
    pub seed: u64,
    /// The kernels.
    pub kernels: Kernels,
}

/// The first difference of a tile that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Output file.
    pub file: String,
    /// The tensor whose byte differs; `None` for the header.
    pub tensor: Option<String>,
    /// Offset of that byte in the file.
    pub offset: usize,
}

/// What a verification found.
#[derive(Debug, Clone, Default)]
pub struct Verification {
    /// Bytes that were compared.
    pub bytes_checked: usize,
    /// Bytes of all the files.
    pub bytes_total: usize,
    /// Differences, at most one for each tile, by file and offset.
    pub mismatches: Vec<Mismatch>,
}

/// Evaluates shards again and compares them with the files in `directory`.
///
/// # Errors
/// [`Error::Verification`] if a file is missing or has another size, and whatever reading the inputs raises. Bytes that
/// differ are not an error here but listed in the result.
pub fn verify(
    plan: &Plan,
    shards: &[&PlannedShard],
    directory: &Path,
    options: &Options,
    progress: &Progress,
    poll: &mut dyn FnMut() -> bool,
) -> Result<Verification> {
    if !(options.sample > 0.0 && options.sample <= 1.0) {
        return Err(Error::Option(format!(
            "the sample is {}, it must lie above 0 and at most at 1",
            options.sample
        )));
    }
    for shard in shards {
        check_size(directory, shard)?;
    }
    let wanted = |shard: usize, start: usize| sampled(options, &shards[shard].file, start);
    let queue = Queue::new(plan, shards, DEFAULT_TILE, &wanted);
    let open: Vec<OpenOutput> = (0..shards.len())
        .map(|number| OpenOutput {
            tiles_left: AtomicUsize::new(queue.tiles_of(number)),
            file: Mutex::new(None),
        })
        .collect();
    let scales = Arc::default();
    let states = workers::run(
        &queue,
        options.threads.max(1),
        progress,
        poll,
        // NaN in an output is the merge's business; here only equality counts.
        || {
            Ok((
                vec![0; DEFAULT_TILE],
                TileFiller::new(options.kernels, true, &scales),
                Verification::default(),
            ))
        },
        |(buffer, filler, found), item, stopped| {
            let tile = match item {
                Item::Tile(tile) => tile,
                Item::Chunk(chunk) => {
                    return filler.observe(shards[chunk.tensor.shard], &chunk, stopped);
                }
            };
            let (shard, slot) = (shards[tile.shard], &open[tile.shard]);
            if tile.wanted {
                let file = slot.file(directory, shard)?;
                let expected = &mut buffer[..tile.span.len()];
                filler.fill(plan, shard, &tile, expected, stopped)?;
                let stored = &file.bytes()[tile.span.clone()];
                if expected != stored {
                    let differs = expected.iter().zip(stored).position(|(a, b)| a != b);
                    found.mismatches.push(mismatch(shard, tile.span.start + differs.unwrap_or(0)));
                }
                found.bytes_checked += tile.span.len();
                file.release(tile.span.clone());
            }
            if slot.tiles_left.fetch_sub(1, Ordering::AcqRel) == 1 {
                slot.close();
            }
            progress.advance(tile.span.len());
            Ok(())
        },
    )?;
    let mut total = Verification {
        bytes_total: shards.iter().map(|shard| shard.layout.size).sum(),
        ..Verification::default()
    };
    for (_, _, found) in states {
        total.bytes_checked += found.bytes_checked;
        total.mismatches.extend(found.mismatches);
    }
    total.mismatches.sort_by(|a, b| (&a.file, a.offset).cmp(&(&b.file, b.offset)));
    Ok(total)
}

/// An output file that is compared: mapped from its first tile to its last.
struct OpenOutput {
    tiles_left: AtomicUsize,
    file: Mutex<Option<Arc<MappedFile>>>,
}

impl OpenOutput {
    fn file(&self, directory: &Path, shard: &PlannedShard) -> Result<Arc<MappedFile>> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file.as_ref() {
            return Ok(Arc::clone(file));
        }
        let size = check_size(directory, shard)?;
        let opened = Arc::new(MappedFile::open(&directory.join(&shard.file), size)?);
        *file = Some(Arc::clone(&opened));
        Ok(opened)
    }

    fn close(&self) {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// The size of an output file, which must be the one that is planned.
fn check_size(directory: &Path, shard: &PlannedShard) -> Result<u64> {
    let path = directory.join(&shard.file);
    let problem = |problem: String| Error::Verification { path: path.clone(), problem };
    let metadata =
        std::fs::metadata(&path).map_err(|e| problem(format!("cannot be verified: {e}")))?;
    if metadata.len() != shard.layout.size as u64 {
        return Err(problem(format!(
            "has {} bytes, the plan says {}; merge again with --overwrite",
            metadata.len(),
            shard.layout.size
        )));
    }
    Ok(metadata.len())
}

fn mismatch(shard: &PlannedShard, offset: usize) -> Mismatch {
    let tensor = shard.tensor_at(offset).map(|number| shard.name(number).to_owned());
    Mismatch { file: shard.file.clone(), tensor, offset }
}

/// Whether a sample takes the tile: by a hash, so that the choice depends on no order. The first tile, which holds the
/// header, is always taken.
fn sampled(options: &Options, file: &str, start: usize) -> bool {
    if options.sample >= 1.0 || start == 0 {
        return true;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&options.seed.to_le_bytes());
    hasher.update(&start.to_le_bytes());
    hasher.update(file.as_bytes());
    let mut word = [0; 4];
    word.copy_from_slice(&hasher.finalize().as_bytes()[..4]);
    f64::from(u32::from_le_bytes(word)) < options.sample * f64::from(u32::MAX)
}
