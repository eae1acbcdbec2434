//! Fail points: named places of the output protocol where tests make a system call fail or the process die.
//!
//! With the feature `faults`, `FAILPOINTS="shard.sync=1*return(eio)"` makes that point fail once. Actions: `return(kill)` dies by
//! SIGKILL; `return(enospc)`, `edquot`, `efbig`, `eio`, `eacces`, `einval` and `eintr` are the errors of these names;
//! `return(short)` halves what a write is given. Without the feature nothing of this is compiled.

use std::io;

macro_rules! points {
    ($($point:ident $name:literal)*) => {
        /// A place that may fail. One that nothing passes is a warning of the compiler's.
        #[derive(Debug, Clone, Copy)]
        pub(super) enum Point { $($point,)* }

        /// The names of all points.
        #[cfg(feature = "faults")]
        pub(super) const POINTS: &[&str] = &[$($name,)*];

        #[cfg(feature = "faults")]
        impl Point {
            fn name(self) -> &'static str {
                match self { $(Self::$point => $name,)* }
            }
        }
    };
}

points! {
    // Opening.
    ParentMake "parent.make"
    ParentSync "parent.sync"
    JobMake "job.make"
    LockOpen "lock.open"
    LockTake "lock.take"
    OutputMake "output.make"
    RecordCreate "record.create"
    RecordWrite "record.write"
    RecordSync "record.sync"
    RecordRename "record.rename"
    RecordDirectorySync "record.directory-sync"
    JournalOpen "journal.open"
    JournalDirectorySync "journal.directory-sync"
    SweepFile "sweep.file"
    SweepDirectory "sweep.directory"
    // What a killed publication left.
    PutBack "settle.put-back"
    PutBackSync "settle.sync"
    // Attempts at shards.
    AttemptsMake "attempts.make"
    AttemptsGiveUp "attempts.give-up"
    AttemptsRemove "attempts.remove"
    AttemptAbort "attempt.abort"
    AttemptWrite "attempt.write"
    AttemptSync "attempt.sync"
    // Shards.
    ShardCreate "shard.create"
    ShardAllocate "shard.allocate"
    ShardClone "shard.clone"
    ShardWrite "shard.write"
    ShardTruncate "shard.truncate"
    ShardSync "shard.sync"
    ShardRename "shard.rename"
    ShardDirectorySync "shard.directory-sync"
    RevokeWrite "revoke.write"
    RevokeSync "revoke.sync"
    CommitWrite "commit.write"
    CommitSync "commit.sync"
    // Small files of the output, and files of the job.
    FileDirectory "file.directory"
    FileCreate "file.create"
    FileWrite "file.write"
    FileSync "file.sync"
    FileRename "file.rename"
    FileDirectorySync "file.directory-sync"
    JobFileOpen "job-file.open"
    JobFileWrite "job-file.write"
    JobFileRemove "job-file.remove"
    // The old output goes before the new one is there.
    DoomRename "doom.rename"
    DoomSync "doom.sync"
    DoomFile "doom.file"
    DoomDirectory "doom.directory"
    // Publication by rename.
    PublishSync "publish.sync"
    PublishRename "publish.rename"
    PublishExchange "publish.exchange"
    PublishSetAside "publish.set-aside"
    PublishMoveIn "publish.move-in"
    PublishParentSync "publish.parent-sync"
    PublishJobSync "publish.job-sync"
    OldFile "old.file"
    OldDirectory "old.directory"
    // Publication file by file.
    MovesCreate "moves.create"
    MovesWrite "moves.write"
    MovesSync "moves.sync"
    MovesRename "moves.rename"
    MovesDirectorySync "moves.directory-sync"
    MoveRemove "move.remove"
    MoveDirectory "move.directory"
    MoveRename "move.rename"
    MoveSync "move.sync"
    // The job directory goes.
    DiscardFile "discard.file"
    DiscardDirectory "discard.directory"
    DiscardLock "discard.lock"
    DiscardJob "discard.job"
}

/// What the tests want to happen here.
#[cfg(feature = "faults")]
fn action(point: Point) -> Option<String> {
    fail::fail_point!(point.name(), |argument| argument);
    None
}

/// Dies, or makes the error of this name.
#[cfg(feature = "faults")]
fn raise(name: &str) -> io::Error {
    use rustix::io::Errno;
    use rustix::process::{Signal, getpid, kill_process};
    let errno = match name {
        "kill" => loop {
            // Nothing survives it, but it may take a moment.
            let _ = kill_process(getpid(), Signal::KILL);
        },
        "enospc" => Errno::NOSPC,
        "edquot" => Errno::DQUOT,
        "efbig" => Errno::FBIG,
        "eacces" => Errno::ACCESS,
        "einval" => Errno::INVAL,
        "eintr" => Errno::INTR,
        _ => Errno::IO,
    };
    errno.into()
}

/// Passes a point.
///
/// # Errors
/// The one that a test asked for.
#[cfg(feature = "faults")]
pub(super) fn at(point: Point) -> io::Result<()> {
    match action(point).as_deref() {
        None | Some("short") => Ok(()),
        Some(name) => Err(raise(name)),
    }
}

/// Passes a point in front of a write of `length` bytes; returns how many of them to write, a multiple of `unit` if not
/// all.
///
/// # Errors
/// The one that a test asked for.
#[cfg(feature = "faults")]
pub(super) fn room(point: Point, length: usize, unit: usize) -> io::Result<usize> {
    match action(point).as_deref() {
        None => Ok(length),
        Some("short") => Ok((length / 2).next_multiple_of(unit).clamp(1, length)),
        Some(name) => Err(raise(name)),
    }
}

#[cfg(not(feature = "faults"))]
#[inline]
pub(super) fn at(_: Point) -> io::Result<()> {
    Ok(())
}

#[cfg(not(feature = "faults"))]
#[inline]
pub(super) fn room(_: Point, length: usize, _: usize) -> io::Result<usize> {
    Ok(length)
}
