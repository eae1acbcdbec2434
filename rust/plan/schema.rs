//! The plan as JSON, version 2. Unknown fields are errors, so that a misspelt one is never ignored.
//!
//! What a model with 200,000 tensors repeats is written once: tensors share the entries of a table of operations, and
//! what an operand leaves out (its name, and the output's dtype and shape) is that of the tensor itself.

use crate::checkpoint::StatedIdentity;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The version that this engine reads.
pub const VERSION: u32 = 2;

/// A whole plan.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan<'a> {
    /// Must be [`VERSION`].
    pub version: u32,
    /// The checkpoints that tensors come from, by a name that operands use.
    pub sources: BTreeMap<String, Source>,
    /// What is done, by the numbers that tensors refer to.
    pub operations: Vec<Operation>,
    /// The output files, in the order in which they are written.
    #[serde(borrow)]
    pub shards: Vec<Shard<'a>>,
}

/// The part that every version has.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Version {
    /// See [`Plan::version`].
    pub version: u32,
}

/// One input checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Its directory or file, absolute; or relative to the directory of the output that carries the plan; or the address
    /// of a directory in a store or on a server, without credentials.
    pub path: PathBuf,
    /// The shards that the plan reads, by file name.
    pub files: BTreeMap<String, StatedIdentity>,
}

/// One output file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard<'a> {
    /// File name within the output directory.
    pub file: String,
    /// The header's `__metadata__`. Readers of the transformers family want `format: pt`.
    #[serde(default = "pytorch_format")]
    pub metadata: BTreeMap<String, String>,
    /// The tensors, in the order of their bytes.
    #[serde(borrow)]
    pub tensors: Vec<Tensor<'a>>,
}

fn pytorch_format() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

/// One output tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor<'a> {
    /// Name in the output.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// Number of its operation, if one makes all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<u32>,
    /// Otherwise the pieces that it consists of, in any order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pieces: Option<Box<[Piece]>>,
    /// How its numbers are stored, if not as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encode: Option<Box<Encode>>,
    /// Element type in the output; that of the tensor that is copied, or of the first operand's, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Dimensions; likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<Box<[usize]>>,
}

impl Tensor<'_> {
    /// The pieces that it consists of; none if one operation makes it.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        self.pieces.as_deref().unwrap_or(&[])
    }
}

/// Elements of a tensor, counted row by row, in an order and shape of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// The first of them.
    pub start: usize,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// How far neighbours of each dimension lie apart, in elements of the tensor.
    pub strides: Vec<usize>,
}

/// A part of an output tensor that has an operation of its own.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Which elements of the output tensor it fills. Operands that say no view of their own have the same.
    pub view: View,
    /// Number of its operation.
    pub operation: u32,
}

/// How the numbers of a tensor are stored: as those of an input are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Encode {
    /// Key of [`Plan::sources`].
    pub source: String,
    /// Name of the encoded tensor there; operands that name none are called the same.
    pub tensor: String,
    /// What of it this output tensor holds.
    pub part: EncodedPart,
}

/// One of the tensors that an encoded one is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncodedPart {
    /// The numbers, each over its scale.
    Codes,
    /// The scales.
    Scales,
}

/// What fills tensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Operation {
    /// Byte for byte from one source, or converted where the dtypes differ.
    Copy(TensorRef),
    /// Computed from several sources.
    Merge(Box<Merge>),
}

/// A tensor of a source.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRef {
    /// Key of [`Plan::sources`].
    pub source: String,
    /// Name of the tensor there; the output tensor's own if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// Which of its elements, and in which shape; all of them if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<View>,
}

/// What is merged: a tensor, possibly changed by an adapter on the way, so that no merged copy of it need exist.
///
/// The changes apply in the order of the fields: rows are replaced, then `W + Σ scale·B·A`, then the norms are set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operand {
    /// Key of [`Plan::sources`].
    pub source: String,
    /// Name of the tensor there; the output tensor's own if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// Which of its elements, and in which shape; all of them if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<View>,
    /// Rows that are replaced (PEFT's trainable tokens).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<Rows>,
    /// Products that are added (LoRA).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub low_rank: Vec<LowRank>,
    /// Norms that the sum is rescaled to (DoRA).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub magnitude: Option<Magnitude>,
}

/// `scale·B·A`, added to a matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LowRank {
    /// `A`, shape (rank, in).
    pub a: TensorRef,
    /// `B`, shape (out, rank).
    pub b: TensorRef,
    /// Rounded to f32 before use.
    pub scale: f64,
    /// Whether the matrix is stored as (in, out), so that the transposed product is added.
    #[serde(default)]
    pub transpose: bool,
}

/// The norms that DoRA gives to the vectors of a matrix, one for each output feature.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Magnitude {
    /// Key of [`Plan::sources`].
    pub source: String,
    /// A tensor with one element for each output feature.
    pub tensor: String,
    /// Whether the output features are the columns of the stored matrix.
    #[serde(default)]
    pub transpose: bool,
}

/// Rows of a matrix that come from another one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rows {
    /// Key of [`Plan::sources`].
    pub source: String,
    /// A tensor with one row for each index.
    pub tensor: String,
    /// Which rows are replaced, each once.
    pub indices: Vec<usize>,
}

/// A merge of tensors of one shape.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// Name of the method, see [`crate::methods::METHODS`].
    pub method: String,
    /// The method's parameters.
    #[serde(default)]
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// What task vectors are taken against, or where an interpolation starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Operand>,
    /// What is merged, in the order in which it is accumulated.
    pub operands: Vec<WeightedOperand>,
    /// How much of each element is taken of what the method makes; all of it if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Mask>,
}

/// Shares, one for each element: `kept + share·(merged - kept)`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mask {
    /// The shares, from 0 to 1: floats, U8 or BOOL.
    pub shares: TensorRef,
    /// What is kept where a share is 0.
    pub kept: Operand,
}

/// An operand, its weight and what else the method wants to know of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedOperand {
    /// The tensor.
    pub operand: Operand,
    /// Its weight, if the method takes one; rounded to f32 before use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Its other parameters.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub parameters: serde_json::Map<String, serde_json::Value>,
}
