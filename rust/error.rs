//! Every failure of the engine: one sentence that names the file, the tensor, and the way out.

use std::ffi::OsStr;
use std::fmt::Write;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Result of an engine call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Characters of a name or path that a message quotes; of a longer one it shows both ends.
const LONGEST_NAME: usize = 300;
/// Characters of a sentence that quotes several.
const LONGEST_SENTENCE: usize = 2000;

/// A name or path as a message may quote it: on one line, without a character that a terminal would obey or that makes
/// text look like other text, and not overlong. Names come from files that anybody may have made.
#[must_use]
pub fn printable(name: &(impl AsRef<OsStr> + ?Sized)) -> String {
    let mut text = String::new();
    for chunk in name.as_ref().as_bytes().utf8_chunks() {
        escape(chunk.valid(), &mut text);
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    shorten(text, LONGEST_NAME)
}

/// A sentence, some of which may be quoted from files, on one line.
fn sentence(text: &str) -> String {
    let mut escaped = String::new();
    escape(text, &mut escaped);
    shorten(escaped, LONGEST_SENTENCE)
}

/// Appends a text whose control and formatting characters are written as escapes.
fn escape(text: &str, out: &mut String) {
    for character in text.chars() {
        let code = u32::from(character);
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' => {
                let _ = write!(out, "\\x{code:02x}");
            }
            // Separators of lines, direction marks, what has no width.
            '\u{ad}'
            | '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' => {
                let _ = write!(out, "\\u{{{code:x}}}");
            }
            _ => out.push(character),
        }
    }
}

/// The text, or if it has more than so many characters, its ends.
fn shorten(text: String, longest: usize) -> String {
    let count = text.chars().count();
    if count <= longest {
        return text;
    }
    let end = longest / 3;
    let start: String = text.chars().take(longest - end).collect();
    let rest: String = text.chars().skip(count - end).collect();
    format!("{start}…{rest}")
}

/// What went wrong. [`Error::stage`] tells whose fault it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path that the caller named is not there.
    #[error(
        "{} does not exist; give a checkpoint directory or one .safetensors file",
        printable(path)
    )]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// A directory without weights that can be read.
    #[error(
        "{} holds no .safetensors weights: {problem}",
        printable(path), problem = sentence(problem)
    )]
    NoWeights {
        /// The directory.
        path: PathBuf,
        /// What it holds instead, and what to do.
        problem: String,
    },
    /// A store or server does not give an object.
    #[error("cannot read {}: {problem}", printable(path), problem = sentence(problem))]
    Remote {
        /// Its address.
        path: PathBuf,
        /// What was said, and what to do.
        problem: String,
        /// Whether there is no such object.
        missing: bool,
    },
    /// The operating system refused a read.
    #[error("cannot read {}: {source}", printable(path))]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The process has as many files open as it may.
    #[error(
        "cannot open {}: this process may have {limit} files open, and all are; raise the limit (ulimit -n), or use \
         fewer --threads",
        printable(path)
    )]
    Descriptors {
        /// The file.
        path: PathBuf,
        /// Most descriptors of the process.
        limit: u64,
    },
    /// A header that breaks the format.
    #[error(
        "{} is not a valid safetensors file: {problem}; save or download it again",
        printable(path), problem = sentence(problem)
    )]
    Header {
        /// The shard.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An input that is not what it should be, or beyond the limits that keep it from taking all memory or time.
    #[error("{} cannot be used: {problem}", printable(path), problem = sentence(problem))]
    Unusable {
        /// The file or directory.
        path: PathBuf,
        /// Why not, and the way out.
        problem: String,
    },
    /// Header and file disagree about the file's length.
    #[error(
        "{} is {}: its header describes {expected} bytes, the file has {found}; save or download it again",
        printable(path), if found < expected { "truncated" } else { "longer than its header says" }
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
    #[error("the index {} is unusable: {problem}", printable(path), problem = sentence(problem))]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor that a checkpoint does not have.
    #[error("{} has no tensor `{tensor}`", printable(path), tensor = printable(tensor))]
    NoTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// The plan is not what the schema says, or contradicts the inputs' headers.
    #[error("the plan is invalid: {}", sentence(.0))]
    Plan(String),
    /// An input is not the one that the plan was made for.
    #[error(
        "{} has changed since the plan was made ({what}); make the plan again",
        printable(path)
    )]
    InputChanged {
        /// The shard.
        path: PathBuf,
        /// What differs: size, modification time or header.
        what: &'static str,
    },
    /// A merge that would put NaN or infinity where the inputs are finite.
    #[error(
        "tensor `{tensor}` of {file} became NaN or infinite at element {element} though its inputs are finite there: \
         the weights overflow {dtype}; lower them or choose a wider output dtype",
        tensor = printable(tensor), file = printable(file)
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
    #[error(
        "tensor `{tensor}` of {file} cannot be merged: {problem}",
        problem = sentence(problem), tensor = printable(tensor), file = printable(file)
    )]
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
        printable(path), if *adapted { ", or the adapter on it," } else { "" },
        tensor = printable(tensor)
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
    #[error("{}", sentence(.0))]
    Option(String),
    /// The output directory cannot be used.
    #[error("the output {} {problem}", printable(path), problem = sentence(problem))]
    Output {
        /// The directory.
        path: PathBuf,
        /// Why not, and the way out.
        problem: String,
    },
    /// No room for the output.
    #[error(
        "no space left for {}{}; free some space and continue with --resume, or choose another output",
        printable(path), if *needed == 0 { String::new() } else { format!(" ({needed} bytes)") }
    )]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// Its full size in bytes; zero where no data is written, as for a directory.
        needed: u64,
    },
    /// The operating system refused a write.
    #[error("cannot write {}: {source}", printable(path))]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// What is on disk cannot be what the plan says.
    #[error("{} {problem}", printable(path), problem = sentence(problem))]
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
            | Self::Remote { .. }
            | Self::Read { .. }
            | Self::Descriptors { .. }
            | Self::Header { .. }
            | Self::Unusable { .. }
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
            Self::Remote { missing, .. } => *missing,
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

    #[cfg(feature = "remote")]
    pub(crate) fn remote(path: &Path, problem: impl Into<String>) -> Self {
        Self::Remote { path: path.to_owned(), problem: problem.into(), missing: false }
    }

    pub(crate) fn header(path: &Path, problem: impl Into<String>) -> Self {
        Self::Header { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn unusable(path: &Path, problem: impl Into<String>) -> Self {
        Self::Unusable { path: path.to_owned(), problem: problem.into() }
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
