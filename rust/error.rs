//! Every failure of the engine: one sentence that names the file, the tensor, and the way out.

use std::io;
use std::path::{Path, PathBuf};

/// Result of an engine call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. [`Error::stage`] tells whose fault it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path that the caller named is not there.
    #[error("{} does not exist; give a checkpoint directory or one .safetensors file", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// A directory without weights that can be read.
    #[error("{} holds no .safetensors weights: {problem}", path.display())]
    NoWeights {
        /// The directory.
        path: PathBuf,
        /// What it holds instead, and what to do.
        problem: String,
    },
    /// The operating system refused a read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The process has as many files open as it may.
    #[error(
        "cannot open {}: this process may have {limit} files open, and all are; raise the limit (ulimit -n), or use \
         fewer --threads", path.display()
    )]
    Descriptors {
        /// The file.
        path: PathBuf,
        /// Most descriptors of the process.
        limit: u64,
    },
    /// A header that breaks the format.
    #[error("{} is not a valid safetensors file: {problem}; save or download it again", path.display())]
    Header {
        /// The shard.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An input beyond what is read, so that nobody's file takes all memory or time.
    #[error("{} is not read: {problem}", path.display())]
    Limit {
        /// The file or directory.
        path: PathBuf,
        /// Which limit it exceeds.
        problem: String,
    },
    /// Header and file disagree about the file's length.
    #[error(
        "{} is {}: its header describes {expected} bytes, the file has {found}; save or download it again",
        path.display(), if found < expected { "truncated" } else { "longer than its header says" }
    )]
    Length {
        /// The shard.
        path: PathBuf,
        /// Bytes that the header describes, itself included.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// An index that cannot be used.
    #[error("the index {} is unusable: {problem}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor that a checkpoint does not have.
    #[error("{} has no tensor `{tensor}`", path.display())]
    NoTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// The plan is not what the schema says, or contradicts the inputs' headers.
    #[error("the plan is invalid: {0}")]
    Plan(String),
    /// An input is not the one that the plan was made for.
    #[error("{} has changed since the plan was made ({what}); make the plan again", path.display())]
    InputChanged {
        /// The shard.
        path: PathBuf,
        /// What differs: size, modification time or header.
        what: &'static str,
    },
    /// A merge that would put NaN or infinity where the inputs are finite.
    #[error(
        "tensor `{tensor}` of {file} became NaN or infinite at element {element} though its inputs are finite there: \
         the weights overflow {dtype}; lower them or choose a wider output dtype"
    )]
    NonFiniteResult {
        /// Output shard.
        file: String,
        /// Output tensor.
        tensor: String,
        /// Flat index of the first such element of the tile.
        element: usize,
        /// Output dtype.
        dtype: String,
    },
    /// Tensors that the method cannot merge, whatever is done.
    #[error("tensor `{tensor}` of {file} cannot be merged: {problem}")]
    Merge {
        /// Output shard.
        file: String,
        /// Output tensor.
        tensor: String,
        /// Why, and the way out.
        problem: String,
    },
    /// Inputs that hold NaN or infinity.
    #[error(
        "tensor `{tensor}` of {}{} holds NaN or infinity at element {element}; repair that checkpoint, or pass \
         --allow-nonfinite to let such values through",
        path.display(), if *adapted { ", or the adapter on it," } else { "" }
    )]
    NonFiniteInput {
        /// Input shard.
        path: PathBuf,
        /// Input tensor.
        tensor: String,
        /// Flat index of the first such element of the tile.
        element: usize,
        /// Whether an adapter changes the tensor and may be the cause.
        adapted: bool,
    },
    /// An option with a value that cannot work.
    #[error("{0}")]
    Option(String),
    /// The output directory cannot be used.
    #[error("the output {} {problem}", path.display())]
    Output {
        /// The directory.
        path: PathBuf,
        /// Why not, and the way out.
        problem: String,
    },
    /// No room for the output.
    #[error(
        "no space left for {}{}; free some space and continue with --resume, or choose another output",
        path.display(), if *needed == 0 { String::new() } else { format!(" ({needed} bytes)") }
    )]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// Its full size in bytes; zero where no data is written, as for a directory.
        needed: u64,
    },
    /// The operating system refused a write.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// What is on disk cannot be what the plan says.
    #[error("{} {problem}", path.display())]
    Verification {
        /// The output file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The caller asked to stop.
    #[error("interrupted; what is committed stays, continue with --resume")]
    Interrupted,
}

/// The stage of the data path that an error belongs to; the front end maps it to an exception and an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Inputs.
    Checkpoint,
    /// The plan or an option.
    Plan,
    /// The output directory or disk.
    Output,
    /// Comparison of an output with its plan.
    Verification,
    /// A request to stop.
    Interrupted,
}

impl Error {
    /// The stage that failed.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match self {
            Self::NotFound { .. }
            | Self::NoWeights { .. }
            | Self::Read { .. }
            | Self::Descriptors { .. }
            | Self::Header { .. }
            | Self::Limit { .. }
            | Self::Length { .. }
            | Self::Index { .. }
            | Self::NoTensor { .. }
            | Self::NonFiniteInput { .. } => Stage::Checkpoint,
            Self::Plan(_)
            | Self::Option(_)
            | Self::InputChanged { .. }
            | Self::Merge { .. }
            | Self::NonFiniteResult { .. } => Stage::Plan,
            Self::Output { .. } | Self::DiskFull { .. } | Self::Write { .. } => Stage::Output,
            Self::Verification { .. } => Stage::Verification,
            Self::Interrupted => Stage::Interrupted,
        }
    }

    /// Whether something was not there, or no longer.
    pub(crate) fn is_not_found(&self) -> bool {
        match self {
            Self::Read { source, .. } | Self::Write { source, .. } => {
                source.kind() == io::ErrorKind::NotFound
            }
            _ => false,
        }
    }

    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match descriptor_limit(&source) {
            Some(limit) => Self::Descriptors { path, limit },
            None => Self::Read { path, source },
        }
    }

    pub(crate) fn header(path: &Path, problem: impl Into<String>) -> Self {
        Self::Header { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn index(path: &Path, problem: impl Into<String>) -> Self {
        Self::Index { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn output(path: &Path, problem: impl Into<String>) -> Self {
        Self::Output { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match descriptor_limit(&source) {
            Some(limit) => Self::Descriptors { path, limit },
            None => Self::Write { path, source },
        }
    }
}

/// Most descriptors of this process, if that is what an error is about.
fn descriptor_limit(error: &io::Error) -> Option<u64> {
    use rustix::process::{Resource, getrlimit};
    (error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()))
        .then(|| getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
}
