//! Operands: input tensors, found, checked and mapped, with what adapters do to them.

use super::schema;
use crate::checkpoint::{Checkpoint, InputFile, ReadBackend};
use crate::dtype::Float;
use crate::{Error, Result};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// An input tensor.
#[derive(Debug)]
pub struct Input {
    /// The shard it lies in.
    pub file: Arc<InputFile>,
    /// Where that shard is, for messages.
    pub path: PathBuf,
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
    /// Reads some of its bytes into `out`, which is as long.
    ///
    /// # Errors
    /// Those of [`InputFile::read`].
    pub fn read(&self, bytes: &Range<usize>, out: &mut [u8]) -> Result<()> {
        self.file.read(&(self.range.start + bytes.start..self.range.start + bytes.end), out)
    }

    /// Gives the pages of some of its bytes back.
    pub fn release(&self, bytes: Range<usize>) {
        self.file.release(self.range.start + bytes.start..self.range.start + bytes.end);
    }

    /// Starts to read some of its bytes.
    pub fn prefetch(&self, bytes: Range<usize>) {
        self.file.prefetch(self.range.start + bytes.start..self.range.start + bytes.end);
    }

    /// Its dtype, provided that it can be computed with.
    fn float(&self) -> Result<Float> {
        Float::from_safetensors(self.dtype).ok_or_else(|| {
            Error::Plan(format!(
                "tensor `{}` of {} has dtype {}, which can only be copied; BF16, F16, F32 and F64 can be merged",
                self.tensor,
                self.path.display(),
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
    fn new(input: Input) -> Result<Self> {
        let dtype = input.float()?;
        Ok(Self { input, dtype })
    }

    /// The place of some elements among its bytes.
    #[must_use]
    pub fn place(&self, elements: Range<usize>) -> Range<usize> {
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

/// DoRA's magnitudes.
#[derive(Debug)]
pub struct Magnitude {
    /// One element for each output feature.
    pub tensor: FloatInput,
    /// Whether the output features are the columns of the stored matrix.
    pub transpose: bool,
    /// The factors of the columns, once somebody has computed them; see [`crate::merge`].
    pub column_factors: OnceLock<Vec<f32>>,
}

impl Operand {
    /// A tensor as it is.
    ///
    /// # Errors
    /// [`Error::Plan`] if its dtype cannot be computed with.
    pub(super) fn plain(input: Input, output: &schema::Tensor) -> Result<Self> {
        Ok(Self {
            tensor: FloatInput::new(input)?,
            columns: output.shape.last().copied().unwrap_or(1),
            rows: None,
            low_rank: Vec::new(),
            magnitude: None,
        })
    }

    /// Bytes of all the tensors behind it.
    #[must_use]
    pub fn bytes_read(&self) -> usize {
        let factors = self.low_rank.iter().flat_map(|term| [&term.a, &term.b]);
        let extras = factors
            .chain(self.rows.iter().map(|rows| &rows.tensor))
            .chain(self.magnitude.iter().map(|magnitude| &magnitude.tensor));
        extras.chain([&self.tensor]).map(|tensor| tensor.input.range.len()).sum()
    }
}

/// The sources of a plan, and a record of what one shard reads of them.
pub(super) struct Inputs<'a> {
    pub sources: &'a BTreeMap<String, Checkpoint>,
    /// Source names and file names.
    pub reads: &'a mut BTreeSet<(String, String)>,
    /// The files that are open, by their path.
    pub files: &'a mut HashMap<PathBuf, Arc<InputFile>>,
    /// How files are opened.
    pub backend: ReadBackend,
}

impl Inputs<'_> {
    /// Opens a tensor that has the output's shape.
    pub(super) fn open(
        &mut self,
        from: &schema::TensorRef,
        output: &schema::Tensor,
    ) -> Result<Input> {
        let input = self.find(&from.source, &from.tensor, output)?;
        if input.shape == output.shape {
            Ok(input)
        } else {
            Err(mismatch(output, &input, &output.shape))
        }
    }

    /// Opens an operand of the output's shape with all that changes it.
    pub(super) fn open_operand(
        &mut self,
        operand: &schema::Operand,
        output: &schema::Tensor,
    ) -> Result<Operand> {
        let place =
            schema::TensorRef { source: operand.source.clone(), tensor: operand.tensor.clone() };
        let mut opened = Operand::plain(self.open(&place, output)?, output)?;
        if operand.rows.is_none() && operand.low_rank.is_empty() && operand.magnitude.is_none() {
            return Ok(opened);
        }
        let &[rows, columns] = output.shape.as_slice() else {
            return Err(Error::Plan(format!(
                "tensor `{}` of shape {:?} is changed by an adapter, which works on matrices only",
                output.name, output.shape
            )));
        };
        opened.rows = match &operand.rows {
            Some(replaced) => Some(self.open_rows(replaced, output, [rows, columns])?),
            None => None,
        };
        for term in &operand.low_rank {
            opened.low_rank.push(self.open_low_rank(term, output, [rows, columns])?);
        }
        if let Some(magnitude) = &operand.magnitude {
            let features = if magnitude.transpose { columns } else { rows };
            let tensor = self.find(&magnitude.source, &magnitude.tensor, output)?;
            if tensor.shape.iter().product::<usize>() != features {
                return Err(mismatch(output, &tensor, &[features]));
            }
            opened.magnitude = Some(Magnitude {
                tensor: FloatInput::new(tensor)?,
                transpose: magnitude.transpose,
                column_factors: OnceLock::new(),
            });
        }
        Ok(opened)
    }

    fn open_rows(
        &mut self,
        replaced: &schema::Rows,
        output: &schema::Tensor,
        [rows, columns]: [usize; 2],
    ) -> Result<Rows> {
        let tensor = self.find(&replaced.source, &replaced.tensor, output)?;
        let expected = [replaced.indices.len(), columns];
        if tensor.shape != expected {
            return Err(mismatch(output, &tensor, &expected));
        }
        let places: BTreeMap<usize, usize> =
            replaced.indices.iter().enumerate().map(|(place, &row)| (row, place)).collect();
        let beyond = places.last_key_value().is_some_and(|(&row, _)| row >= rows);
        if places.len() != replaced.indices.len() || beyond {
            return Err(Error::Plan(format!(
                "the replaced rows of tensor `{}` must be different and below {rows}",
                output.name
            )));
        }
        Ok(Rows { tensor: FloatInput::new(tensor)?, places })
    }

    fn open_low_rank(
        &mut self,
        term: &schema::LowRank,
        output: &schema::Tensor,
        [rows, columns]: [usize; 2],
    ) -> Result<LowRank> {
        let a = self.find(&term.a.source, &term.a.tensor, output)?;
        let b = self.find(&term.b.source, &term.b.tensor, output)?;
        let (out, inner) = if term.transpose { (columns, rows) } else { (rows, columns) };
        let rank = a.shape.first().copied().unwrap_or(0);
        if rank == 0 || a.shape != [rank, inner] {
            return Err(mismatch(output, &a, &[rank.max(1), inner]));
        }
        if b.shape != [out, rank] {
            return Err(mismatch(output, &b, &[out, rank]));
        }
        let scale = crate::dtype::f64_to_f32(term.scale);
        if !scale.is_finite() {
            return Err(Error::Plan(format!(
                "the scale {} of tensor `{}` is not finite",
                term.scale, output.name
            )));
        }
        Ok(LowRank {
            a: FloatInput::new(a)?,
            b: FloatInput::new(b)?,
            rank,
            scale,
            transpose: term.transpose,
        })
    }

    fn find(&mut self, source: &str, tensor: &str, output: &schema::Tensor) -> Result<Input> {
        let checkpoint = self.sources.get(source).ok_or_else(|| {
            Error::Plan(format!(
                "tensor `{}` takes from source `{source}`, which the plan does not define",
                output.name
            ))
        })?;
        let (shard, entry) = checkpoint.get(tensor)?;
        self.reads.insert((source.to_owned(), shard.name.clone()));
        let file = match self.files.get(&shard.path) {
            Some(file) => Arc::clone(file),
            None => {
                let size = shard.header.identity.size;
                let file = Arc::new(InputFile::open(&shard.path, size, self.backend)?);
                self.files.insert(shard.path.clone(), Arc::clone(&file));
                file
            }
        };
        Ok(Input {
            file,
            path: shard.path.clone(),
            tensor: tensor.to_owned(),
            range: entry.range.clone(),
            dtype: entry.dtype,
            shape: entry.shape.to_vec(),
        })
    }
}

fn mismatch(output: &schema::Tensor, input: &Input, expected: &[usize]) -> Error {
    Error::Plan(format!(
        "tensor `{}` needs an input of shape {expected:?}, but `{}` of {} has {:?}",
        output.name,
        input.tensor,
        input.path.display(),
        input.shape
    ))
}
