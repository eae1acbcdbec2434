//! The plan as JSON, version 1. Unknown fields are errors, so that a misspelt one is never ignored.

use crate::checkpoint::FileIdentity;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The version that this engine reads.
pub const VERSION: u32 = 1;

/// A whole plan.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Must be [`VERSION`].
    pub version: u32,
    /// The checkpoints that tensors come from, by a name that operands use.
    pub sources: BTreeMap<String, Source>,
    /// The output files, in the order in which they are written.
    pub shards: Vec<Shard>,
}

/// One input checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Its directory, absolute.
    pub path: PathBuf,
    /// The shards that the plan reads, by file name.
    pub files: BTreeMap<String, FileIdentity>,
}

/// One output file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// File name within the output directory.
    pub file: String,
    /// The header's `__metadata__`. Readers of the transformers family want `format: pt`.
    #[serde(default = "pytorch_format")]
    pub metadata: BTreeMap<String, String>,
    /// The tensors, in the order of their bytes.
    pub tensors: Vec<Tensor>,
}

fn pytorch_format() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

/// One output tensor: exactly one of `copy` and `merge` is there.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    /// Name in the output.
    pub name: String,
    /// Element type in the output.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Byte for byte from one source, or converted where the dtypes differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<Operand>,
    /// Computed from several sources.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<Merge>,
}

/// A tensor of a source.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operand {
    /// Key of [`Plan::sources`].
    pub source: String,
    /// Name of the tensor there.
    pub tensor: String,
}

/// A merge of tensors of one shape.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// Name of the method, see [`crate::merge::METHODS`].
    pub method: String,
    /// The method's parameters.
    #[serde(default)]
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// What is merged, in the order in which it is accumulated.
    pub operands: Vec<WeightedOperand>,
}

/// An operand and its weight.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedOperand {
    /// The tensor.
    pub operand: Operand,
    /// Its weight; rounded to f32 before use.
    pub weight: f64,
}
