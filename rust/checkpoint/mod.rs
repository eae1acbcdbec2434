//! Checkpoints on disk: which shards they have, what those hold, and their bytes, opened on demand.

mod advice;
mod encoding;
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
mod remote;
mod stored;
mod weight_map;

pub use encoding::{Blocks, Encoding, Format, Global, LogicalTensor, Scales};
pub use header::{Header, TensorEntry};
pub use identity::{FileIdentity, StatedIdentity};
pub(crate) use index::check_file_name;
pub use limits::MOST_TENSORS;
pub use mapping::MappedFile;
pub use reader::{InputFile, ReadBackend};
pub use regular::file_digest;
pub(crate) use remote::bound as bound_blocks;
#[cfg(feature = "remote")]
pub use remote::mount_store;
pub use remote::{is_url, normal_url};
pub use stored::{Shard, TensorId};

use crate::code::GlobalScale;
use crate::{Error, Result};
use encoding::Listing;
use reader::OpenFiles;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use stored::Stored;
use weight_map::WeightMap;

/// A checkpoint: a directory of shards, or one file.
///
/// 200,000 tensors take some 60 bytes each, and their names.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    index: Option<String>,
    stored: Stored,
    logical: OnceLock<Listing>,
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
        let absolute = if is_url(path) {
            normal_url(path)?
        } else {
            std::path::absolute(path).map_err(|e| Error::read(path, e))?
        };
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
        if is_url(&path) {
            // What an earlier job has bounded is not this one's; its own bound is set when its work begins.
            bound_blocks(None);
        }
        let stored = Stored::open(&path, index.as_deref(), files, weight_map)?;
        let (logical, files) = (OnceLock::new(), OpenFiles::new(backend));
        Ok(Self { path, index, stored, logical, files })
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
        self.stored.shards()
    }

    /// The places of all stored tensors, in file order, then by offset.
    pub fn ids(&self) -> impl Iterator<Item = TensorId> {
        self.stored.ids()
    }

    /// Every stored tensor with its shard, in file order, then by offset.
    pub fn tensors(&self) -> impl Iterator<Item = (&Shard, TensorEntry<'_>)> {
        self.ids().map(|id| self.entry(id))
    }

    /// Number of stored tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stored.len()
    }

    /// Whether there is no tensor at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The place of a stored tensor, if the checkpoint has it.
    #[must_use]
    pub fn id(&self, name: &str) -> Option<TensorId> {
        self.stored.id(name)
    }

    /// The shard and entry of the tensor with this place, which must be one of this checkpoint.
    ///
    /// # Panics
    /// If it is another's, and beyond the last tensor of this one.
    #[must_use]
    pub fn entry(&self, id: TensorId) -> (&Shard, TensorEntry<'_>) {
        self.stored.entry(id)
    }

    /// The number of the shard that holds the tensor with this place.
    #[must_use]
    pub fn shard_of(&self, id: TensorId) -> usize {
        self.stored.shard(id)
    }

    /// The tensors that a model is made of, in file order: a quantised one stands once, under its own name, where its
    /// codes lie; what belongs to it is not listed.
    ///
    /// # Errors
    /// Those of [`Checkpoint::encoding`], of any tensor.
    pub fn logical(&self) -> Result<impl Iterator<Item = LogicalTensor<'_>>> {
        let listing = self.listing()?;
        Ok(self.ids().filter_map(|id| listing.logical(&self.stored, id)))
    }

    /// The tensor with this name as [`Checkpoint::logical`] lists it, if it does.
    ///
    /// # Errors
    /// Those of [`Checkpoint::logical`].
    pub fn logical_tensor(&self, name: &str) -> Result<Option<LogicalTensor<'_>>> {
        Ok(self.listing()?.find(&self.stored, name))
    }

    /// How the tensor of this name is encoded; `None` if it is plain, is unknown, or no known format claims it.
    ///
    /// It is found from names, dtypes and shapes.
    ///
    /// # Errors
    /// [`Error::Unusable`] if it is a part of a known format that does not fit together.
    pub fn encoding(&self, name: &str) -> Result<Option<Encoding>> {
        match self.logical_tensor(name)? {
            Some(LogicalTensor { id, encoded: true, .. }) => self.encoding_of(id),
            _ => Ok(None),
        }
    }

    /// As [`Checkpoint::encoding`], of the tensor whose codes have this place.
    ///
    /// # Errors
    /// Those of [`Checkpoint::encoding`].
    pub fn encoding_of(&self, codes: TensorId) -> Result<Option<Encoding>> {
        self.listing()?.encoding(&self.stored, codes)
    }

    /// Checks what the bytes of a quantised tensor's parts say: the shape that is stored as a tensor, if one is.
    ///
    /// # Errors
    /// [`Error::Unusable`] if it is not the one that dtypes and shapes say; those of reading.
    pub fn check_encoding(&self, encoding: &Encoding) -> Result<()> {
        encoding::check_stated_shape(&self.stored, encoding, |id, bytes| self.read(id, bytes))
    }

    /// The global scale of a matrix of a quantised tensor, if it has one.
    ///
    /// # Errors
    /// [`Error::Unusable`] if it is not a positive number of a usable size; those of reading.
    pub fn global_scale(&self, encoding: &Encoding, matrix: usize) -> Result<Option<GlobalScale>> {
        encoding::global_scale(&self.stored, encoding, matrix, |id, bytes| self.read(id, bytes))
    }

    /// The bytes of a stored tensor.
    fn read(&self, id: TensorId, bytes: &mut [u8]) -> Result<()> {
        self.file(self.shard_of(id))?.read(self.entry(id).1.range, bytes)
    }

    /// What is listed, found when it is first asked for.
    fn listing(&self) -> Result<&Listing> {
        if let Some(listing) = self.logical.get() {
            return Ok(listing);
        }
        let listing = Listing::new(&self.stored)?;
        Ok(self.logical.get_or_init(|| listing))
    }

    /// The shard and entry of a stored tensor, if the checkpoint has it.
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
        Ok((self.shard_of(id), self.entry(id).1))
    }

    /// How the data is read, of a checkpoint that lies here.
    #[must_use]
    pub fn backend(&self) -> ReadBackend {
        self.files.backend()
    }

    /// Whether it lies in a store or on a server.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        is_url(&self.path)
    }

    /// The open file of the shard with this number, for merge and analysis alike. It is closed some time after the last
    /// user has let it go.
    ///
    /// # Errors
    /// Those of [`InputFile::open`].
    pub fn file(&self, shard: usize) -> Result<Arc<InputFile>> {
        let Shard { path, header, .. } = &self.shards()[shard];
        self.files.get(shard, path, &header.identity)
    }

    /// Names and sizes of the objects of a directory in a store; of a plain server those of the usual weights alone.
    ///
    /// # Errors
    /// [`Error::Remote`], and [`Error::Unusable`] if it is not an address that can be read.
    pub fn listed(url: &Path) -> Result<Vec<(String, u64)>> {
        remote::listed(url)
    }

    /// Copies small files of a directory in a store or on a server into a local one, and returns the names of those that
    /// were there.
    ///
    /// # Errors
    /// [`Error::Remote`], [`Error::Write`], and [`Error::Unusable`] if one has more than `most` bytes.
    pub fn fetch_small(
        url: &Path,
        names: &[String],
        directory: &Path,
        most: u64,
    ) -> Result<Vec<String>> {
        let found = remote::fetch_small(url, names, most)?;
        let mut there = Vec::new();
        for (name, bytes) in names.iter().zip(found) {
            let Some(bytes) = bytes else { continue };
            let path = directory.join(name);
            std::fs::write(&path, &bytes).map_err(|e| Error::write(&path, e))?;
            there.push(name.clone());
        }
        Ok(there)
    }

    /// Checks that size, times and inode of every shard are those seen when the checkpoint was opened.
    ///
    /// # Errors
    /// Those of [`Shard::check_unchanged`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards().iter().try_for_each(Shard::check_unchanged)
    }
}
