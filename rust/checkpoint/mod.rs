//! Checkpoints on disk: which shards they have, what those hold, and their bytes, opened on demand.

mod advice;
mod header;
mod header_json;
mod identity;
mod index;
mod json;
mod limits;
mod lookup;
mod mapping;
mod reader;
mod regular;
mod weight_map;

pub use header::{Header, TensorEntry};
pub use identity::{FileIdentity, StatedIdentity};
pub(crate) use index::check_file_name;
pub use limits::MOST_TENSORS;
pub use mapping::MappedFile;
pub use reader::{InputFile, ReadBackend};
pub use regular::file_digest;

use crate::error::printable;
use crate::{Error, Result};
use lookup::Lookup;
use reader::OpenFiles;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use weight_map::WeightMap;

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

    /// Checks that size, times and inode are those seen when the header was read.
    ///
    /// # Errors
    /// [`Error::InputChanged`] if one differs, [`Error::Read`] if the file is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        let metadata = std::fs::metadata(&self.path).map_err(|e| Error::read(&self.path, e))?;
        self.header.identity.check_metadata(&self.path, &metadata)
    }
}

/// The place of a tensor in a checkpoint: tensors are numbered in file order, then by offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorId(u32);

/// A checkpoint: a directory of shards, or one file.
///
/// 200,000 tensors take some 60 bytes each, and their names.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    index: Option<String>,
    shards: Vec<Shard>,
    /// For each shard, the number of its first tensor.
    starts: Vec<u32>,
    lookup: Lookup,
    /// Numbers of tensors that do not count, since the index names another shard for them; ascending.
    superseded: Vec<u32>,
    len: usize,
    files: OpenFiles,
}

impl Checkpoint {
    /// As [`Checkpoint::open_with`], read as seems best.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open_with`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, ReadBackend::Auto)
    }

    /// Reads and validates the headers of all shards of a directory, or of one `.safetensors` file.
    ///
    /// # Errors
    /// If the path is missing, no weights are found, the index is unusable or names a tensor that its shard lacks, any
    /// header is invalid, or there are more than [`MOST_TENSORS`]. Nothing of the tensors' data is read.
    pub fn open_with(path: &Path, backend: ReadBackend) -> Result<Self> {
        let absolute = std::path::absolute(path).map_err(|e| Error::read(path, e))?;
        let found = index::find(&absolute)?;
        let places = found.weight_map.as_ref();
        Self::from_files(found.directory, found.index, &found.files, places, backend)
    }

    /// Opens just these files of a directory, as a plan names them.
    ///
    /// # Errors
    /// As [`Checkpoint::open_with`], and if a name is not that of a file in this very directory.
    pub fn open_files<'a>(
        directory: &Path,
        files: impl IntoIterator<Item = &'a String>,
        backend: ReadBackend,
    ) -> Result<Self> {
        let files: Vec<String> = files.into_iter().cloned().collect();
        for file in &files {
            check_file_name(directory, file)?;
        }
        Self::from_files(directory.to_owned(), None, &files, None, backend)
    }

    fn from_files(
        path: PathBuf,
        index: Option<String>,
        files: &[String],
        weight_map: Option<&WeightMap>,
        backend: ReadBackend,
    ) -> Result<Self> {
        let mut shards = Vec::with_capacity(files.len());
        let mut starts = Vec::with_capacity(files.len());
        let mut total = 0;
        for file in files {
            let shard = Shard::open(&path, file)?;
            starts.push(u32::try_from(total).unwrap_or(u32::MAX));
            total += shard.header.len();
            if total > MOST_TENSORS {
                let problem =
                    format!("its files hold more than {MOST_TENSORS} tensors, the most allowed");
                return Err(Error::Unusable { path, problem });
            }
            shards.push(shard);
        }
        let (lookup, superseded, len) = (Lookup::with_capacity(total), Vec::new(), total);
        let files = OpenFiles::new(backend);
        let mut checkpoint = Self { path, index, shards, starts, lookup, superseded, len, files };
        checkpoint.number_tensors(weight_map)?;
        Ok(checkpoint)
    }

    /// Enters all tensors into the lookup table.
    fn number_tensors(&mut self, weight_map: Option<&WeightMap>) -> Result<()> {
        let Self { path, shards, starts, lookup, superseded, .. } = self;
        let (path, shards, starts) = (&*path, &**shards, &**starts);
        let name_of = |number: u32| entry_of(shards, starts, number).1.name;
        let mut number = 0;
        for shard in shards.iter() {
            for tensor in shard.header.tensors() {
                let mapped = weight_map.and_then(|map| map.file(tensor.name));
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
        if let (Some(map), Some(index)) = (weight_map, &self.index)
            && let Some((tensor, file)) = map.iter().find(|(tensor, _)| self.id(tensor).is_none())
        {
            return Err(Error::index(
                &self.path.join(index),
                format!(
                    "it places tensor `{}` in {}, which does not hold it; download the checkpoint again",
                    printable(tensor),
                    printable(file)
                ),
            ));
        }
        Ok(())
    }

    /// The directory that holds the shards, absolute.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// File name of the index, if there is one.
    #[must_use]
    pub fn index(&self) -> Option<&str> {
        self.index.as_deref()
    }

    /// The shards, in the order of their names.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The places of all tensors, in file order, then by offset.
    pub fn ids(&self) -> impl Iterator<Item = TensorId> {
        let mut superseded = self.superseded.iter().peekable();
        let tensors = self.len + self.superseded.len();
        (0..u32::try_from(tensors).unwrap_or(u32::MAX))
            .filter(move |number| superseded.next_if_eq(&number).is_none())
            .map(TensorId)
    }

    /// Every tensor with its shard, in file order, then by offset.
    pub fn tensors(&self) -> impl Iterator<Item = (&Shard, TensorEntry<'_>)> {
        self.ids().map(|id| self.entry(id))
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no tensor at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The place of a tensor, if the checkpoint has it.
    #[must_use]
    pub fn id(&self, name: &str) -> Option<TensorId> {
        self.lookup.find(name, |number| self.entry(TensorId(number)).1.name).map(TensorId)
    }

    /// The shard and entry of the tensor with this place, which must be one of this checkpoint.
    ///
    /// # Panics
    /// If it is another's, and beyond the last tensor of this one.
    #[must_use]
    pub fn entry(&self, id: TensorId) -> (&Shard, TensorEntry<'_>) {
        entry_of(&self.shards, &self.starts, id.0)
    }

    /// The shard and entry of a tensor, if the checkpoint has it.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<(&Shard, TensorEntry<'_>)> {
        self.id(name).map(|id| self.entry(id))
    }

    /// As [`Checkpoint::find`], for callers to whom absence is an error.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn get(&self, name: &str) -> Result<(&Shard, TensorEntry<'_>)> {
        self.find(name).ok_or_else(|| self.absent(name))
    }

    /// The error that there is no such tensor.
    #[must_use]
    pub fn absent(&self, name: &str) -> Error {
        Error::NoTensor { path: self.path.clone(), tensor: name.to_owned() }
    }

    /// As [`Checkpoint::get`], with the shard's number.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn locate(&self, name: &str) -> Result<(usize, TensorEntry<'_>)> {
        let id = self.id(name).ok_or_else(|| self.absent(name))?;
        Ok((shard_of(&self.starts, id.0), self.entry(id).1))
    }

    /// How the data is read.
    #[must_use]
    pub fn backend(&self) -> ReadBackend {
        self.files.backend()
    }

    /// The open file of the shard with this number, for merge and analysis alike. It is closed some time after the last
    /// user has let it go.
    ///
    /// # Errors
    /// Those of [`InputFile::open`].
    pub fn file(&self, shard: usize) -> Result<Arc<InputFile>> {
        let Shard { path, header, .. } = &self.shards[shard];
        self.files.get(shard, path, &header.identity)
    }

    /// Checks that size, times and inode of every shard are those seen when the checkpoint was opened.
    ///
    /// # Errors
    /// Those of [`Shard::check_unchanged`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards.iter().try_for_each(Shard::check_unchanged)
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
