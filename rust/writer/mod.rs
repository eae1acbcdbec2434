//! Output that is whole or absent: made in a job directory, which gets the output's name when all is there and synced.
//!
//! A job directory lies beside its output. It holds a lock, the job's record, a journal of the shards that went through write,
//! sync and rename, files of the caller's, and the output in the making. A merge that was killed at any instruction leaves
//! under the output's name what stood there, or the whole new output, or nothing; and it can go on where it stopped.
//! Where the output cannot be renamed (a mounted volume), the job directory lies inside it and files are moved up one by one.

mod attempt;
mod decision;
mod disk;
mod fault;
mod inputs;
mod job;
mod journal;
mod lock;
mod mark;
mod name;
mod opening;
mod placement;
mod publication;
mod record;
mod shards;
mod tile_file;
mod workplace;

pub use attempt::{AttemptId, Commit, Prepared};
pub use job::{JobDirectory, WrittenFile};
pub use mark::REPORT;
pub use placement::Placement;
pub use record::Overwrite;
pub use tile_file::{TileBuffer, TileFile, WriteMode};
pub use workplace::Workplace;

/// The names of the fail points; none without the feature `faults`.
#[must_use]
pub fn fault_points() -> &'static [&'static str] {
    #[cfg(feature = "faults")]
    {
        fault::POINTS
    }
    #[cfg(not(feature = "faults"))]
    &[]
}
