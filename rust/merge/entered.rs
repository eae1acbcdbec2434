//! A tensor that workers have entered: its inputs, its method, and what they share of it. It is dropped, and its files are
//! let go, with the last piece of work on it.

use super::loader::Shared;
use super::observation::Observation;
use crate::Result;
use crate::plan::{Assembly, Operation, OutputTensor, Piece, Plan, PlannedShard};

/// One output tensor in work.
#[derive(Debug)]
pub(super) struct Entered {
    /// Number of its shard among those in work.
    pub shard: usize,
    /// What it is made of.
    pub output: OutputTensor,
    /// What is known of each of its pieces, in their order; none if it is copied.
    pub pieces: Vec<EnteredPiece>,
}

/// What workers share of a piece.
#[derive(Debug)]
pub(super) struct EnteredPiece {
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
        let pieces = match &output.operation {
            Operation::Copy(_) => Vec::new(),
            Operation::Compute(assembly) => {
                let enter = |piece: &Piece| EnteredPiece {
                    shared: Shared::of(&piece.computation.operands),
                    observation: Observation::of(&piece.computation, piece.region.len()),
                };
                assembly.pieces.iter().map(enter).collect()
            }
        };
        Ok(Self { shard, output, pieces })
    }

    /// What it is computed by, unless it is copied.
    pub(super) fn assembly(&self) -> Option<&Assembly> {
        match &self.output.operation {
            Operation::Copy(_) => None,
            Operation::Compute(assembly) => Some(assembly),
        }
    }

    /// Its pieces, with what is known of each.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (&Piece, &EnteredPiece)> {
        self.assembly().into_iter().flat_map(|assembly| &assembly.pieces).zip(&self.pieces)
    }

    /// The piece with this number.
    pub(super) fn piece(&self, number: usize) -> Option<(&Piece, &EnteredPiece)> {
        Some((self.assembly()?.pieces.get(number)?, self.pieces.get(number)?))
    }
}
