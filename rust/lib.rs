//! The engine of safemerge-fast: an interpreter of merge plans.
//!
//! A plan says, as plain data, what every tensor of an output checkpoint is made of. The engine executes that data
//! and nothing else; it knows neither what a language model is nor why a tensor is merged. Its stages, in order:
//!
//! 1. [`checkpoint`]: headers are read and validated, shards are opened for reading.
//! 2. [`kernels`] convert between dtypes and blend, with one scalar twin for every SIMD version.
//! 3. [`methods`]: how operands become one tensor, what their parameters are, and what they must know of whole tensors.
//! 4. [`plan`]: the JSON is parsed, and everything it claims is checked against headers and methods.
//! 5. [`writer`]: an output is made in a job directory, shard by shard, and gets its name when it is whole.
//! 6. [`merge`]: workers take tiles (aligned spans of an output file), fill them and write them.
//! 7. [`difference`]: blocks of matrices and of their differences, for an analysis before there is a plan.
//! 8. [`sketch`]: products of such differences with random columns, fused with their reading.
//!
//! `bindings`, behind the feature `python`, is the only user of PyO3.

#[cfg(not(all(unix, target_pointer_width = "64", target_endian = "little")))]
compile_error!(
    "safemerge-fast needs a 64-bit little-endian Unix: it maps whole shards of tens of gigabytes"
);

pub mod error;

pub mod code;
pub mod dtype;

pub mod checkpoint;
pub mod kernels;
pub mod methods;
pub mod plan;
pub mod writer;

pub mod merge;

pub mod difference;
pub mod sketch;

#[cfg(feature = "python")]
mod bindings;

pub use error::{Error, Result};
