//! From JSON to something that can be executed: nothing that the plan claims is believed.

use super::layout::Layout;
use super::operand::{Input, Inputs, Operand};
use super::schema;
use crate::checkpoint::{Checkpoint, InputFile, ReadBackend, StatedIdentity};
use crate::dtype::Float;
use crate::methods::{self, Convert, Method};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A validated plan with its inputs opened and mapped.
#[derive(Debug)]
pub struct Plan {
    sources: BTreeMap<String, Checkpoint>,
    shards: Vec<PlannedShard>,
}

/// One output file, ready to be written.
#[derive(Debug)]
pub struct PlannedShard {
    /// File name within the output directory.
    pub file: String,
    /// Header bytes and total size.
    pub layout: Layout,
    /// The tensors in the order of their bytes.
    pub tensors: Vec<OutputTensor>,
    /// BLAKE3 of all that decides the shard's bytes: its plan and the identity of the files it reads.
    pub digest: String,
    /// Source names and file names that it reads.
    reads: BTreeSet<(String, String)>,
}

impl PlannedShard {
    /// The input file that this output file equals byte for byte, if there is one.
    ///
    /// # Errors
    /// Those of [`InputFile::read`].
    pub fn equal_input(&self) -> Result<Option<&InputFile>> {
        let mut file: Option<&Arc<InputFile>> = None;
        for tensor in &self.tensors {
            let Operation::Copy(input) = &tensor.operation else { return Ok(None) };
            if file.is_some_and(|file| !Arc::ptr_eq(file, &input.file))
                || input.range != tensor.range
            {
                return Ok(None);
            }
            file = Some(&input.file);
        }
        let Some(file) = file else { return Ok(None) };
        if file.size() != self.layout.size as u64 {
            return Ok(None);
        }
        let mut header = vec![0; self.layout.header.len()];
        file.read(&(0..header.len()), &mut header)?;
        Ok((header == self.layout.header).then_some(&**file))
    }
}

/// One output tensor.
#[derive(Debug)]
pub struct OutputTensor {
    /// Its name.
    pub name: String,
    /// Its bytes within the output file.
    pub range: Range<usize>,
    /// How they come about.
    pub operation: Operation,
}

impl OutputTensor {
    /// Observe passes at most that come before its first byte can be made.
    #[must_use]
    pub fn passes(&self) -> usize {
        match &self.operation {
            Operation::Copy(_) => 0,
            Operation::Compute { method, .. } => method.passes(),
        }
    }
}

/// What fills a tensor.
#[derive(Debug)]
pub enum Operation {
    /// The input's bytes as they are.
    Copy(Input),
    /// A method over operands of one shape, rounded once to the dtype.
    Compute {
        /// How the operands become one.
        method: Box<dyn Method>,
        /// What it reads; the base, if there is one, is the last.
        operands: Vec<Operand>,
        /// Whether there is a base.
        has_base: bool,
        /// The dtype of the result.
        dtype: Float,
    },
}

impl Operation {
    /// Bytes of all the tensors that are read.
    #[must_use]
    pub fn bytes_read(&self) -> usize {
        match self {
            Self::Copy(input) => input.range.len(),
            Self::Compute { operands, .. } => operands.iter().map(Operand::bytes_read).sum(),
        }
    }

    /// Number of operands.
    #[must_use]
    pub fn width(&self) -> usize {
        match self {
            Self::Copy(_) => 1,
            Self::Compute { operands, .. } => operands.len(),
        }
    }
}

impl Plan {
    /// As [`Plan::open`], with inputs read as seems best.
    ///
    /// # Errors
    /// Those of [`Plan::open`].
    pub fn from_json(json: &str) -> Result<Self> {
        Self::open(json, ReadBackend::Auto)
    }

    /// Parses and validates a plan and opens what it reads.
    ///
    /// # Errors
    /// [`Error::Plan`] if the JSON or what it claims is wrong, [`Error::InputChanged`] if an input is not the one it
    /// was made for, and whatever opening a checkpoint raises.
    pub fn open(json: &str, backend: ReadBackend) -> Result<Self> {
        let plan: schema::Plan =
            serde_json::from_str(json).map_err(|e| Error::Plan(e.to_string()))?;
        if plan.version != schema::VERSION {
            return Err(Error::Plan(format!(
                "it has version {}, this engine reads version {}",
                plan.version,
                schema::VERSION
            )));
        }
        let sources = plan
            .sources
            .iter()
            .map(|(name, source)| Ok((name.clone(), open_source(source, backend)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let mut open = HashMap::new();
        let mut files = HashSet::new();
        let mut names = HashSet::new();
        let mut shards = Vec::with_capacity(plan.shards.len());
        for shard in &plan.shards {
            check_output_name(&shard.file)?;
            if !files.insert(&shard.file) {
                return Err(Error::Plan(format!("it writes {} twice", shard.file)));
            }
            if shard.tensors.is_empty() {
                return Err(Error::Plan(format!("{} has no tensors", shard.file)));
            }
            for tensor in &shard.tensors {
                if tensor.name == "__metadata__" || !names.insert(&tensor.name) {
                    return Err(Error::Plan(format!(
                        "tensor `{}` of {} stands twice or has a reserved name",
                        tensor.name, shard.file
                    )));
                }
            }
            shards.push(plan_shard(&plan, &sources, shard, &mut open, backend)?);
        }
        Ok(Self { sources, shards })
    }

    /// The output files, in the order in which they are written.
    #[must_use]
    pub fn shards(&self) -> &[PlannedShard] {
        &self.shards
    }

    /// The shards with these names, in the plan's order; all of them for `None`.
    ///
    /// # Errors
    /// [`Error::Plan`] if a name is not in the plan.
    pub fn select(&self, files: Option<&[String]>) -> Result<Vec<&PlannedShard>> {
        let Some(files) = files else { return Ok(self.shards.iter().collect()) };
        if let Some(unknown) =
            files.iter().find(|file| !self.shards.iter().any(|shard| shard.file == **file))
        {
            return Err(Error::Plan(format!("it has no output file {unknown}")));
        }
        Ok(self.shards.iter().filter(|shard| files.contains(&shard.file)).collect())
    }

    /// Directories of all sources.
    pub fn source_paths(&self) -> impl Iterator<Item = &Path> {
        self.sources.values().map(Checkpoint::path)
    }

    /// Checks that no file that the shard reads has changed in size or time since the plan was validated.
    ///
    /// # Errors
    /// [`Error::InputChanged`].
    pub fn check_inputs_unchanged(&self, shard: &PlannedShard) -> Result<()> {
        for (source, file) in &shard.reads {
            let found = self.sources[source].shards().iter().find(|shard| shard.name == *file);
            if let Some(input) = found {
                input.check_unchanged()?;
            }
        }
        Ok(())
    }

    /// Bytes that all shards read and write.
    #[must_use]
    pub fn traffic(&self) -> (usize, usize) {
        let tensors = self.shards.iter().flat_map(|shard| &shard.tensors);
        let read = tensors.map(|tensor| tensor.operation.bytes_read()).sum();
        (read, self.shards.iter().map(|shard| shard.layout.size).sum())
    }
}

/// Opens the files that a plan lists and compares each with the identity it states.
fn open_source(source: &schema::Source, backend: ReadBackend) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open_files(&source.path, source.files.keys(), backend)?;
    for shard in checkpoint.shards() {
        shard.header.identity.check_stated(&shard.path, &source.files[&shard.name])?;
    }
    Ok(checkpoint)
}

fn plan_shard(
    plan: &schema::Plan,
    sources: &BTreeMap<String, Checkpoint>,
    shard: &schema::Shard,
    files: &mut HashMap<PathBuf, Arc<InputFile>>,
    backend: ReadBackend,
) -> Result<PlannedShard> {
    let layout = Layout::of(shard).map_err(Error::Plan)?;
    let mut reads = BTreeSet::new();
    let mut tensors = Vec::with_capacity(shard.tensors.len());
    for (tensor, range) in shard.tensors.iter().zip(&layout.ranges) {
        let mut inputs = Inputs { sources, reads: &mut reads, files, backend };
        let operation = match (&tensor.copy, &tensor.merge) {
            (Some(source), None) => copy(tensor, inputs.open(source, tensor)?)?,
            (None, Some(merge)) => {
                let operands = merge
                    .operands
                    .iter()
                    .map(|weighted| &weighted.operand)
                    .chain(&merge.base)
                    .map(|operand| inputs.open_operand(operand, tensor))
                    .collect::<Result<Vec<_>>>()?;
                self::merge(tensor, merge, operands)?
            }
            _ => {
                return Err(Error::Plan(format!(
                    "tensor `{}` must have exactly one of `copy` and `merge`",
                    tensor.name
                )));
            }
        };
        tensors.push(OutputTensor { name: tensor.name.clone(), range: range.clone(), operation });
    }
    let digest = digest(plan, shard, &reads)?;
    Ok(PlannedShard { file: shard.file.clone(), layout, tensors, digest, reads })
}

fn copy(tensor: &schema::Tensor, input: Input) -> Result<Operation> {
    if input.dtype == tensor.dtype {
        return Ok(Operation::Copy(input));
    }
    Ok(Operation::Compute {
        method: Box::new(Convert),
        operands: vec![Operand::plain(input, tensor)?],
        has_base: false,
        dtype: output_float(tensor)?,
    })
}

fn merge(
    tensor: &schema::Tensor,
    merge: &schema::Merge,
    operands: Vec<Operand>,
) -> Result<Operation> {
    let has_base = merge.base.is_some();
    let parameters: Vec<_> = merge.operands.iter().map(operand_parameters).collect();
    let (shared, shape) = (&merge.parameters, &tensor.shape);
    let method = methods::build(&merge.method, shared, &parameters, has_base, &tensor.name, shape)
        .map_err(|problem| Error::Plan(format!("tensor `{}`: {problem}", tensor.name)))?;
    Ok(Operation::Compute { method, operands, has_base, dtype: output_float(tensor)? })
}

/// The weight is a parameter like any other, but for its place in the plan.
fn operand_parameters(weighted: &schema::WeightedOperand) -> Map<String, Value> {
    let mut parameters = weighted.parameters.clone();
    if let Some(weight) = weighted.weight {
        parameters.insert("weight".to_owned(), weight.into());
    }
    parameters
}

fn output_float(tensor: &schema::Tensor) -> Result<Float> {
    Float::from_safetensors(tensor.dtype).ok_or_else(|| {
        Error::Plan(format!(
            "tensor `{}` cannot be computed in dtype {}; use BF16, F16, F32 or F64",
            tensor.name, tensor.dtype
        ))
    })
}

fn check_output_name(file: &str) -> Result<()> {
    let plain = Path::new(file).file_name().is_some_and(|name| name == file);
    if plain && file.ends_with(".safetensors") && !file.starts_with('.') {
        Ok(())
    } else {
        Err(Error::Plan(format!(
            "the output file `{file}` must be a plain name that ends in .safetensors"
        )))
    }
}

/// Digest of what decides a shard's bytes. Sources' paths are left out: a moved input is still the same input.
fn digest(
    plan: &schema::Plan,
    shard: &schema::Shard,
    reads: &BTreeSet<(String, String)>,
) -> Result<String> {
    let json = serde_json::to_vec(shard).map_err(|e| Error::Plan(e.to_string()))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&plan.version.to_le_bytes());
    hasher.update(&json);
    for (source, file) in reads {
        // What is only informative does not decide.
        let StatedIdentity { size, mtime_ns, header_digest, .. } =
            &plan.sources[source].files[file];
        let identity = serde_json::to_vec(&(source, file, size, mtime_ns, header_digest))
            .map_err(|e| Error::Plan(e.to_string()))?;
        hasher.update(&identity);
    }
    Ok(hasher.finalize().to_hex().to_string())
}
