//! `methods`: the table of merge methods, for help, documentation and validation.

use crate::methods::{Default, Flag, Kind, METHODS, Parameter, Scope, Specification};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;

/// A parameter of a merge method.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct ParameterInfo {
    scope: Scope,
    parameter: &'static Parameter,
}

#[pymethods]
impl ParameterInfo {
    #[getter]
    fn name(&self) -> &'static str {
        self.parameter.name
    }

    #[getter]
    fn scope(&self) -> &'static str {
        match self.scope {
            Scope::Shared => "shared",
            Scope::Operand => "operand",
        }
    }

    #[getter]
    fn kind(&self) -> &'static str {
        match self.parameter.kind {
            Kind::Number(..) => "number",
            Kind::Integer(..) => "integer",
            Kind::Flag => "flag",
            Kind::Choice(_) => "choice",
        }
    }

    #[getter]
    fn required(&self) -> bool {
        self.parameter.default == Default::Required
    }

    #[getter]
    fn default(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.parameter.default {
            Default::Required => Ok(py.None()),
            Default::Number(number) => number.into_py_any(py),
            Default::Integer(number) => number.into_py_any(py),
            Default::Flag(flag) => flag.into_py_any(py),
            Default::Choice(word) => word.into_py_any(py),
        }
    }

    #[getter]
    fn least(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.parameter.kind {
            Kind::Number(least, _) => finite(least, py),
            Kind::Integer(least, _) => least.into_py_any(py),
            Kind::Flag | Kind::Choice(_) => Ok(py.None()),
        }
    }

    #[getter]
    fn most(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.parameter.kind {
            Kind::Number(_, most) => finite(most, py),
            Kind::Integer(_, most) => most.into_py_any(py),
            Kind::Flag | Kind::Choice(_) => Ok(py.None()),
        }
    }

    #[getter]
    fn choices(&self) -> Vec<&'static str> {
        match self.parameter.kind {
            Kind::Choice(words) => words.to_vec(),
            _ => Vec::new(),
        }
    }

    #[getter]
    fn help(&self) -> &'static str {
        self.parameter.help
    }

    fn __repr__(&self) -> String {
        format!("ParameterInfo({:?}, {}, {})", self.parameter.name, self.scope(), self.kind())
    }
}

/// Bounds; `None` for an infinite one.
fn finite(bound: f64, py: Python<'_>) -> PyResult<Py<PyAny>> {
    bound.is_finite().then_some(bound).into_py_any(py)
}

/// A merge method: what it is called, what it needs, which parameters it takes, and what holds of it.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct MethodInfo {
    inner: &'static Specification,
}

#[pymethods]
impl MethodInfo {
    #[getter]
    fn name(&self) -> &'static str {
        self.inner.about.name
    }

    #[getter]
    fn title(&self) -> &'static str {
        self.inner.about.title
    }

    #[getter]
    fn summary(&self) -> &'static str {
        self.inner.about.summary
    }

    #[getter]
    fn reference(&self) -> &'static str {
        self.inner.about.reference
    }

    #[getter]
    fn base(&self) -> &'static str {
        self.inner.about.base.name()
    }

    #[getter]
    fn least_operands(&self) -> usize {
        self.inner.about.operands.0
    }

    #[getter]
    fn most_operands(&self) -> Option<usize> {
        self.inner.about.operands.1
    }

    #[getter]
    fn passes(&self) -> usize {
        self.inner.about.passes
    }

    #[getter]
    fn parameters(&self) -> Vec<ParameterInfo> {
        let parameters = self.inner.parameters();
        parameters.map(|(scope, parameter)| ParameterInfo { scope, parameter }).collect()
    }

    #[getter]
    fn interpolates(&self) -> Option<&'static str> {
        self.inner.about.interpolates
    }

    #[getter]
    fn weighs(&self) -> bool {
        self.inner.weighs()
    }

    #[getter]
    fn votes(&self) -> bool {
        self.inner.has(Flag::Votes)
    }

    #[getter]
    fn sole(&self) -> bool {
        self.inner.has(Flag::Sole)
    }

    #[getter]
    fn copies(&self) -> bool {
        self.inner.has(Flag::Copies)
    }

    #[getter]
    fn sums(&self) -> bool {
        self.inner.has(Flag::Sums)
    }

    fn __repr__(&self) -> String {
        format!("MethodInfo({:?})", self.inner.about.name)
    }
}

/// Every merge method.
#[pyfunction]
pub(super) fn methods() -> Vec<MethodInfo> {
    METHODS.iter().map(|inner| MethodInfo { inner }).collect()
}
