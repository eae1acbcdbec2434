//! From JSON to something that can be executed: nothing that the plan claims is believed.

use super::inputs::{Operation, OutputTensor, Target};
use super::layout::{Entry, Layout};
use super::resolve::{Recipe, Resolver};
use super::schema;
use super::sources::{GivenSources, Sources, open_source};
use crate::checkpoint::{InputFile, ReadBackend};
use crate::{Error, Result};
use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
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

/// One output file, ready to be written.
#[derive(Debug)]
pub struct PlannedShard {
    /// File name within the output directory.
    pub file: String,
    /// Where the tensors lie in it.
    pub layout: Layout,
    /// BLAKE3 of all that decides the shard's bytes: its plan and the identity of the files it reads.
    pub digest: String,
    metadata: BTreeMap<String, String>,
    tensors: Vec<PlannedTensor>,
    /// The tensors' names, one after another.
    names: String,
    /// What consists of pieces, by the number of the tensor, and what has a shape of its own.
    special: BTreeMap<usize, Special>,
    /// The files that it reads: source, and the shard's number there.
    reads: Vec<(Arc<str>, usize)>,
    /// Bytes of the tensors that it reads.
    bytes_read: usize,
}

#[derive(Debug, Clone, Copy)]
struct PlannedTensor {
    /// Where its name ends among the names.
    name: u32,
    /// Of what consists of pieces, that of the first.
    recipe: u32,
    dtype: Dtype,
}

/// What few tensors have.
#[derive(Debug, Default)]
struct Special {
    shape: Vec<usize>,
    pieces: Vec<schema::Piece>,
    encode: Option<schema::Encode>,
}

impl PlannedShard {
    /// A tensor's name.
    #[must_use]
    pub fn name(&self, number: usize) -> &str {
        let end = |number: usize| self.tensors[number].name as usize;
        &self.names[number.checked_sub(1).map_or(0, end)..end(number)]
    }

    /// Number of the tensor whose bytes are at this offset of the file; `None` for the header and beyond the end.
    #[must_use]
    pub fn tensor_at(&self, offset: usize) -> Option<usize> {
        let inside = offset >= self.layout.header && offset < self.layout.size;
        inside.then(|| self.layout.first_behind(offset))
    }
}

impl Plan {
    /// As [`Plan::open`], with inputs read as seems best.
    ///
    /// # Errors
    /// Those of [`Plan::open`].
    pub fn from_json(json: &str) -> Result<Self> {
        Self::open(json.as_bytes(), ReadBackend::Auto, &GivenSources::new())
    }

    /// Parses and validates a plan. Headers of sources that are not given are read; no data is, and no file stays open.
    ///
    /// # Errors
    /// [`Error::Plan`] if the JSON or what it claims is wrong, [`Error::InputChanged`] if an input is not the one it
    /// was made for, and whatever opening a checkpoint raises.
    pub fn open(json: &[u8], backend: ReadBackend, given: &GivenSources) -> Result<Self> {
        let plan = parse(json)?;
        let mut sources = Sources::new();
        for (name, source) in &plan.sources {
            sources.insert(name.clone(), open_source(name, source, given.get(name), backend)?);
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

    /// How the sources are read.
    pub fn backends(&self) -> impl Iterator<Item = ReadBackend> {
        self.sources.values().map(|source| source.checkpoint.backend())
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
        let pieces = tensor.pieces.iter().map(|piece| piece.operation);
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

fn plan_shard(
    shard: schema::Shard<'_>,
    sources: &Sources,
    recipes: &[Recipe],
    digests: &[blake3::Hash],
    stated: &BTreeMap<String, schema::Source>,
) -> Result<PlannedShard> {
    let mut planned = PlannedShard {
        file: shard.file,
        layout: Layout::empty(),
        digest: String::new(),
        metadata: shard.metadata,
        tensors: Vec::with_capacity(shard.tensors.len()),
        names: String::with_capacity(shard.tensors.iter().map(|tensor| tensor.name.len()).sum()),
        special: BTreeMap::new(),
        reads: Vec::new(),
        bytes_read: 0,
    };
    let mut reads = BTreeSet::new();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&schema::VERSION.to_le_bytes());
    hash_text(&mut hasher, &planned.file);
    for (key, value) in &planned.metadata {
        hash_text(&mut hasher, key);
        hash_text(&mut hasher, value);
    }
    for (number, tensor) in shard.tensors.into_iter().enumerate() {
        let resolver = Resolver { sources, name: &tensor.name, whole: None };
        let used = tensor.operation.into_iter().chain(tensor.pieces.iter().map(|p| p.operation));
        for operation in used {
            if operation as usize >= recipes.len() {
                return Err(Error::Plan(format!(
                    "tensor `{}` is made by operation {operation}, of which the plan has {}",
                    tensor.name,
                    recipes.len()
                )));
            }
        }
        let first = match (tensor.operation, tensor.pieces.as_slice()) {
            (Some(operation), []) => operation,
            (None, [first, ..]) => first.operation,
            _ => {
                return Err(Error::Plan(format!(
                    "tensor `{}` needs either an operation or pieces",
                    tensor.name
                )));
            }
        };
        let recipe = &recipes[first as usize];
        let encoded = tensor.encode.as_ref().map(|encode| resolver.encoded_like(encode));
        let (dtype, shape) = match (encoded.transpose()?, tensor.dtype, tensor.shape) {
            (Some((dtype, shape)), None, None) => (dtype, Some(shape.to_vec())),
            (Some(_), _, _) => {
                return Err(Error::Plan(format!(
                    "tensor `{}` is stored like another, so that its dtype and shape must not be given",
                    tensor.name
                )));
            }
            (None, Some(dtype), shape @ Some(_)) => (dtype, shape),
            (None, None, shape @ Some(_)) => (resolver.like(recipe)?.0, shape),
            (None, dtype, None) if tensor.pieces.is_empty() => {
                (dtype.unwrap_or(resolver.like(recipe)?.0), None)
            }
            (None, _, None) => {
                return Err(Error::Plan(format!(
                    "tensor `{}` consists of pieces, so that its shape must be given",
                    tensor.name
                )));
            }
        };
        let special =
            shape.map(|shape| Special { shape, pieces: tensor.pieces, encode: tensor.encode });
        let operation = operation_of(recipes, resolver, first, special.as_ref(), dtype)?;
        for (input, bytes) in operation.reads() {
            planned.bytes_read += bytes;
            let place = (Arc::clone(&input.source), input.shard());
            if !reads.contains(&place) {
                reads.insert(place);
            }
        }
        planned.names.push_str(&tensor.name);
        let name = u32::try_from(planned.names.len())
            .map_err(|_| Error::Plan(format!("the names of {} are too long", planned.file)))?;
        planned.tensors.push(PlannedTensor { name, recipe: first, dtype });
        hash_text(&mut hasher, &tensor.name);
        hash_text(&mut hasher, &dtype.to_string());
        match &special {
            Some(Special { shape, .. }) => hash_text(&mut hasher, &format!("{shape:?}")),
            None => hash_text(&mut hasher, &format!("{:?}", resolver.like(recipe)?.1)),
        }
        let Some(special) = special else {
            hasher.update(digests[first as usize].as_bytes());
            continue;
        };
        if special.pieces.is_empty() {
            hasher.update(digests[first as usize].as_bytes());
        }
        for piece in &special.pieces {
            hash_text(&mut hasher, &format!("{:?}", piece.view));
            hasher.update(digests[piece.operation as usize].as_bytes());
        }
        if let Some(encode) = &special.encode {
            hash_text(&mut hasher, &format!("{encode:?}"));
        }
        // What can be derived is not kept.
        let derived = special.pieces.is_empty()
            && special.encode.is_none()
            && resolver.like(recipe).is_ok_and(|(_, shape)| shape == special.shape);
        if !derived {
            planned.special.insert(number, special);
        }
    }
    let entry = |number: usize| entry(sources, recipes, &planned, number);
    let layout = Layout::of(&planned.file, &planned.metadata, planned.tensors.len(), &entry);
    planned.layout = layout.map_err(Error::Plan)?;
    for (source, number) in reads {
        let file = &sources[&*source].checkpoint.shards()[number].name;
        let identity = &stated[&*source].files[file];
        hash_text(&mut hasher, &source);
        hash_text(&mut hasher, file);
        hasher.update(&identity.size.to_le_bytes());
        hasher.update(&identity.mtime_ns.to_le_bytes());
        hasher.update(identity.header_digest.as_ref());
        planned.reads.push((source, number));
    }
    planned.digest = hasher.finalize().to_hex().to_string();
    Ok(planned)
}

/// What the header says of a tensor of a shard that was validated.
fn entry<'a>(
    sources: &'a Sources,
    recipes: &'a [Recipe],
    shard: &'a PlannedShard,
    number: usize,
) -> Option<Entry<'a>> {
    let tensor = shard.tensors.get(number)?;
    let name = shard.name(number);
    let shape = match shard.special.get(&number) {
        Some(special) => special.shape.as_slice(),
        None => {
            let resolver = Resolver { sources, name, whole: None };
            resolver.like(&recipes[tensor.recipe as usize]).ok()?.1
        }
    };
    Some(Entry { name, dtype: tensor.dtype, shape })
}

/// What makes a tensor: an operation, of what has nothing special the one with this number.
fn operation_of(
    recipes: &[Recipe],
    resolver: Resolver<'_>,
    recipe: u32,
    special: Option<&Special>,
    dtype: Dtype,
) -> Result<Operation> {
    let recipe = &recipes[recipe as usize];
    let Some(Special { shape, pieces, encode }) = special else {
        return resolver.operation(recipe, dtype, resolver.like(recipe)?.1);
    };
    let (resolver, target, shape) = match encode {
        None if pieces.is_empty() => return resolver.operation(recipe, dtype, shape),
        None => (resolver, Target::Plain(resolver.output_float(dtype)?), Cow::from(shape)),
        Some(encode) => {
            let (target, shape) = resolver.encoded(encode)?;
            // What operands leave out is the name of the quantised tensor.
            (Resolver { name: &encode.tensor, ..resolver }, target, Cow::from(shape))
        }
    };
    if pieces.is_empty() {
        return resolver.computed(recipe, target, &shape);
    }
    let pieces = pieces.iter().map(|piece| (&piece.view, &recipes[piece.operation as usize]));
    resolver.assembled(pieces, target, &shape)
}

/// Digest of an operation. A shard's digest holds those of its tensors; sources' paths are in none of them, since a moved
/// input is still the same input.
fn digest_of(operation: &schema::Operation) -> Result<blake3::Hash> {
    let json = serde_json::to_vec(operation).map_err(|e| Error::Plan(e.to_string()))?;
    Ok(blake3::hash(&json))
}

/// Adds text in such a way that no two lists of texts are the same bytes.
fn hash_text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&text.len().to_le_bytes());
    hasher.update(text.as_bytes());
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
