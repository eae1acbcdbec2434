//! Output that is either absent, partial under a hidden name, or complete and durable.
//!
//! Every file is written as `.<name>.partial` beside its target, synced, renamed, and made durable by syncing the
//! directory. A journal beside them lists the shards that went through all of that, so that a merge that was killed at
//! any instruction can go on where it stopped.

mod commit;
mod journal;
mod tile_file;

pub use commit::Output;
pub use tile_file::{TileBuffer, TileFile, WriteMode};

/// Name of the journal in an output directory; its presence means that the output is unfinished.
pub const JOURNAL: &str = ".safemerge-fast.journal";
