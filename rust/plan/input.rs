//! Stored tensors of inputs: where they lie.

use crate::Result;
use crate::checkpoint::{Checkpoint, InputFile, TensorId};
use safetensors::Dtype;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// An input tensor. Its file is opened when its first byte is asked for, and let go with this value.
#[derive(Debug)]
pub struct Input {
    checkpoint: Arc<Checkpoint>,
    /// What the plan calls the checkpoint.
    pub source: Arc<str>,
    /// Number of its shard in the checkpoint.
    shard: usize,
    file: OnceLock<Arc<InputFile>>,
    /// The tensor's name there.
    pub tensor: String,
    /// Its bytes within the shard.
    pub range: Range<usize>,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl Input {
    /// Finds a tensor of the checkpoint that is called `source`.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn find(checkpoint: &Arc<Checkpoint>, source: &Arc<str>, tensor: &str) -> Result<Self> {
        let id = checkpoint.id(tensor).ok_or_else(|| checkpoint.absent(tensor))?;
        Ok(Self::at(checkpoint, source, id))
    }

    /// The stored tensor with this place in the checkpoint that is called `source`.
    #[must_use]
    pub fn at(checkpoint: &Arc<Checkpoint>, source: &Arc<str>, id: TensorId) -> Self {
        let (_, entry) = checkpoint.entry(id);
        Self {
            checkpoint: Arc::clone(checkpoint),
            source: Arc::clone(source),
            shard: checkpoint.shard_of(id),
            file: OnceLock::new(),
            tensor: entry.name.to_owned(),
            range: entry.range.clone(),
            dtype: entry.dtype,
            shape: entry.shape.to_vec(),
        }
    }

    /// Number of its shard in the checkpoint.
    #[must_use]
    pub fn shard(&self) -> usize {
        self.shard
    }

    /// Where its shard is, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.checkpoint.shards()[self.shard].path
    }

    /// The open file.
    ///
    /// # Errors
    /// Those of [`Checkpoint::file`].
    pub fn file(&self) -> Result<&Arc<InputFile>> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = self.checkpoint.file(self.shard)?;
        Ok(self.file.get_or_init(|| file))
    }

    /// Its bytes, if the file is mapped.
    ///
    /// # Errors
    /// Those of [`Checkpoint::file`].
    pub fn mapped(&self) -> Result<Option<&[u8]>> {
        Ok(self.file()?.mapped().map(|bytes| &bytes[self.range.clone()]))
    }

    /// Reads some of its bytes into `out`, which is as long.
    ///
    /// # Errors
    /// Those of [`InputFile::read`].
    pub fn read(&self, bytes: &Range<usize>, out: &mut [u8]) -> Result<()> {
        self.file()?.read(self.place(bytes), out)
    }

    /// Gives the pages of some of its bytes back.
    pub fn release(&self, bytes: &Range<usize>) {
        if let Some(file) = self.file.get() {
            file.release(self.place(bytes));
        }
    }

    /// Starts to read some of its bytes, if its file is or can be mapped; whoever reads them will meet the error if not.
    pub fn prefetch(&self, bytes: &Range<usize>) {
        if let Ok(file) = self.file() {
            file.prefetch(self.place(bytes));
        }
    }

    /// The place of some of its bytes in the file.
    #[must_use]
    pub fn place(&self, bytes: &Range<usize>) -> Range<usize> {
        self.range.start + bytes.start..self.range.start + bytes.end
    }
}
