//! Merge methods: how operands become one tensor. One file each; the table [`METHODS`] lists them.
//!
//! A method sees its operands in slices, as f32. What it needs to know of whole tensors first (a norm, a quantile) it
//! gathers in *observe* passes; then it *blends*. The result for an element depends on that knowledge, the operands at
//! that element and the element's index alone (on the whole row for methods that say so), so that any cut into tiles,
//! by any number of threads, gives the same bits.

mod breadcrumbs;
mod counts;
mod dare;
mod della;
mod gram;
mod karcher;
mod linear;
mod masked;
mod model_stock;
mod multislerp;
mod nearswap;
mod nuslerp;
mod parameters;
mod passthrough;
mod quantile;
mod random;
mod sce;
mod slerp;
mod specification;
mod table;
mod task_arithmetic;
mod task_vectors;
mod ties;
mod vote;

pub use counts::Counts;
pub use masked::Masked;
pub use parameters::{Default, Kind, Parameter};
pub use random::uniforms;
pub use specification::{Base, Description, Flag, Scope, Specification};
pub use table::{METHODS, Prepared, build, check, find};

use crate::kernels::Kernels;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

/// Equally long parts of all operands.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    /// The operands.
    pub operands: &'a [&'a [f32]],
    /// The base, for methods that have one.
    pub base: Option<&'a [f32]>,
    /// Index within the tensor of the first element.
    pub first: usize,
}

impl Slice<'_> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.operands.first().map_or(0, |operand| operand.len())
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What an observe pass adds up.
#[derive(Debug)]
pub struct Tally<'a, 'c> {
    /// Sums of the chunk in hand; chunks are added up in their order.
    pub sums: &'a mut [f64],
    /// Counts of the whole tensor.
    pub counts: &'a mut Counts<'c>,
}

/// How many numbers a pass adds up, and how much of the tensor it has to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Length of [`Tally::sums`].
    pub sums: usize,
    /// Length of [`Tally::counts`].
    pub counts: usize,
    /// Only every n-th sub-tile is needed; 1 for all of them.
    pub stride: usize,
}

/// What passes have taught a method; of a type that only the method knows.
#[derive(Debug, Clone)]
pub struct Facts(Arc<dyn Any + Send + Sync>);

impl Facts {
    fn of<F: Send + Sync + 'static>(facts: F) -> Self {
        Self(Arc::new(facts))
    }

    fn get<F: 'static>(&self) -> Result<&F, String> {
        self.0.downcast_ref().ok_or_else(|| "it was given the facts of another method".to_owned())
    }
}

/// What a pass has taught.
#[derive(Debug, Clone)]
pub struct Finding<F = Facts> {
    /// For the next pass and for the blend.
    pub facts: F,
    /// Whether the remaining passes may be left out.
    pub settled: bool,
}

/// What is wrong where sums over whole tensors, or rows, are not finite; sums of f32 in f64 do not overflow.
pub(crate) const NONFINITE_SUMS: &str = "its inputs hold NaN or infinity, or numbers so large that their \
                                         differences do; repair those checkpoints, or leave it out";

/// How operands become one tensor, as a method's file writes it. Made for one tensor, see [`Prepared::method`].
pub(crate) trait TypedMethod: Debug + Send + Sync {
    /// What it learns of whole tensors.
    type Facts: Send + Sync + 'static;

    /// Observe passes at most.
    fn passes(&self) -> usize {
        0
    }

    /// Length of the rows that must be given whole to `blend`, and to `observe`; `None` if any slice will do.
    fn row(&self) -> Option<usize> {
        None
    }

    /// Whether it leaves elements of operands out, so that its result may be finite where an operand is not.
    fn leaves_out(&self) -> bool {
        false
    }

    /// What it knows before the first pass.
    fn start(&self) -> Self::Facts;

    /// What a pass adds up, given what earlier ones found.
    fn request(&self, _facts: &Self::Facts) -> Request {
        Request { sums: 0, counts: 0, stride: 1 }
    }

    /// Adds a slice to the tally.
    fn observe(
        &self,
        _kernels: &Kernels,
        _facts: &Self::Facts,
        _slice: &Slice<'_>,
        _tally: &mut Tally<'_, '_>,
    ) {
    }

    /// Draws the conclusion of a pass from the sums over the whole tensor.
    ///
    /// # Errors
    /// A sentence if the tensors cannot be merged this way.
    fn conclude(
        &self,
        _facts: &Self::Facts,
        _sums: &[f64],
        _counts: &[u32],
    ) -> Result<Finding<Self::Facts>, String> {
        Ok(Finding { facts: self.start(), settled: true })
    }

    /// Blends a slice into `out`, which is as long.
    ///
    /// # Errors
    /// A sentence if the slice's rows cannot be merged this way.
    fn blend(
        &self,
        kernels: &Kernels,
        facts: &Self::Facts,
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String>;
}

/// A method of any type, as the engine drives it: `passes` times it is asked what to add up, shown every slice and asked
/// for its conclusion; then it blends.
pub trait Method: Debug + Send + Sync {
    /// Observe passes at most.
    fn passes(&self) -> usize;

    /// Length of the rows that must be given whole to `blend`, and to `observe`; `None` if any slice will do.
    fn row(&self) -> Option<usize>;

    /// Whether it leaves elements of operands out, so that its result may be finite where an operand is not.
    fn leaves_out(&self) -> bool;

    /// The facts of the first pass.
    fn start(&self) -> Facts;

    /// What a pass adds up, given what earlier ones found.
    fn request(&self, facts: &Facts) -> Request;

    /// Adds a slice to the tally.
    fn observe(
        &self,
        kernels: &Kernels,
        facts: &Facts,
        slice: &Slice<'_>,
        tally: &mut Tally<'_, '_>,
    );

    /// Draws the conclusion of a pass from the sums over the whole tensor.
    ///
    /// # Errors
    /// A sentence if the tensors cannot be merged this way.
    fn conclude(&self, facts: &Facts, sums: &[f64], counts: &[u32]) -> Result<Finding, String>;

    /// Blends a slice into `out`, which is as long.
    ///
    /// # Errors
    /// A sentence if the slice's rows cannot be merged this way.
    fn blend(
        &self,
        kernels: &Kernels,
        facts: &Facts,
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String>;
}

impl<M: TypedMethod> Method for M {
    fn passes(&self) -> usize {
        TypedMethod::passes(self)
    }

    fn row(&self) -> Option<usize> {
        TypedMethod::row(self)
    }

    fn leaves_out(&self) -> bool {
        TypedMethod::leaves_out(self)
    }

    fn start(&self) -> Facts {
        Facts::of(TypedMethod::start(self))
    }

    fn request(&self, facts: &Facts) -> Request {
        match facts.get() {
            Ok(facts) => TypedMethod::request(self, facts),
            // Foreign facts are reported by `conclude` and `blend`.
            Err(_) => Request { sums: 0, counts: 0, stride: 1 },
        }
    }

    fn observe(
        &self,
        kernels: &Kernels,
        facts: &Facts,
        slice: &Slice<'_>,
        tally: &mut Tally<'_, '_>,
    ) {
        if let Ok(facts) = facts.get() {
            TypedMethod::observe(self, kernels, facts, slice, tally);
        }
    }

    fn conclude(&self, facts: &Facts, sums: &[f64], counts: &[u32]) -> Result<Finding, String> {
        let Finding { facts, settled } = TypedMethod::conclude(self, facts.get()?, sums, counts)?;
        Ok(Finding { facts: Facts::of(facts), settled })
    }

    fn blend(
        &self,
        kernels: &Kernels,
        facts: &Facts,
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        TypedMethod::blend(self, kernels, facts.get()?, slice, out)
    }
}

/// The only operand, unchanged: what a copy to another dtype does.
#[derive(Debug)]
pub(crate) struct Convert;

impl TypedMethod for Convert {
    type Facts = ();

    fn start(&self) {}

    fn blend(
        &self,
        _: &Kernels,
        (): &(),
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        out.copy_from_slice(slice.operands[0]);
        Ok(())
    }
}
