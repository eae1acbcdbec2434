//! Tensors of numbers, or parts of them, whichever way they are stored.

use super::encoded::Encoded;
use super::input::Input;
use super::schema;
use super::view::{Order, View};
use crate::checkpoint::Checkpoint;
use crate::dtype::Float;
use crate::{Error, Result};
use safetensors::Dtype;
use std::ops::Range;
use std::sync::Arc;

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
    /// As whole numbers of a byte, or as truth values; masks are.
    Bytes,
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

    /// As [`FloatInput::find`], for a mask, which may also be of U8 or BOOL.
    ///
    /// # Errors
    /// Those of [`FloatInput::find`].
    pub fn find_mask(
        checkpoint: &Arc<Checkpoint>,
        source: &Arc<str>,
        tensor: &str,
        view: Option<&schema::View>,
    ) -> Result<Self> {
        let input = checkpoint.id(tensor).map(|id| Input::at(checkpoint, source, id));
        match input {
            Some(input) if matches!(input.dtype, Dtype::U8 | Dtype::BOOL) => {
                let shape = input.shape.clone();
                Self::of(input, Stored::Bytes, shape, view)
            }
            _ => Self::find(checkpoint, source, tensor, view),
        }
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
            Stored::Bytes => 1,
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
            Stored::Plain(_) | Stored::Bytes => None,
        }
    }

    /// Bytes of the stored tensor that some of its stored elements take.
    #[must_use]
    pub fn stored_bytes(&self, elements: &Range<usize>) -> Range<usize> {
        match &self.stored {
            Stored::Plain(float) => elements.start * float.size()..elements.end * float.size(),
            Stored::Bytes => elements.clone(),
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
