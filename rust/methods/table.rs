//! The table of methods, which the command line's help, the documentation and every validation read.

use super::specification::Specification;
use super::{
    Method, breadcrumbs, dare, della, karcher, linear, model_stock, multislerp, nearswap, nuslerp,
    passthrough, sce, slerp, task_arithmetic, ties,
};
use serde_json::{Map, Value};

/// Every method.
pub const METHODS: &[&Specification] = &[
    &linear::LINEAR,
    &passthrough::PASSTHROUGH,
    &task_arithmetic::TASK_ARITHMETIC,
    &ties::TIES,
    &dare::DARE_LINEAR,
    &dare::DARE_TIES,
    &breadcrumbs::BREADCRUMBS,
    &breadcrumbs::BREADCRUMBS_TIES,
    &della::DELLA,
    &della::DELLA_LINEAR,
    &sce::SCE,
    &slerp::SLERP,
    &nuslerp::NUSLERP,
    &multislerp::MULTISLERP,
    &karcher::KARCHER,
    &model_stock::MODEL_STOCK,
    &nearswap::NEARSWAP,
];

/// Makes the method of this name for one tensor.
///
/// `operands` holds each operand's parameters, `weight` among them. `tensor` names the tensor, which together with the
/// method's seed decides its random numbers.
///
/// # Errors
/// A sentence if the name is unknown or the parameters do not fit.
pub fn build(
    name: &str,
    parameters: &Map<String, Value>,
    operands: &[Map<String, Value>],
    base: bool,
    tensor: &str,
    shape: &[usize],
) -> Result<Box<dyn Method>, String> {
    let Some(specification) = METHODS.iter().find(|known| known.name == name) else {
        let known: Vec<_> = METHODS.iter().map(|known| known.name).collect();
        return Err(format!("there is no merge method `{name}`; known are {}", known.join(", ")));
    };
    let seed = parameters.get("seed").and_then(Value::as_u64).unwrap_or_default();
    let key = super::random::key(seed, tensor);
    let settings = specification.settle(parameters, operands, base, shape, key)?;
    (specification.make)(&settings)
}
