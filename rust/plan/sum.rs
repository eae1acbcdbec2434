//! Weighted sums that are no tensors of an output: what an analysis reads.

use super::operand::Operand;
use super::resolve::Resolver;
use super::schema;
use super::sources::{GivenSources, Source, Sources};
use crate::checkpoint::Checkpoint;
use crate::{Error, Result};
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
        None => {
            let (source, tensor) = (&first.operand.source, first.operand.tensor.as_deref());
            resolver.float(source, tensor, None, None)?.shape
        }
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
