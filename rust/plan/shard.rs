//! One output file of a plan: its layout, and what is kept of its tensors.

use super::layout::{Entry, Layout};
use super::operation::{Operation, Target};
use super::resolve::{Recipe, Resolver};
use super::schema;
use super::sources::Sources;
use crate::{Error, Result};
use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// One output file, ready to be written.
#[derive(Debug)]
pub struct PlannedShard {
    /// File name within the output directory.
    pub file: String,
    /// Where the tensors lie in it.
    pub layout: Layout,
    /// BLAKE3 of all that decides the shard's bytes: its plan and the identity of the files it reads.
    pub digest: String,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: Vec<PlannedTensor>,
    /// The tensors' names, one after another.
    pub(super) names: String,
    /// What consists of pieces, by the number of the tensor, and what has a shape of its own.
    pub(super) special: BTreeMap<usize, Special>,
    /// The files that it reads: source, and the shard's number there.
    pub(super) reads: Vec<(Arc<str>, usize)>,
    /// Bytes of the tensors that it reads.
    pub(super) bytes_read: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct PlannedTensor {
    /// Where its name ends among the names.
    pub(super) name: u32,
    /// Of what consists of pieces, that of the first.
    pub(super) recipe: u32,
    pub(super) dtype: Dtype,
}

/// What few tensors have.
#[derive(Debug, Default)]
pub(super) struct Special {
    pub(super) shape: Vec<usize>,
    pub(super) pieces: Vec<schema::Piece>,
    pub(super) encode: Option<schema::Encode>,
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

pub(super) fn plan_shard(
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
        let used = tensor.operation.into_iter().chain(tensor.pieces().iter().map(|p| p.operation));
        for operation in used {
            if operation as usize >= recipes.len() {
                return Err(Error::Plan(format!(
                    "tensor `{}` is made by operation {operation}, of which the plan has {}",
                    tensor.name,
                    recipes.len()
                )));
            }
        }
        let first = match (tensor.operation, tensor.pieces()) {
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
        let stated = tensor.shape.map(Vec::from);
        let pieces = tensor.pieces.map_or_else(Vec::new, Vec::from);
        let (dtype, shape) = match (encoded.transpose()?, tensor.dtype, stated) {
            (Some((dtype, shape)), None, None) => (dtype, Some(shape.to_vec())),
            (Some(_), _, _) => {
                return Err(Error::Plan(format!(
                    "tensor `{}` is stored like another, so that its dtype and shape must not be given",
                    tensor.name
                )));
            }
            (None, Some(dtype), shape @ Some(_)) => (dtype, shape),
            (None, None, shape @ Some(_)) => (resolver.like(recipe)?.0, shape),
            (None, dtype, None) if pieces.is_empty() => {
                (dtype.unwrap_or(resolver.like(recipe)?.0), None)
            }
            (None, _, None) => {
                return Err(Error::Plan(format!(
                    "tensor `{}` consists of pieces, so that its shape must be given",
                    tensor.name
                )));
            }
        };
        let special = shape.map(|shape| Special {
            shape,
            pieces,
            encode: tensor.encode.map(|encode| *encode),
        });
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
        if let Some(etag) = &identity.etag {
            hash_text(&mut hasher, etag);
        }
        planned.reads.push((source, number));
    }
    planned.digest = hasher.finalize().to_hex().to_string();
    Ok(planned)
}

/// What the header says of a tensor of a shard that was validated.
pub(super) fn entry<'a>(
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
pub(super) fn operation_of(
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
        return resolver.computed(recipe, || Ok(target), &shape);
    }
    let pieces = pieces.iter().map(|piece| (&piece.view, &recipes[piece.operation as usize]));
    resolver.assembled(pieces, target, &shape)
}

/// Digest of an operation. A shard's digest holds those of its tensors; sources' paths are in none of them, since a moved
/// input is still the same input.
pub(super) fn digest_of(operation: &schema::Operation) -> Result<blake3::Hash> {
    let json = serde_json::to_vec(operation).map_err(|e| Error::Plan(e.to_string()))?;
    Ok(blake3::hash(&json))
}

/// Adds text in such a way that no two lists of texts are the same bytes.
fn hash_text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&text.len().to_le_bytes());
    hasher.update(text.as_bytes());
}
