//! Inputs of one output tensor: where they lie, and what adapters do to them.

use super::encoded::{Encoded, EncodedTarget};
use super::schema;
use super::view::{Order, Region, View};
use crate::checkpoint::{Checkpoint, InputFile, TensorId};
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
    /// As codes, to be multiplied by scales.
    Encoded(Box<Encoded>),
}

impl FloatInput {
    /// The tensor of this name of the checkpoint that is called `source`, plain or quantised; what is stated of its view
    /// must fit.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Plan`] if it cannot be computed with, or the view does not lie within it; those of
    /// [`Checkpoint::encoding`].
    pub fn find(
        checkpoint: &Arc<Checkpoint>,
        source: &Arc<str>,
        tensor: &str,
        view: Option<&schema::View>,
    ) -> Result<Self> {
        let input = checkpoint.id(tensor).map(|id| Input::at(checkpoint, source, id));
        let float = input.as_ref().and_then(|input| Float::from_safetensors(input.dtype));
        if let (Some(input), Some(float)) = (input, float) {
            let shape = input.shape.clone();
            return Self::of(input, Stored::Plain(float), shape, view);
        }
        let Some(encoding) = checkpoint.encoding(tensor)? else {
            let input = Input::find(checkpoint, source, tensor)?;
            return Err(Error::Plan(format!(
                "tensor `{}` of {} has dtype {}, which can only be copied; BF16, F16, F32, F64 and the quantised \
                 formats that are documented can be merged",
                input.tensor,
                input.path().display(),
                input.dtype
            )));
        };
        let (codes, shape) =
            (Input::at(checkpoint, source, encoding.codes), encoding.shape.clone());
        let encoded = Encoded::new(checkpoint, source, encoding)?;
        Self::of(codes, Stored::Encoded(Box::new(encoded)), shape, view)
    }

    fn of(
        input: Input,
        stored: Stored,
        whole: Vec<usize>,
        view: Option<&schema::View>,
    ) -> Result<Self> {
        let Some(stated) = view else {
            return Ok(Self { input, stored, view: None, shape: whole });
        };
        let view = View::new(stated, whole.iter().product()).map_err(|problem| {
            let (tensor, path) = (&input.tensor, input.path().display());
            Error::Plan(format!("tensor `{tensor}` of {path}: {problem}"))
        })?;
        Ok(Self { input, stored, view: Some(view), shape: stated.shape.clone() })
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
        let size = match &self.stored {
            Stored::Plain(float) => float.size(),
            // A code of at most one byte, and as much again for its part of a scale.
            Stored::Encoded(_) => 2,
        };
        let apart = match &self.view {
            Some(view) if matches!(view.order(), Order::Spread(_)) => view.stride(),
            _ => 1,
        };
        size * apart
    }

    /// The tensors that are read for it, and how many bytes of each.
    pub fn reads(&self) -> impl Iterator<Item = (&Input, usize)> {
        // Of a view, as many bytes as its elements take.
        let elements = 0..self.len();
        let codes = (&self.input, self.stored_bytes(&elements).len());
        let scales = self.scales();
        let scales =
            scales.map(|(encoded, scales)| (scales, encoded.scale_bounds(&elements).len()));
        [codes].into_iter().chain(scales)
    }

    /// Its scales, if it is quantised and has any.
    fn scales(&self) -> Option<(&Encoded, &Input)> {
        match &self.stored {
            Stored::Encoded(encoded) => Some((encoded, encoded.scales.as_ref()?)),
            Stored::Plain(_) => None,
        }
    }

    /// Bytes of the stored tensor that some of its stored elements take.
    #[must_use]
    pub fn stored_bytes(&self, elements: &Range<usize>) -> Range<usize> {
        match &self.stored {
            Stored::Plain(float) => elements.start * float.size()..elements.end * float.size(),
            Stored::Encoded(encoded) => encoded.encoding.code_range(elements.clone()),
        }
    }

    /// The tensors and their bytes among which some elements lie, with others between them.
    pub fn bounds<'a>(
        &'a self,
        elements: &Range<usize>,
    ) -> impl Iterator<Item = (&'a Input, Range<usize>)> + use<'a> {
        let stored = match &self.view {
            Some(view) => view.bounds(elements),
            None => elements.clone(),
        };
        let codes = (&self.input, self.stored_bytes(&stored));
        let scales = self.scales().map(|(encoded, scales)| (scales, encoded.scale_bounds(&stored)));
        [codes].into_iter().chain(scales)
    }

    /// Starts to read what some elements need, unless they lie too far apart.
    pub fn prefetch(&self, elements: &Range<usize>) {
        if !self.is_across() {
            self.bounds(elements).for_each(|(input, bytes)| input.prefetch(&bytes));
        }
    }

    /// Gives the pages of some elements back.
    pub fn release(&self, elements: &Range<usize>) {
        self.bounds(elements).for_each(|(input, bytes)| input.release(&bytes));
    }

    /// What is not needed any more when some elements have been read, in ascending order, by one of several workers. Of
    /// what is read across, a part is needed again and again.
    pub fn done<'a>(
        &'a self,
        elements: &Range<usize>,
    ) -> impl Iterator<Item = (&'a Input, Range<usize>)> + use<'a> {
        let elements = match self.is_across() {
            false => Some(elements.clone()),
            true => (elements.end == self.len()).then(|| 0..self.len()),
        };
        elements.into_iter().flat_map(move |elements| self.bounds(&elements))
    }

    fn is_across(&self) -> bool {
        self.view.as_ref().is_some_and(|view| matches!(view.order(), Order::Across(_)))
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
        self.parts().flat_map(FloatInput::reads)
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
    /// What it is stored as.
    pub target: Target,
}

/// What a computed tensor is stored as.
#[derive(Debug)]
pub enum Target {
    /// Numbers, each rounded once.
    Plain(Float),
    /// A part of a quantised tensor.
    Encoded(Box<EncodedTarget>),
}

impl Assembly {
    /// The dtype of its numbers; of what is quantised, that of the arithmetic.
    #[must_use]
    pub fn dtype(&self) -> Float {
        match &self.target {
            Target::Plain(float) => *float,
            Target::Encoded(_) => Float::F32,
        }
    }

    /// The elements that some of its bytes are part of, or depend on.
    #[must_use]
    pub fn elements_of(&self, bytes: &Range<usize>) -> Range<usize> {
        match &self.target {
            Target::Plain(float) => bytes.start / float.size()..bytes.end.div_ceil(float.size()),
            Target::Encoded(target) => target.elements_of(bytes),
        }
    }
}

/// A part of a tensor that is computed by itself.
#[derive(Debug)]
pub struct Piece {
    /// Which elements of the tensor it fills.
    pub region: Region,
    /// Whether these are, unchanged, those of the input that the tensor is encoded like.
    pub kept: bool,
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
            Self::Copy(input) => (Some((input, input.range.len())), None),
            Self::Compute(assembly) => (None, Some(assembly)),
        };
        let pieces = pieces.into_iter().flat_map(|assembly| &assembly.pieces);
        let operands = pieces.flat_map(|piece| &piece.computation.operands);
        copied.into_iter().chain(operands.flat_map(Operand::reads))
    }
}
