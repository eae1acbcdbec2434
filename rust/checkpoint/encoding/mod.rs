//! Quantised tensors: which stored tensors make up one, and how its numbers are found in their bytes.
//!
//! Names, dtypes and shapes of the tensors themselves decide, never a configuration: one checkpoint mixes formats, and
//! a dequantised one often keeps its old configuration. What is found is a description; kernels decode and encode.

mod blocks;
mod claim;
mod description;
mod fp4;
mod fp8;
mod int4;
mod listing;
mod mxfp4;
mod nvfp4;
mod parts;
mod values;

pub use description::{Blocks, Encoding, Format, Global, Scales};
pub(super) use listing::Listing;
pub use listing::LogicalTensor;
pub(super) use values::{check_stated_shape, global_scale};
