//! From JSON to something that can be executed: nothing that the plan claims is believed.

use super::operation::{Operation, OutputTensor};
use super::resolve::{Recipe, Resolver};
use super::schema;
use super::shard::{PlannedShard, digest_of, entry, operation_of, plan_shard};
use super::sources::{GivenSources, Sources, open_source};
use crate::checkpoint::{InputFile, ReadBackend};
use crate::{Error, Result};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

/// Longest plan that is parsed.
const LONGEST_PLAN: usize = 1 << 30;

/// A validated plan. Of each tensor it keeps a name and a few numbers; the rest is found again in the headers when a
/// worker enters the tensor.
#[derive(Debug)]
pub struct Plan {
    sources: Sources,
    recipes: Vec<Recipe>,
    shards: Vec<PlannedShard>,
}

impl Plan {
    /// As [`Plan::open`], with inputs read as seems best.
    ///
    /// # Errors
    /// Those of [`Plan::open`].
    pub fn from_json(json: &str) -> Result<Self> {
        Self::open(json.as_bytes(), ReadBackend::Auto, &GivenSources::new(), None)
    }

    /// Parses and validates a plan. Headers of sources that are not given are read; no data is, and no file stays open.
    /// `directory` is that of the output that carries the plan: what lies beside it has a relative path.
    ///
    /// # Errors
    /// [`Error::Plan`] if the JSON or what it claims is wrong, [`Error::InputChanged`] if an input is not the one it
    /// was made for, and whatever opening a checkpoint raises.
    pub fn open(
        json: &[u8],
        backend: ReadBackend,
        given: &GivenSources,
        directory: Option<&Path>,
    ) -> Result<Self> {
        let plan = parse(json)?;
        let mut sources = Sources::new();
        for (name, source) in &plan.sources {
            let found = open_source(name, source, given.get(name), backend, directory)?;
            sources.insert(name.clone(), found);
        }
        let digests = plan.operations.iter().map(digest_of).collect::<Result<Vec<_>>>()?;
        let operations = plan.operations.into_iter().enumerate();
        let recipes = operations
            .map(|(number, operation)| {
                Recipe::new(operation).map_err(|problem| {
                    Error::Plan(format!("{}: {problem}", made_by(&plan.shards, number)))
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut names = HashSet::new();
        let mut files = HashSet::new();
        let mut shards = Vec::with_capacity(plan.shards.len());
        for shard in plan.shards {
            check_output_name(&shard.file)?;
            if !files.insert(shard.file.clone()) {
                return Err(Error::Plan(format!("it writes {} twice", shard.file)));
            }
            if shard.tensors.is_empty() {
                return Err(Error::Plan(format!("{} has no tensors", shard.file)));
            }
            for tensor in &shard.tensors {
                if tensor.name == "__metadata__" || !names.insert(tensor.name.clone()) {
                    return Err(Error::Plan(format!(
                        "tensor `{}` of {} stands twice or has a reserved name",
                        tensor.name, shard.file
                    )));
                }
            }
            shards.push(plan_shard(shard, &sources, &recipes, &digests, &plan.sources)?);
        }
        Ok(Self { sources, recipes, shards })
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
        let wanted: HashSet<&String> = files.iter().collect();
        let known: HashSet<&String> = self.shards.iter().map(|shard| &shard.file).collect();
        if let Some(unknown) = files.iter().find(|file| !known.contains(file)) {
            return Err(Error::Plan(format!("it has no output file {unknown}")));
        }
        Ok(self.shards.iter().filter(|shard| wanted.contains(&shard.file)).collect())
    }

    /// Directories of all sources.
    pub fn source_paths(&self) -> impl Iterator<Item = &Path> {
        self.sources.values().map(|source| source.checkpoint.path())
    }

    /// Whether any source lies in a store or on a server.
    pub fn is_remote(&self) -> bool {
        self.sources.values().any(|source| source.checkpoint.is_remote())
    }

    /// How the sources are read; nothing of a store is mapped.
    pub fn backends(&self) -> impl Iterator<Item = ReadBackend> {
        self.sources.values().map(|source| match source.checkpoint.is_remote() {
            true => ReadBackend::Pread,
            false => source.checkpoint.backend(),
        })
    }

    /// A tensor of one of this plan's shards, with its inputs and method.
    ///
    /// # Errors
    /// None that validation would not have raised.
    pub fn tensor(&self, shard: &PlannedShard, number: usize) -> Result<OutputTensor> {
        let name = shard.name(number);
        let planned = shard.tensors[number];
        let resolver = Resolver { sources: &self.sources, name, whole: None };
        let operation = operation_of(
            &self.recipes,
            resolver,
            planned.recipe,
            shard.special.get(&number),
            planned.dtype,
        )?;
        Ok(OutputTensor { name: name.to_owned(), range: shard.layout.range(number), operation })
    }

    /// Bytes of one element of a tensor in the output; at least 1.
    #[must_use]
    pub fn element_bytes(shard: &PlannedShard, number: usize) -> usize {
        (shard.tensors[number].dtype.bitsize() / 8).max(1)
    }

    /// The header of a shard, as it stands in the file.
    ///
    /// # Errors
    /// [`Error::Plan`] if it is not as long as it was when the plan was validated.
    pub fn header(&self, shard: &PlannedShard) -> Result<Vec<u8>> {
        let entry = |number: usize| entry(&self.sources, &self.recipes, shard, number);
        shard
            .layout
            .write_header(&shard.metadata, &entry)
            .map_err(|problem| Error::Plan(format!("the header of {}: {problem}", shard.file)))
    }

    /// The input file that an output file equals byte for byte, if there is one.
    ///
    /// # Errors
    /// Those of [`InputFile::read`].
    pub fn equal_input(&self, shard: &PlannedShard) -> Result<Option<Arc<InputFile>>> {
        let mut file: Option<Arc<InputFile>> = None;
        for number in 0..shard.layout.len() {
            let tensor = self.tensor(shard, number)?;
            let Operation::Copy(input) = &tensor.operation else { return Ok(None) };
            if input.range != tensor.range {
                return Ok(None);
            }
            let found = input.file()?;
            if found.is_remote() {
                return Ok(None);
            }
            if file.as_ref().is_some_and(|file| !Arc::ptr_eq(file, found)) {
                return Ok(None);
            }
            file.get_or_insert_with(|| Arc::clone(found));
        }
        let Some(file) = file else { return Ok(None) };
        if file.size() != shard.layout.size as u64 {
            return Ok(None);
        }
        let mut header = vec![0; shard.layout.header];
        file.read(0..header.len(), &mut header)?;
        Ok((header == self.header(shard)?).then_some(file))
    }

    /// Checks that no file that the shard reads has changed in size or time since the plan was validated.
    ///
    /// # Errors
    /// [`Error::InputChanged`].
    pub fn check_inputs_unchanged(&self, shard: &PlannedShard) -> Result<()> {
        for (source, number) in &shard.reads {
            self.sources[&**source].checkpoint.shards()[*number].check_unchanged()?;
        }
        Ok(())
    }

    /// Bytes that all shards read and write.
    #[must_use]
    pub fn traffic(&self) -> (usize, usize) {
        let read = self.shards.iter().map(|shard| shard.bytes_read).sum();
        (read, self.shards.iter().map(|shard| shard.layout.size).sum())
    }
}

fn parse(json: &[u8]) -> Result<schema::Plan<'_>> {
    if json.len() > LONGEST_PLAN {
        return Err(Error::Plan(format!(
            "it has {} bytes, more than the {LONGEST_PLAN} allowed",
            json.len()
        )));
    }
    let problem = |e: serde_json::Error| Error::Plan(e.to_string());
    match serde_json::from_slice::<schema::Plan<'_>>(json) {
        Ok(plan) if plan.version == schema::VERSION => Ok(plan),
        Ok(plan) => Err(wrong_version(plan.version)),
        // Another version has other fields, so that it is looked for where the fields are wrong.
        Err(error) => match serde_json::from_slice::<schema::Version>(json) {
            Ok(found) if found.version != schema::VERSION => Err(wrong_version(found.version)),
            _ => Err(problem(error)),
        },
    }
}

/// For an error: who is made by an operation.
fn made_by(shards: &[schema::Shard<'_>], number: usize) -> String {
    let mut tensors = shards.iter().flat_map(|shard| &shard.tensors);
    let uses = |tensor: &&schema::Tensor<'_>| {
        let pieces = tensor.pieces().iter().map(|piece| piece.operation);
        tensor.operation.into_iter().chain(pieces).any(|used| used as usize == number)
    };
    match tensors.find(uses) {
        Some(tensor) => format!("tensor `{}`", tensor.name),
        None => format!("operation {number}"),
    }
}

fn wrong_version(version: u32) -> Error {
    let known = schema::VERSION;
    Error::Plan(if version < known {
        format!(
            "it was made by an earlier version of this program (its format is {version}, now {known}); merge again"
        )
    } else {
        format!("its format has version {version}, this program reads version {known}; update it")
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
