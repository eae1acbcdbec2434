//! What output tensors are made of.

use super::input::Input;
use super::operand::Operand;
use super::target::EncodedTarget;
use super::view::Region;
use crate::dtype::Float;
use crate::methods::Method;
use std::ops::Range;

/// One output tensor, with all that is needed to make it.
#[derive(Debug)]
pub struct OutputTensor {
    /// Its name.
    pub name: String,
    /// Its bytes within the output file.
    pub range: Range<usize>,
    /// How they come about.
    pub operation: Operation,
}

/// What fills a tensor.
#[derive(Debug)]
pub enum Operation {
    /// The input's bytes as they are.
    Copy(Input),
    /// Pieces, each by a method over operands of one shape; rounded once.
    Compute(Assembly),
}

/// A tensor that is computed.
#[derive(Debug)]
pub struct Assembly {
    /// What it consists of. Together they fill it, and each element is one's.
    pub pieces: Vec<Piece>,
    /// Number of its elements.
    pub elements: usize,
    /// What it is stored as.
    pub target: Target,
}

/// What a computed tensor is stored as.
#[derive(Debug)]
pub enum Target {
    /// Numbers, each rounded once.
    Plain(Float),
    /// A part of a quantised tensor.
    Encoded(Box<EncodedTarget>),
}

impl Assembly {
    /// The dtype of its numbers; of what is quantised, that of the arithmetic.
    #[must_use]
    pub fn dtype(&self) -> Float {
        match &self.target {
            Target::Plain(float) => *float,
            Target::Encoded(_) => Float::F32,
        }
    }

    /// The elements that some of its bytes are part of, or depend on.
    #[must_use]
    pub fn elements_of(&self, bytes: &Range<usize>) -> Range<usize> {
        match &self.target {
            Target::Plain(float) => bytes.start / float.size()..bytes.end.div_ceil(float.size()),
            Target::Encoded(target) => target.elements_of(bytes),
        }
    }
}

/// A part of a tensor that is computed by itself.
#[derive(Debug)]
pub struct Piece {
    /// Which elements of the tensor it fills.
    pub region: Region,
    /// Whether these are, unchanged, those of the input that the tensor is encoded like.
    pub kept: bool,
    /// How.
    pub computation: Computation,
}

/// A method and what it works on.
#[derive(Debug)]
pub struct Computation {
    /// How the operands become one.
    pub method: Box<dyn Method>,
    /// What it reads; the base, if there is one, is the last.
    pub operands: Vec<Operand>,
    /// Whether there is a base.
    pub has_base: bool,
}

impl Assembly {
    /// Whether nothing changes these elements: all of them are those of the input that the tensor is encoded like.
    #[must_use]
    pub fn keeps(&self, elements: &Range<usize>) -> bool {
        let kept = self.pieces.iter().filter(|piece| piece.kept);
        kept.map(|piece| piece.region.within(elements).len()).sum::<usize>() == elements.len()
    }
}

impl Operation {
    /// All the tensors that are read, and how many bytes of each.
    pub fn reads(&self) -> impl Iterator<Item = (&Input, usize)> {
        let (copied, pieces) = match self {
            Self::Copy(input) => (Some((input, input.range.len())), None),
            Self::Compute(assembly) => (None, Some(assembly)),
        };
        let pieces = pieces.into_iter().flat_map(|assembly| &assembly.pieces);
        let operands = pieces.flat_map(|piece| &piece.computation.operands);
        copied.into_iter().chain(operands.flat_map(Operand::reads))
    }
}
