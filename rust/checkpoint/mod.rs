//! Checkpoints on disk: which shards they have, what those hold, and their bytes, opened on demand.

mod header;
mod index;
mod mapping;
mod reader;

pub use header::{FileIdentity, Header, TensorEntry};
pub use mapping::MappedFile;
pub use reader::{InputFile, ReadBackend};

use crate::{Error, Result};
use reader::OpenFiles;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

    /// Whether size or modification time differ from those seen when the header was read.
    ///
    /// # Errors
    /// [`Error::InputChanged`] if so, [`Error::Read`] if the file is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        let metadata = std::fs::metadata(&self.path).map_err(|e| Error::read(&self.path, e))?;
        self.header.identity.matches_metadata(&self.path, &metadata)
    }
}

/// A checkpoint: a directory of shards, or one file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    index: Option<String>,
    shards: Vec<Shard>,
    places: HashMap<String, (usize, usize)>,
    files: OpenFiles,
}

impl Checkpoint {
    /// Reads and validates the headers of all shards of a directory, or of one `.safetensors` file.
    ///
    /// # Errors
    /// If the path is missing, no weights are found, the index is unusable or names a tensor that its shard lacks, or
    /// any header is invalid. Nothing of the tensors' data is read.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, ReadBackend::Auto)
    }

    /// As [`Checkpoint::open`]; says how the data will be read.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(path: &Path, backend: ReadBackend) -> Result<Self> {
        let absolute = std::path::absolute(path).map_err(|e| Error::read(path, e))?;
        let found = index::find(&absolute)?;
        let weight_map = found.weight_map.as_ref();
        Self::from_files(found.directory, found.index, &found.files, weight_map, backend)
    }

    /// Opens just these files of a directory, as a plan names them.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and if a name is not that of a file in this very directory.
    pub fn open_files<'a>(
        directory: &Path,
        files: impl IntoIterator<Item = &'a String>,
        backend: ReadBackend,
    ) -> Result<Self> {
        let files: Vec<String> = files.into_iter().cloned().collect();
        for file in &files {
            index::check_file_name(directory, file)?;
        }
        Self::from_files(directory.to_owned(), None, &files, None, backend)
    }

    fn from_files(
        path: PathBuf,
        index: Option<String>,
        files: &[String],
        weight_map: Option<&index::WeightMap>,
        backend: ReadBackend,
    ) -> Result<Self> {
        let shards: Vec<Shard> =
            files.iter().map(|file| Shard::open(&path, file)).collect::<Result<_>>()?;
        let mut places = HashMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for (position, tensor) in shard.header.tensors.iter().enumerate() {
                let mapped = weight_map.and_then(|map| map.get(&tensor.name));
                if mapped.is_some_and(|file| file != &shard.name) {
                    // The index decides where a tensor stands twice; loaders follow it, and so do we.
                    continue;
                }
                if let Some((first, _)) = places.insert(tensor.name.clone(), (number, position)) {
                    let first: &Shard = &shards[first];
                    return Err(Error::index(
                        &path,
                        format!(
                            "tensor `{}` stands in both {} and {}, and nothing says which counts",
                            tensor.name, first.name, shard.name
                        ),
                    ));
                }
            }
        }
        if let (Some(map), Some(index)) = (weight_map, &index)
            && let Some((tensor, file)) =
                map.iter().find(|(tensor, _)| !places.contains_key(*tensor))
        {
            return Err(Error::index(
                &path.join(index),
                format!(
                    "it places tensor `{tensor}` in {file}, which does not hold it; download the checkpoint again"
                ),
            ));
        }
        Ok(Self { path, index, shards, places, files: OpenFiles::new(backend) })
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

    /// Every tensor with its shard, in file order, then by offset.
    pub fn tensors(&self) -> impl Iterator<Item = (&Shard, &TensorEntry)> {
        self.shards.iter().enumerate().flat_map(move |(number, shard)| {
            shard.header.tensors.iter().enumerate().filter_map(move |(position, tensor)| {
                (self.places.get(&tensor.name) == Some(&(number, position)))
                    .then_some((shard, tensor))
            })
        })
    }

    /// Number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is no tensor at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The shard and entry of a tensor, if the checkpoint has it.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<(&Shard, &TensorEntry)> {
        self.places.get(name).map(|&(shard, tensor)| {
            (&self.shards[shard], &self.shards[shard].header.tensors[tensor])
        })
    }

    /// As [`Checkpoint::find`], for callers to whom absence is an error.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn get(&self, name: &str) -> Result<(&Shard, &TensorEntry)> {
        self.find(name)
            .ok_or_else(|| Error::NoTensor { path: self.path.clone(), tensor: name.to_owned() })
    }

    /// As [`Checkpoint::get`], with the shard's number.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn locate(&self, name: &str) -> Result<(usize, &TensorEntry)> {
        match self.places.get(name) {
            Some(&(shard, tensor)) => Ok((shard, &self.shards[shard].header.tensors[tensor])),
            None => Err(Error::NoTensor { path: self.path.clone(), tensor: name.to_owned() }),
        }
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
}
