//! Execution of plans: operands are loaded and changed by adapters (`operand`), methods
//! blend sub-tiles ([`linear`]), tiles are filled from mapped inputs ([`tile`]), workers
//! stream them to disk ([`stream`]) or compare them with what is there ([`verify`]).

pub mod linear;
mod operand;
pub mod stream;
pub mod tile;
pub mod verify;
mod workers;

use crate::kernels::Kernels;
use serde_json::{Map, Value};
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// How operands become one tensor.
pub trait Method: Debug + Send + Sync {
    /// Blends equally long slices of the operands into `out`, element by element: the result for an element may
    /// depend on nothing but the operands at that element, so that any cut into tiles gives the same bits.
    fn blend(&self, kernels: &Kernels, operands: &[&[f32]], out: &mut [f32]);
}

/// The only operand, unchanged: what a copy to another dtype does.
#[derive(Debug)]
pub(crate) struct Convert;

impl Method for Convert {
    fn blend(&self, _: &Kernels, operands: &[&[f32]], out: &mut [f32]) {
        out.copy_from_slice(operands[0]);
    }
}

/// Makes a method from its parameters and the operands' weights, or says what is wrong with them.
type Build = fn(&Map<String, Value>, &[f64]) -> Result<Box<dyn Method>, String>;

/// Every method, by the name that plans use.
pub const METHODS: &[(&str, Build)] = &[("linear", linear::build)];

/// The method of this name with these parameters and weights.
///
/// # Errors
/// A sentence if the name is unknown or the parameters do not fit.
pub fn method(
    name: &str,
    parameters: &Map<String, Value>,
    weights: &[f64],
) -> Result<Box<dyn Method>, String> {
    let Some((_, build)) = METHODS.iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = METHODS.iter().map(|(known, _)| *known).collect();
        return Err(format!("there is no merge method `{name}`; known are {}", known.join(", ")));
    };
    build(parameters, weights)
}

/// Counters that workers advance and anyone may read, and the flag that stops them.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicUsize,
    shards: AtomicUsize,
    cancelled: AtomicBool,
}

impl Progress {
    /// Output bytes finished so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Output files finished so far.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.shards.load(Ordering::Relaxed)
    }

    /// Asks the workers to stop after the tile in hand.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether someone asked.
    #[must_use]
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn advance(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn finish_shard(&self) {
        self.shards.fetch_add(1, Ordering::Relaxed);
    }
}
