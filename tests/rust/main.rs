//! Integration tests of the engine; the modules mirror `rust/`.

mod adapter;
mod bands;
mod checkpoint;
mod codes;
mod difference;
mod directories;

mod encodings;
mod errors;
mod fixtures;
mod headers;
mod kernels;
mod merge;
mod methods;
mod plan;
mod quantised;
#[cfg(feature = "remote")]
mod remote;
mod requantising;
mod sketch;
mod views;
mod writer;
