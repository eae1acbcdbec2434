//! A tensor that workers have entered: its inputs, its method, and what they share of it. It is dropped, and its files are
//! let go, with the last piece of work on it.

use super::loader::Shared;
use super::observation::Observation;
use crate::Result;
use crate::plan::{Computation, Operation, OutputTensor, Plan, PlannedShard};

/// One output tensor in work.
#[derive(Debug)]
pub(super) struct Entered {
    /// Number of its shard among those in work.
    pub shard: usize,
    /// What it is made of.
    pub output: OutputTensor,
    /// What its operands' loaders share.
    pub shared: Shared,
    /// What its method learns of it, if that observes.
    pub observation: Option<Observation>,
}

impl Entered {
    /// Enters a tensor of a shard, which is number `shard` of those in work.
    ///
    /// # Errors
    /// Those of [`Plan::tensor`].
    pub(super) fn new(
        plan: &Plan,
        planned: &PlannedShard,
        shard: usize,
        number: usize,
    ) -> Result<Self> {
        let output = plan.tensor(planned, number)?;
        let (shared, observation) = match &output.operation {
            Operation::Copy(_) => (Shared::of(&[]), None),
            Operation::Compute(computation) => {
                let elements = output.range.len() / computation.dtype.size();
                let observation = Observation::of(computation, elements);
                (Shared::of(&computation.operands), observation)
            }
        };
        Ok(Self { shard, output, shared, observation })
    }

    /// What it is computed by, unless it is copied.
    pub(super) fn computation(&self) -> Option<&Computation> {
        match &self.output.operation {
            Operation::Copy(_) => None,
            Operation::Compute(computation) => Some(computation),
        }
    }

    /// Number of its elements, if it is computed.
    pub(super) fn elements(&self) -> usize {
        self.computation().map_or(0, |computed| self.output.range.len() / computed.dtype.size())
    }
}
