//! The table of methods, which the command line's help, the documentation and every validation read.

use super::specification::{AnyRule, Asked, Specification, Target};
use super::{
    Method, breadcrumbs, dare, della, karcher, linear, model_stock, multislerp, nearswap, nuslerp,
    passthrough, sce, slerp, task_arithmetic, ties,
};
use serde_json::{Map, Value};

/// Every method.
pub const METHODS: &[Specification] = &[
    Specification::of::<linear::Linear>(),
    Specification::of::<passthrough::Passthrough>(),
    Specification::of::<task_arithmetic::TaskArithmetic>(),
    Specification::of::<ties::Ties>(),
    Specification::of::<dare::Dare<false>>(),
    Specification::of::<dare::Dare<true>>(),
    Specification::of::<breadcrumbs::Breadcrumbs<false>>(),
    Specification::of::<breadcrumbs::Breadcrumbs<true>>(),
    Specification::of::<della::Della>(),
    Specification::of::<della::DellaLinear>(),
    Specification::of::<sce::Sce>(),
    Specification::of::<slerp::Slerp>(),
    Specification::of::<nuslerp::NuSlerp>(),
    Specification::of::<multislerp::MultiSlerp>(),
    Specification::of::<karcher::Karcher>(),
    Specification::of::<model_stock::ModelStock>(),
    Specification::of::<nearswap::NearSwap>(),
];

/// A method whose parameters were checked. It makes methods for tensors, at the cost of a few allocations.
#[derive(Debug)]
pub struct Prepared(Box<dyn AnyRule>);

impl Prepared {
    /// The method for one tensor. `tensor` names it, which together with the method's seed decides its random numbers.
    ///
    /// # Errors
    /// A sentence if tensors of this shape cannot be merged this way.
    pub fn method(&self, tensor: &str, shape: &[usize]) -> Result<Box<dyn Method>, String> {
        self.0.method(&Target { name: tensor, shape })
    }
}

/// The method of this name.
///
/// # Errors
/// A sentence if there is none.
pub fn find(name: &str) -> Result<&'static Specification, String> {
    METHODS.iter().find(|known| known.about.name == name).ok_or_else(|| {
        let known: Vec<_> = METHODS.iter().map(|known| known.about.name).collect();
        format!("there is no merge method `{name}`; known are {}", known.join(", "))
    })
}

/// Checks the parameters of a method, whatever the tensor: once for all tensors that are merged alike.
///
/// `operands` holds each operand's parameters, `weight` among them.
///
/// # Errors
/// A sentence if the name is unknown or the parameters do not fit.
pub fn check(
    name: &str,
    shared: &Map<String, Value>,
    operands: &[Map<String, Value>],
    base: bool,
) -> Result<Prepared, String> {
    (find(name)?.prepare)(&Asked { shared, operands, base }).map(Prepared)
}

/// [`check`], then [`Prepared::method`].
///
/// # Errors
/// Those of the two.
pub fn build(
    name: &str,
    shared: &Map<String, Value>,
    operands: &[Map<String, Value>],
    base: bool,
    tensor: &str,
    shape: &[usize],
) -> Result<Box<dyn Method>, String> {
    check(name, shared, operands, base)?.method(tensor, shape)
}
