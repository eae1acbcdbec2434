//! From what a plan says of a tensor to that tensor's inputs and method. The same check is made when the plan is
//! validated and when a worker enters the tensor, so that nothing of it need be kept in between.

use super::inputs::{
    Assembly, Computation, FloatInput, Input, LowRank, Magnitude, Operand, Operation, Piece, Rows,
};
use super::schema;
use super::sources::{GivenSources, Source, Sources};
use super::view::{Region, View};
use crate::checkpoint::Checkpoint;
use crate::dtype::Float;
use crate::methods::{self, Convert, Prepared};
use crate::{Error, Result};
use safetensors::Dtype;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The operands of a weighted sum that is no tensor of an output, all of the shape of the first one's tensor; `name` is
/// whose they are, for messages, and the tensor of operands that name none.
///
/// # Errors
/// [`Error::Plan`] if there is none, they do not go together, or have parameters other than a weight;
/// [`Error::NoTensor`].
pub fn resolve_sum(
    given: &GivenSources,
    name: &str,
    terms: &[schema::WeightedOperand],
) -> Result<Vec<(f32, Operand)>> {
    let source = |(name, checkpoint): (&String, &Arc<Checkpoint>)| {
        let listed = vec![true; checkpoint.shards().len()];
        let checkpoint = Arc::clone(checkpoint);
        (name.clone(), Source { name: name.as_str().into(), checkpoint, listed })
    };
    let sources: Sources = given.iter().map(source).collect();
    let resolver = Resolver { sources: &sources, name, whole: None };
    let Some(first) = terms.first() else {
        return Err(Error::Plan(format!("tensor `{name}` is made of nothing")));
    };
    let shape = match &first.operand.view {
        Some(view) => view.shape.clone(),
        None => resolver.find(&first.operand.source, first.operand.tensor.as_deref())?.shape,
    };
    let resolve = |term: &schema::WeightedOperand| {
        let weight = crate::dtype::f64_to_f32(term.weight.unwrap_or(1.0));
        if !term.parameters.is_empty() || !weight.is_finite() {
            return Err(Error::Plan(format!(
                "the operands of tensor `{name}` have a finite weight and no other parameter"
            )));
        }
        Ok((weight, resolver.operand(&term.operand, &shape)?))
    };
    terms.iter().map(resolve).collect()
}

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
        if let Recipe::Copy(place @ schema::TensorRef { view: None, .. }) = recipe {
            let input = self.find_as(&place.source, place.tensor.as_deref(), shape)?;
            if input.dtype == dtype {
                return Ok(Operation::Copy(input));
            }
        }
        let elements = self.elements(shape)?;
        let computation = self.computation(recipe, shape)?;
        let pieces = vec![Piece { region: Region::whole(elements), computation }];
        Ok(Operation::Compute(Assembly { pieces, elements, dtype: self.output_float(dtype)? }))
    }

    /// The operation that makes a tensor of this dtype and shape of pieces.
    ///
    /// # Errors
    /// [`Error::Plan`] if they do not fill the tensor, and those of each piece.
    pub(super) fn assembly(
        &self,
        pieces: impl Iterator<Item = PlannedPiece<'a>>,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<Operation> {
        let elements = self.elements(shape)?;
        let problem = |problem: String| Error::Plan(format!("tensor `{}`: {problem}", self.name));
        let pieces = pieces
            .map(|(view, recipe)| {
                let region = View::new(view, elements).and_then(|view| Region::of(&view));
                let region = region.map_err(problem)?;
                let part = Resolver { whole: Some(Whole { shape, view }), ..*self };
                Ok(Piece { region, computation: part.computation(recipe, &view.shape)? })
            })
            .collect::<Result<Vec<_>>>()?;
        let regions: Vec<Region> = pieces.iter().map(|piece| piece.region).collect();
        Region::check_cover(&regions, elements).map_err(problem)?;
        Ok(Operation::Compute(Assembly { pieces, elements, dtype: self.output_float(dtype)? }))
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
                let tensor =
                    self.float(&place.source, place.tensor.as_deref(), place.view.as_ref(), shape)?;
                Ok(Computation {
                    method: Box::new(Convert),
                    operands: vec![Operand::plain(tensor)],
                    has_base: false,
                })
            }
            Recipe::Merge { merge, method } => {
                let operands = merge.operands.iter().map(|weighted| &weighted.operand);
                let operands = operands
                    .chain(&merge.base)
                    .map(|operand| self.operand(operand, shape))
                    .collect::<Result<Vec<_>>>()?;
                let has_base = merge.base.is_some();
                let method = method
                    .method(self.name, shape)
                    .map_err(|problem| Error::Plan(format!("tensor `{}`: {problem}", self.name)))?;
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
        let tensor = self.float(&operand.source, operand.tensor.as_deref(), view, shape)?;
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
            let tensor = self.find(&magnitude.source, Some(&magnitude.tensor))?;
            let tensor = FloatInput::new(tensor, None)?;
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
        let tensor = self.float(&replaced.source, Some(&replaced.tensor), None, &expected)?;
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
            let input = self.find(&part.source, part.tensor.as_deref())?;
            FloatInput::new(input, part.view.as_ref())
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

    /// A tensor that has this shape.
    fn find_as(&self, source: &str, tensor: Option<&str>, shape: &[usize]) -> Result<Input> {
        let input = self.find(source, tensor)?;
        if input.shape == shape {
            return Ok(input);
        }
        Err(self.mismatch(&input, &input.shape, shape))
    }

    /// Numbers of this shape: a tensor, or a part of one. Of a tensor as large as the whole, a piece takes its own part.
    fn float(
        &self,
        source: &str,
        tensor: Option<&str>,
        view: Option<&schema::View>,
        shape: &[usize],
    ) -> Result<FloatInput> {
        let input = self.find(source, tensor)?;
        let own = self.whole.filter(|whole| input.shape == whole.shape).map(|whole| whole.view);
        let found = FloatInput::new(input, view.or(own))?;
        if found.shape == shape {
            return Ok(found);
        }
        Err(self.mismatch(&found.input, &found.shape, shape))
    }

    fn find(&self, name: &str, tensor: Option<&str>) -> Result<Input> {
        let source = self.source(name)?;
        let input = Input::find(&source.checkpoint, &source.name, tensor.unwrap_or(self.name))?;
        if source.listed.get(input.shard()) == Some(&true) {
            return Ok(input);
        }
        Err(Error::Plan(format!(
            "tensor `{}` takes `{}` from {}, which the plan does not list among the files of source `{name}`",
            self.name,
            input.tensor,
            input.path().display()
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

    fn output_float(&self, dtype: Dtype) -> Result<Float> {
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
