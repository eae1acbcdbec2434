//! Inputs of one output tensor: where they lie, and what adapters do to them.

use super::schema;
use super::view::{Order, Region, View};
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
        let (shard, entry) = checkpoint.locate(tensor)?;
        Ok(Self {
            checkpoint: Arc::clone(checkpoint),
            source: Arc::clone(source),
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
}

/// An input tensor of floats, or a part of one, loaded as f32 whatever its dtype.
#[derive(Debug)]
pub struct FloatInput {
    /// The tensor.
    pub input: Input,
    /// How its elements are stored.
    pub stored: Stored,
    /// Which of them are meant, and in which order; `None` for all.
    pub view: Option<View>,
    /// Dimensions, of the view if there is one.
    pub shape: Vec<usize>,
}

/// How elements are stored.
#[derive(Debug)]
pub enum Stored {
    /// As numbers.
    Plain(Float),
}

impl FloatInput {
    /// The tensor, if it holds floats; what is stated of its view must fit.
    ///
    /// # Errors
    /// [`Error::Plan`] if its dtype cannot be computed with, or the view does not lie within it.
    pub fn new(input: Input, view: Option<&schema::View>) -> Result<Self> {
        let Some(float) = Float::from_safetensors(input.dtype) else {
            return Err(Error::Plan(format!(
                "tensor `{}` of {} has dtype {}, which can only be copied; BF16, F16, F32 and F64 can be merged",
                input.tensor,
                input.path().display(),
                input.dtype
            )));
        };
        let shape = view.map_or_else(|| input.shape.clone(), |view| view.shape.clone());
        let elements = input.shape.iter().product();
        let view = view.map(|view| View::new(view, elements)).transpose().map_err(|problem| {
            let (tensor, path) = (&input.tensor, input.path().display());
            Error::Plan(format!("tensor `{tensor}` of {path}: {problem}"))
        })?;
        Ok(Self { input, stored: Stored::Plain(float), view, shape })
    }

    /// Number of its elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Its dtype, if it is a whole tensor of plain numbers.
    #[must_use]
    pub fn as_plain(&self) -> Option<Float> {
        match self {
            Self { view: None, stored: Stored::Plain(float), .. } => Some(*float),
            _ => None,
        }
    }

    /// Bytes among which one of its elements is read, rounded up.
    #[must_use]
    pub fn width(&self) -> usize {
        let Stored::Plain(float) = self.stored;
        let apart = match &self.view {
            Some(view) if matches!(view.order(), Order::Spread(_)) => view.stride(),
            _ => 1,
        };
        float.size() * apart
    }

    /// Bytes of it that are read, each once.
    #[must_use]
    pub fn bytes_read(&self) -> usize {
        self.stored_bytes(&(0..self.len())).len()
    }

    /// Bytes of the stored tensor that some of its stored elements take.
    #[must_use]
    pub fn stored_bytes(&self, elements: &Range<usize>) -> Range<usize> {
        match self.stored {
            Stored::Plain(float) => elements.start * float.size()..elements.end * float.size(),
        }
    }

    /// Bytes of the stored tensor among which those of some elements lie, with others between them.
    #[must_use]
    pub fn bounds(&self, elements: &Range<usize>) -> Range<usize> {
        match &self.view {
            Some(view) => self.stored_bytes(&view.bounds(elements)),
            None => self.stored_bytes(elements),
        }
    }

    /// Bytes to be read soon for some elements; none where they lie too far apart.
    #[must_use]
    pub fn ahead(&self, elements: &Range<usize>) -> Option<Range<usize>> {
        let order = self.view.as_ref().map_or(Order::Runs, View::order);
        (!matches!(order, Order::Across(_))).then(|| self.bounds(elements))
    }

    /// Bytes that are not needed any more when some elements have been read, in ascending order, by one of several
    /// workers. Of what is read across, a part is needed again and again.
    #[must_use]
    pub fn done(&self, elements: &Range<usize>) -> Option<Range<usize>> {
        let order = self.view.as_ref().map_or(Order::Runs, View::order);
        match order {
            Order::Across(_) if elements.end < self.len() => None,
            Order::Across(_) => Some(self.bounds(&(0..self.len()))),
            _ => Some(self.bounds(elements)),
        }
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
    #[must_use]
    pub fn plain(tensor: FloatInput) -> Self {
        Self {
            columns: tensor.shape.last().copied().unwrap_or(1),
            tensor,
            rows: None,
            low_rank: Vec::new(),
            magnitude: None,
        }
    }

    /// Whether it is a tensor as it is stored.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.rows.is_none() && self.low_rank.is_empty() && self.magnitude.is_none()
    }

    /// All that is read for it.
    pub fn parts(&self) -> impl Iterator<Item = &FloatInput> {
        let factors = self.low_rank.iter().flat_map(|term| [&term.a, &term.b]);
        [&self.tensor]
            .into_iter()
            .chain(self.rows.iter().map(|rows| &rows.tensor))
            .chain(factors)
            .chain(self.magnitude.iter().map(|magnitude| &magnitude.tensor))
    }

    /// All the tensors that are read, and how many bytes of each.
    fn reads(&self) -> impl Iterator<Item = (&Input, usize)> {
        self.parts().map(|part| (&part.input, part.bytes_read()))
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
    /// Pieces, each by a method over operands of one shape; rounded once.
    Compute(Assembly),
}

/// A tensor that is computed.
#[derive(Debug)]
pub struct Assembly {
    /// What it consists of. Together they fill it, and each element is one's.
    pub pieces: Vec<Piece>,
    /// Number of its elements.
    pub elements: usize,
    /// The dtype of the result.
    pub dtype: Float,
}

/// A part of a tensor that is computed by itself.
#[derive(Debug)]
pub struct Piece {
    /// Which elements of the tensor it fills.
    pub region: Region,
    /// How.
    pub computation: Computation,
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
}

impl Operation {
    /// All the tensors that are read, and how many bytes of each.
    pub fn reads(&self) -> impl Iterator<Item = (&Input, usize)> {
        let (copied, pieces) = match self {
            Self::Copy(input) => (Some((input, input.range.len())), [].as_slice()),
            Self::Compute(assembly) => (None, assembly.pieces.as_slice()),
        };
        let operands = pieces.iter().flat_map(|piece| &piece.computation.operands);
        copied.into_iter().chain(operands.flat_map(Operand::reads))
    }
}
