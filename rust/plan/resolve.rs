//! From what a plan says of a tensor to that tensor's inputs and method. The same check is made when the plan is
//! validated and when a worker enters the tensor, so that nothing of it need be kept in between.

use super::float_input::{FloatInput, Stored};
use super::input::Input;
use super::operand::{LowRank, Magnitude, Operand, Rows};
use super::operation::{Assembly, Computation, Operation, Piece, Target};
use super::schema;
use super::sources::{Source, Sources};
use super::target::EncodedTarget;
use super::view::{Region, View};
use crate::checkpoint::Checkpoint;
use crate::dtype::Float;
use crate::methods::{self, Convert, Masked, Method, Prepared};
use crate::{Error, Result};
use safetensors::Dtype;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// An entry of the plan's table of operations.
#[derive(Debug)]
pub(super) enum Recipe {
    Copy(schema::TensorRef),
    Merge {
        merge: Box<schema::Merge>,
        /// Its method, with the parameters checked.
        method: Prepared,
    },
}

impl Recipe {
    /// Checks the parameters of a method once for all tensors that are merged alike.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn new(operation: schema::Operation) -> std::result::Result<Self, String> {
        let merge = match operation {
            schema::Operation::Copy(source) => return Ok(Self::Copy(source)),
            schema::Operation::Merge(merge) => merge,
        };
        let parameters: Vec<_> = merge.operands.iter().map(operand_parameters).collect();
        let (name, shared, base) = (&merge.method, &merge.parameters, merge.base.is_some());
        let method = methods::check(name, shared, &parameters, base)?;
        Ok(Self::Merge { merge, method })
    }
}

/// The weight is a parameter like any other, but for its place in the plan.
fn operand_parameters(weighted: &schema::WeightedOperand) -> Map<String, Value> {
    let mut parameters = weighted.parameters.clone();
    if let Some(weight) = weighted.weight {
        parameters.insert("weight".to_owned(), weight.into());
    }
    parameters
}

/// Finds the inputs of one tensor, or of a piece of one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resolver<'a> {
    pub sources: &'a Sources,
    /// The output tensor's name.
    pub name: &'a str,
    /// Of a piece, the whole tensor and which part of it this is.
    pub whole: Option<Whole<'a>>,
}

/// What a piece is a part of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whole<'a> {
    /// Dimensions of the whole tensor.
    pub shape: &'a [usize],
    /// The part.
    pub view: &'a schema::View,
}

/// How numbers are found: see [`FloatInput::find`].
type Find = fn(&Arc<Checkpoint>, &Arc<str>, &str, Option<&schema::View>) -> Result<FloatInput>;

/// A piece of a tensor as the plan has it.
pub(super) type PlannedPiece<'a> = (&'a schema::View, &'a Recipe);

impl<'a> Resolver<'a> {
    /// Dtype and shape that an output tensor has where the plan does not say it: those of what is copied, or of the
    /// first operand.
    ///
    /// # Errors
    /// [`Error::Plan`], [`Error::NoTensor`].
    pub(super) fn like(&self, recipe: &'a Recipe) -> Result<(Dtype, &'a [usize])> {
        let (source, tensor, view) = match recipe {
            Recipe::Copy(place) => (&place.source, &place.tensor, &place.view),
            Recipe::Merge { merge, .. } => {
                let first = merge.operands.first().map(|weighted| &weighted.operand);
                let Some(first) = first.or(merge.base.as_ref()) else {
                    return Err(Error::Plan(format!("tensor `{}` is made of nothing", self.name)));
                };
                (&first.source, &first.tensor, &first.view)
            }
        };
        let source = self.source(source)?;
        let (_, entry) = source.checkpoint.locate(tensor.as_deref().unwrap_or(self.name))?;
        Ok((entry.dtype, view.as_ref().map_or(entry.shape, |view| &view.shape)))
    }

    /// The operation that makes a tensor of this dtype and shape.
    ///
    /// # Errors
    /// [`Error::Plan`] if inputs and method do not go together; [`Error::NoTensor`].
    pub(super) fn operation(
        &self,
        recipe: &Recipe,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<Operation> {
        if let Recipe::Copy(place @ schema::TensorRef { view: None, .. }) = recipe
            && let Some(input) = self.stored(&place.source, place.tensor.as_deref())?
            && input.dtype == dtype
        {
            if input.shape != shape {
                return Err(self.mismatch(&input, &input.shape, shape));
            }
            return Ok(Operation::Copy(input));
        }
        // An input that cannot be computed with is named before the output is.
        self.computed(recipe, || Ok(Target::Plain(self.output_float(dtype)?)), shape)
    }

    /// As [`Resolver::operation`], stored as `target` says.
    ///
    /// # Errors
    /// Those of [`Resolver::operation`].
    pub(super) fn computed(
        &self,
        recipe: &Recipe,
        target: impl FnOnce() -> Result<Target>,
        shape: &[usize],
    ) -> Result<Operation> {
        let elements = self.elements(shape)?;
        let computation = self.computation(recipe, shape)?;
        let target = target()?;
        let pieces = vec![Piece { region: Region::whole(elements), kept: false, computation }];
        Ok(Operation::Compute(Assembly { pieces, elements, target }))
    }

    /// The operation that makes a tensor of this shape of pieces.
    ///
    /// # Errors
    /// [`Error::Plan`] if they do not fill the tensor, and those of each piece.
    pub(super) fn assembled(
        &self,
        pieces: impl Iterator<Item = PlannedPiece<'a>>,
        target: Target,
        shape: &[usize],
    ) -> Result<Operation> {
        let elements = self.elements(shape)?;
        let problem = |problem: String| Error::Plan(format!("tensor `{}`: {problem}", self.name));
        let pieces = pieces
            .map(|(view, recipe)| {
                let region = View::new(view, elements).and_then(|view| Region::of(&view));
                let region = region.map_err(problem)?;
                let part = Resolver { whole: Some(Whole { shape, view }), ..*self };
                let kept = self.keeps(recipe, &target);
                Ok(Piece { region, kept, computation: part.computation(recipe, &view.shape)? })
            })
            .collect::<Result<Vec<_>>>()?;
        let regions: Vec<Region> = pieces.iter().map(|piece| piece.region).collect();
        Region::check_cover(&regions, elements).map_err(problem)?;
        Ok(Operation::Compute(Assembly { pieces, elements, target }))
    }

    /// Whether a piece is that part of the input itself that its tensor is encoded like.
    fn keeps(&self, recipe: &Recipe, target: &Target) -> bool {
        let (Recipe::Copy(place), Target::Encoded(target)) = (recipe, target) else { return false };
        let (source, tensor) = &target.name;
        place.view.is_none()
            && place.source == **source
            && place.tensor.as_deref().unwrap_or(self.name) == tensor
    }

    /// What stores a tensor as this part of an input is stored, and the shape of the numbers that it stands for.
    ///
    /// # Errors
    /// [`Error::Plan`] if that input is not quantised or has no such part.
    pub(super) fn encoded(&self, encode: &schema::Encode) -> Result<(Target, Vec<usize>)> {
        let like = self.float(&encode.source, Some(&encode.tensor), None, None)?;
        let FloatInput { input: codes, stored: Stored::Encoded(like), shape, .. } = like else {
            return Err(self.not_encoded(encode));
        };
        if encode.part == schema::EncodedPart::Scales && like.scales.is_none() {
            return Err(self.not_encoded(encode));
        }
        let name = (Arc::clone(&codes.source), encode.tensor.clone());
        let target = EncodedTarget { like: *like, name, codes, part: encode.part };
        Ok((Target::Encoded(Box::new(target)), shape))
    }

    /// Dtype and shape of the stored tensor that `encode` speaks of.
    ///
    /// # Errors
    /// Those of finding it.
    pub(super) fn encoded_like(&self, encode: &schema::Encode) -> Result<(Dtype, &'a [usize])> {
        let checkpoint = &self.source(&encode.source)?.checkpoint;
        let encoding = checkpoint.encoding(&encode.tensor)?;
        let part = encoding.and_then(|encoding| match encode.part {
            schema::EncodedPart::Codes => Some(encoding.codes),
            schema::EncodedPart::Scales => encoding.scales.map(|scales| scales.tensor),
        });
        let (_, entry) = checkpoint.entry(part.ok_or_else(|| self.not_encoded(encode))?);
        Ok((entry.dtype, entry.shape))
    }

    fn not_encoded(&self, encode: &schema::Encode) -> Error {
        let part = match encode.part {
            schema::EncodedPart::Codes => "is not quantised",
            schema::EncodedPart::Scales => "has no scales",
        };
        Error::Plan(format!(
            "tensor `{}` is to be stored like `{}` of source `{}`, which {part}",
            self.name, encode.tensor, encode.source
        ))
    }

    fn elements(&self, shape: &[usize]) -> Result<usize> {
        let elements = shape.iter().try_fold(1_usize, |count, &extent| count.checked_mul(extent));
        elements.ok_or_else(|| {
            Error::Plan(format!("the size of tensor `{}` of shape {shape:?} overflows", self.name))
        })
    }

    /// What computes a tensor or a piece of this shape.
    fn computation(&self, recipe: &Recipe, shape: &[usize]) -> Result<Computation> {
        match recipe {
            Recipe::Copy(place) => {
                let view = place.view.as_ref();
                let tensor =
                    self.float(&place.source, place.tensor.as_deref(), view, Some(shape))?;
                Ok(Computation {
                    method: Box::new(Convert),
                    operands: vec![Operand::plain(tensor)],
                    has_base: false,
                })
            }
            Recipe::Merge { merge, method } => {
                let mut operands = Vec::with_capacity(merge.operands.len() + 3);
                if let Some(mask) = &merge.mask {
                    operands.push(self.operand(&mask.kept, shape)?);
                    operands.push(Operand::plain(self.shares(&mask.shares, shape)?));
                }
                let merged = merge.operands.iter().map(|weighted| &weighted.operand);
                for operand in merged.chain(&merge.base) {
                    operands.push(self.operand(operand, shape)?);
                }
                let has_base = merge.base.is_some();
                let method = method
                    .method(self.name, shape)
                    .map_err(|problem| Error::Plan(format!("tensor `{}`: {problem}", self.name)))?;
                let method: Box<dyn Method> = match merge.mask {
                    Some(_) => Box::new(Masked::over(method)),
                    None => method,
                };
                Ok(Computation { method, operands, has_base })
            }
        }
    }

    /// An operand of this shape with all that changes it.
    ///
    /// # Errors
    /// [`Error::Plan`], [`Error::NoTensor`].
    pub(super) fn operand(&self, operand: &schema::Operand, shape: &[usize]) -> Result<Operand> {
        let view = operand.view.as_ref();
        let tensor = self.float(&operand.source, operand.tensor.as_deref(), view, Some(shape))?;
        let mut found = Operand::plain(tensor);
        if operand.rows.is_none() && operand.low_rank.is_empty() && operand.magnitude.is_none() {
            return Ok(found);
        }
        let &[rows, columns] = shape else {
            return Err(Error::Plan(format!(
                "tensor `{}` of shape {shape:?} is changed by an adapter, which works on matrices only",
                self.name
            )));
        };
        if let Some(replaced) = &operand.rows {
            found.rows = Some(self.rows(replaced, [rows, columns])?);
        }
        for term in &operand.low_rank {
            found.low_rank.push(self.low_rank(term, [rows, columns])?);
        }
        if let Some(magnitude) = &operand.magnitude {
            let features = if magnitude.transpose { columns } else { rows };
            let tensor = self.float(&magnitude.source, Some(&magnitude.tensor), None, None)?;
            if tensor.len() != features {
                return Err(self.mismatch(&tensor.input, &tensor.shape, &[features]));
            }
            let transpose = magnitude.transpose;
            found.magnitude = Some(Magnitude { tensor, transpose });
        }
        Ok(found)
    }

    fn rows(&self, replaced: &schema::Rows, [rows, columns]: [usize; 2]) -> Result<Rows> {
        let expected = [replaced.indices.len(), columns];
        let tensor = self.float(&replaced.source, Some(&replaced.tensor), None, Some(&expected))?;
        let places: BTreeMap<usize, usize> =
            replaced.indices.iter().enumerate().map(|(place, &row)| (row, place)).collect();
        let beyond = places.last_key_value().is_some_and(|(&row, _)| row >= rows);
        if places.len() != replaced.indices.len() || beyond {
            return Err(Error::Plan(format!(
                "the replaced rows of tensor `{}` must be different and below {rows}",
                self.name
            )));
        }
        Ok(Rows { tensor, places })
    }

    fn low_rank(&self, term: &schema::LowRank, [rows, columns]: [usize; 2]) -> Result<LowRank> {
        let factor = |part: &schema::TensorRef| {
            self.float(&part.source, part.tensor.as_deref(), part.view.as_ref(), None)
        };
        let (a, b) = (factor(&term.a)?, factor(&term.b)?);
        let (out, inner) = if term.transpose { (columns, rows) } else { (rows, columns) };
        let rank = a.shape.first().copied().unwrap_or(0);
        if rank == 0 || a.shape != [rank, inner] {
            return Err(self.mismatch(&a.input, &a.shape, &[rank.max(1), inner]));
        }
        if b.shape != [out, rank] {
            return Err(self.mismatch(&b.input, &b.shape, &[out, rank]));
        }
        let scale = crate::dtype::f64_to_f32(term.scale);
        if !scale.is_finite() {
            return Err(Error::Plan(format!(
                "the scale {} of tensor `{}` is not finite",
                term.scale, self.name
            )));
        }
        Ok(LowRank { a, b, rank, scale, transpose: term.transpose })
    }

    /// Numbers, of this shape if one is given: a tensor, or a part of one. Of a tensor as large as the whole, a piece takes
    /// its own part.
    pub(super) fn float(
        &self,
        name: &str,
        tensor: Option<&str>,
        view: Option<&schema::View>,
        shape: Option<&[usize]>,
    ) -> Result<FloatInput> {
        self.numbers(FloatInput::find, name, tensor, view, shape)
    }

    /// A mask of this shape, likewise.
    fn shares(&self, place: &schema::TensorRef, shape: &[usize]) -> Result<FloatInput> {
        let schema::TensorRef { source, tensor, view } = place;
        let find = FloatInput::find_mask;
        self.numbers(find, source, tensor.as_deref(), view.as_ref(), Some(shape))
    }

    fn numbers(
        &self,
        find: Find,
        name: &str,
        tensor: Option<&str>,
        view: Option<&schema::View>,
        shape: Option<&[usize]>,
    ) -> Result<FloatInput> {
        let source = self.source(name)?;
        let find = |view: Option<&schema::View>| {
            find(&source.checkpoint, &source.name, tensor.unwrap_or(self.name), view)
        };
        let mut found = find(view)?;
        if let (None, Some(whole), Some(_)) = (view, self.whole, shape)
            && found.shape == whole.shape
        {
            found = find(Some(whole.view))?;
        }
        for (input, _) in found.reads() {
            self.check_listed(input)?;
        }
        match shape {
            Some(shape) if found.shape != shape => {
                Err(self.mismatch(&found.input, &found.shape, shape))
            }
            _ => Ok(found),
        }
    }

    /// A tensor as it is stored; `None` if there is none of that name.
    fn stored(&self, name: &str, tensor: Option<&str>) -> Result<Option<Input>> {
        let source = self.source(name)?;
        let Some(id) = source.checkpoint.id(tensor.unwrap_or(self.name)) else { return Ok(None) };
        let input = Input::at(&source.checkpoint, &source.name, id);
        self.check_listed(&input)?;
        Ok(Some(input))
    }

    /// Refuses a file that the plan does not list, whose identity it thus does not state.
    fn check_listed(&self, input: &Input) -> Result<()> {
        let source = self.source(&input.source)?;
        if source.listed.get(input.shard()) == Some(&true) {
            return Ok(());
        }
        Err(Error::Plan(format!(
            "tensor `{}` takes `{}` from {}, which the plan does not list among the files of source `{}`",
            self.name,
            input.tensor,
            input.path().display(),
            input.source
        )))
    }

    fn source(&self, name: &str) -> Result<&'a Source> {
        self.sources.get(name).ok_or_else(|| {
            Error::Plan(format!(
                "tensor `{}` takes from source `{name}`, which the plan does not define",
                self.name
            ))
        })
    }

    pub(super) fn output_float(&self, dtype: Dtype) -> Result<Float> {
        Float::from_safetensors(dtype).ok_or_else(|| {
            Error::Plan(format!(
                "tensor `{}` cannot be computed in dtype {dtype}; use BF16, F16, F32 or F64",
                self.name
            ))
        })
    }

    fn mismatch(&self, input: &Input, shape: &[usize], expected: &[usize]) -> Error {
        Error::Plan(format!(
            "tensor `{}` needs an input of shape {expected:?}, but `{}` of {} has {shape:?}",
            self.name,
            input.tensor,
            input.path().display()
        ))
    }
}
