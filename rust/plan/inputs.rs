//! Inputs of one output tensor: where they lie, and what adapters do to them.

use crate::checkpoint::{Checkpoint, InputFile};
use crate::dtype::Float;
use crate::methods::Method;
use crate::{Error, Result};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// An input tensor. Its file is opened when its first byte is asked for, and let go with this value.
#[derive(Debug)]
pub struct Input {
    checkpoint: Arc<Checkpoint>,
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
    /// Finds a tensor of a checkpoint.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn find(checkpoint: &Arc<Checkpoint>, tensor: &str) -> Result<Self> {
        let (shard, entry) = checkpoint.locate(tensor)?;
        Ok(Self {
            checkpoint: Arc::clone(checkpoint),
            shard,
            file: OnceLock::new(),
            tensor: tensor.to_owned(),
            range: entry.range.clone(),
            dtype: entry.dtype,
            shape: entry.shape.to_vec(),
        })
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

    /// Its dtype, provided that it can be computed with.
    fn float(&self) -> Result<Float> {
        Float::from_safetensors(self.dtype).ok_or_else(|| {
            Error::Plan(format!(
                "tensor `{}` of {} has dtype {}, which can only be copied; BF16, F16, F32 and F64 can be merged",
                self.tensor,
                self.path().display(),
                self.dtype
            ))
        })
    }
}

/// An input tensor of floats, loaded as f32 whatever its dtype.
#[derive(Debug)]
pub struct FloatInput {
    /// The tensor.
    pub input: Input,
    /// Its dtype.
    pub dtype: Float,
}

impl FloatInput {
    /// The tensor, if it holds floats.
    ///
    /// # Errors
    /// [`Error::Plan`] if its dtype cannot be computed with.
    pub fn new(input: Input) -> Result<Self> {
        let dtype = input.float()?;
        Ok(Self { input, dtype })
    }

    /// The place of some elements among its bytes.
    #[must_use]
    pub fn place(&self, elements: &Range<usize>) -> Range<usize> {
        let size = self.dtype.size();
        elements.start * size..elements.end * size
    }
}

/// What a method reads: a tensor and the changes that an adapter makes to it, in the order of the fields.
#[derive(Debug)]
pub struct Operand {
    /// The tensor.
    pub tensor: FloatInput,
    /// Elements of a row: the last dimension.
    pub columns: usize,
    /// Rows that come from another tensor.
    pub rows: Option<Rows>,
    /// Products that are added.
    pub low_rank: Vec<LowRank>,
    /// Norms that the sum gets.
    pub magnitude: Option<Magnitude>,
}

/// Replaced rows.
#[derive(Debug)]
pub struct Rows {
    /// One row for each replaced one.
    pub tensor: FloatInput,
    /// Row of the operand to row of the tensor.
    pub places: BTreeMap<usize, usize>,
}

/// `scale·left·right`, shapes (rows, rank) and (rank, columns) of the stored matrix.
#[derive(Debug)]
pub struct LowRank {
    /// `A`, shape (rank, in).
    pub a: FloatInput,
    /// `B`, shape (out, rank).
    pub b: FloatInput,
    /// Columns of `B`.
    pub rank: usize,
    /// Factor of the product.
    pub scale: f32,
    /// Whether the stored matrix is (in, out).
    pub transpose: bool,
}

impl LowRank {
    /// The factor that has a row for each row of the stored matrix, or is the transpose of one that has.
    #[must_use]
    pub fn left(&self) -> &FloatInput {
        if self.transpose { &self.a } else { &self.b }
    }

    /// The other factor.
    #[must_use]
    pub fn right(&self) -> &FloatInput {
        if self.transpose { &self.b } else { &self.a }
    }
}

/// DoRA's magnitudes.
#[derive(Debug)]
pub struct Magnitude {
    /// One element for each output feature.
    pub tensor: FloatInput,
    /// Whether the output features are the columns of the stored matrix.
    pub transpose: bool,
}

impl Operand {
    /// A tensor as it is.
    ///
    /// # Errors
    /// [`Error::Plan`] if its dtype cannot be computed with.
    pub fn plain(input: Input) -> Result<Self> {
        Ok(Self {
            columns: input.shape.last().copied().unwrap_or(1),
            tensor: FloatInput::new(input)?,
            rows: None,
            low_rank: Vec::new(),
            magnitude: None,
        })
    }

    /// Whether it is a tensor as it is stored.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.rows.is_none() && self.low_rank.is_empty() && self.magnitude.is_none()
    }

    /// All the tensors behind it.
    pub fn inputs(&self) -> impl Iterator<Item = &Input> {
        let factors = self.low_rank.iter().flat_map(|term| [&term.a, &term.b]);
        [&self.tensor]
            .into_iter()
            .chain(self.rows.iter().map(|rows| &rows.tensor))
            .chain(factors)
            .chain(self.magnitude.iter().map(|magnitude| &magnitude.tensor))
            .map(|tensor| &tensor.input)
    }
}

/// One output tensor, with all that is needed to make it.
#[derive(Debug)]
pub struct OutputTensor {
    /// Its name.
    pub name: String,
    /// Its bytes within the output file.
    pub range: Range<usize>,
    /// How they come about.
    pub operation: Operation,
}

/// What fills a tensor.
#[derive(Debug)]
pub enum Operation {
    /// The input's bytes as they are.
    Copy(Input),
    /// A method over operands of one shape, rounded once to the dtype.
    Compute(Computation),
}

/// A method and what it works on.
#[derive(Debug)]
pub struct Computation {
    /// How the operands become one.
    pub method: Box<dyn Method>,
    /// What it reads; the base, if there is one, is the last.
    pub operands: Vec<Operand>,
    /// Whether there is a base.
    pub has_base: bool,
    /// The dtype of the result.
    pub dtype: Float,
}

impl Operation {
    /// All the tensors that are read.
    pub fn inputs(&self) -> impl Iterator<Item = &Input> {
        let (copied, operands) = match self {
            Self::Copy(input) => (Some(input), [].as_slice()),
            Self::Compute(computation) => (None, computation.operands.as_slice()),
        };
        copied.into_iter().chain(operands.iter().flat_map(Operand::inputs))
    }
}
