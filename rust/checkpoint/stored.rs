//! The stored tensors of a checkpoint: which shard has which, by number and by name.

use super::header::{Header, TensorEntry};
use super::limits::MOST_TENSORS;
use super::lookup::Lookup;
use super::weight_map::WeightMap;
use crate::error::printable;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// One shard: its name within the checkpoint and its validated header.
#[derive(Debug)]
pub struct Shard {
    /// File name, as the index or the directory has it.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// What it holds.
    pub header: Header,
}

impl Shard {
    fn open(directory: &Path, name: &str) -> Result<Self> {
        let path = directory.join(name);
        let header = Header::read(&path)?;
        Ok(Self { name: name.to_owned(), path, header })
    }

    /// Checks that size, times and inode, or an object's ETag, are those seen when the header was read.
    ///
    /// # Errors
    /// [`Error::InputChanged`] if one differs, [`Error::Read`] or [`Error::Remote`] if the file is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        self.header.identity.check(&self.path)
    }
}

/// The place of a tensor in a checkpoint: tensors are numbered in file order, then by offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorId(u32);

impl TensorId {
    /// The number itself.
    pub(super) fn number(self) -> usize {
        self.0 as usize
    }
}

/// All tensors as they are stored, numbered, whatever they belong to.
#[derive(Debug)]
pub(super) struct Stored {
    shards: Vec<Shard>,
    /// For each shard, the number of its first tensor.
    starts: Vec<u32>,
    lookup: Lookup,
    /// Numbers of tensors that do not count, since the index names another shard for them; ascending.
    superseded: Vec<u32>,
    len: usize,
}

impl Stored {
    /// Reads the headers of these files of a directory.
    pub(super) fn open(
        path: &Path,
        index: Option<&str>,
        files: &[String],
        weight_map: Option<&WeightMap>,
    ) -> Result<Self> {
        let mut shards = Vec::with_capacity(files.len());
        let mut starts = Vec::with_capacity(files.len());
        let mut total = 0;
        for file in files {
            let shard = Shard::open(path, file)?;
            starts.push(u32::try_from(total).unwrap_or(u32::MAX));
            total += shard.header.len();
            if total > MOST_TENSORS {
                let problem =
                    format!("its files hold more than {MOST_TENSORS} tensors, the most allowed");
                return Err(Error::unusable(path, problem));
            }
            shards.push(shard);
        }
        let (lookup, superseded, len) = (Lookup::with_capacity(total), Vec::new(), total);
        let mut stored = Self { shards, starts, lookup, superseded, len };
        stored.number(path, index, weight_map)?;
        Ok(stored)
    }

    /// Enters all tensors into the lookup table.
    fn number(&mut self, path: &Path, index: Option<&str>, map: Option<&WeightMap>) -> Result<()> {
        let Self { shards, starts, lookup, superseded, .. } = self;
        let (shards, starts) = (&**shards, &**starts);
        let name_of = |number: u32| entry_of(shards, starts, number).1.name;
        let mut number = 0;
        for shard in shards.iter() {
            for tensor in shard.header.tensors() {
                let mapped = map.and_then(|map| map.file(tensor.name));
                if mapped.is_some_and(|file| file != shard.name) {
                    // The index decides where a tensor stands twice; loaders follow it, and so do we.
                    superseded.push(number);
                } else if let Some(first) = lookup.insert(tensor.name, number, name_of) {
                    return Err(Error::index(
                        path,
                        format!(
                            "tensor `{}` stands in both {} and {}, and nothing says which counts",
                            printable(tensor.name),
                            printable(&entry_of(shards, starts, first).0.name),
                            printable(&shard.name)
                        ),
                    ));
                }
                number += 1;
            }
        }
        self.len -= self.superseded.len();
        if let (Some(map), Some(index)) = (map, index)
            && let Some((tensor, file)) = map.iter().find(|(tensor, _)| self.id(tensor).is_none())
        {
            return Err(Error::index(
                &path.join(index),
                format!(
                    "it places tensor `{}` in {}, which does not hold it; download the checkpoint again",
                    printable(tensor),
                    printable(file)
                ),
            ));
        }
        Ok(())
    }

    /// The shards, in the order of their names.
    pub(super) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The places of all tensors that count, in file order, then by offset.
    pub(super) fn ids(&self) -> impl Iterator<Item = TensorId> {
        let mut superseded = self.superseded.iter().peekable();
        let tensors = u32::try_from(self.numbers()).unwrap_or(u32::MAX);
        (0..tensors).filter(move |number| superseded.next_if_eq(&number).is_none()).map(TensorId)
    }

    /// Number of tensors that count.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// How many numbers there are, those of tensors that do not count included.
    pub(super) fn numbers(&self) -> usize {
        self.len + self.superseded.len()
    }

    /// The place of a tensor, if there is one of that name.
    pub(super) fn id(&self, name: &str) -> Option<TensorId> {
        self.lookup.find(name, |number| self.entry(TensorId(number)).1.name).map(TensorId)
    }

    /// The shard and entry of the tensor with this place.
    pub(super) fn entry(&self, id: TensorId) -> (&Shard, TensorEntry<'_>) {
        entry_of(&self.shards, &self.starts, id.0)
    }

    /// The number of the shard of the tensor with this place.
    pub(super) fn shard(&self, id: TensorId) -> usize {
        shard_of(&self.starts, id.0)
    }
}

/// The tensor with this number, of shards whose first ones have the numbers `starts`.
fn entry_of<'a>(shards: &'a [Shard], starts: &[u32], number: u32) -> (&'a Shard, TensorEntry<'a>) {
    let shard = shard_of(starts, number);
    let place = (number - starts[shard]) as usize;
    (&shards[shard], shards[shard].header.tensor(place))
}

/// The number of the shard that holds the tensor with this number.
fn shard_of(starts: &[u32], number: u32) -> usize {
    // A shard without tensors starts where the next one does: the last of them is the one.
    starts.partition_point(|&start| start <= number) - 1
}
