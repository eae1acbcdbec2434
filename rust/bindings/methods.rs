//! `methods`: the table of merge methods, for help, documentation and validation.

use crate::methods::{Kind, METHODS, Parameter, Scope, Specification};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::Value;

/// Every merge method: what it is called, what it needs, which parameters it takes.
#[pyfunction]
pub(super) fn methods(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    METHODS.iter().map(|method| describe(py, method)).collect()
}

fn describe<'py>(py: Python<'py>, method: &Specification) -> PyResult<Bound<'py, PyDict>> {
    let entry = PyDict::new(py);
    entry.set_item("name", method.name)?;
    entry.set_item("title", method.title)?;
    entry.set_item("summary", method.summary)?;
    entry.set_item("reference", method.reference)?;
    entry.set_item("base", method.base.name())?;
    entry.set_item("least_operands", method.operands.0)?;
    entry.set_item("most_operands", method.operands.1)?;
    entry.set_item("passes", method.passes)?;
    let parameters = method.all_parameters().map(|parameter| describe_parameter(py, parameter));
    entry.set_item("parameters", parameters.collect::<PyResult<Vec<_>>>()?)?;
    Ok(entry)
}

fn describe_parameter<'py>(py: Python<'py>, parameter: &Parameter) -> PyResult<Bound<'py, PyDict>> {
    let (kind, range, choices) = match parameter.kind {
        Kind::Number(least, most) => ("number", range(least, most, py)?, Vec::new()),
        Kind::Integer(least, most) => {
            let bounds = (least.into_py_any(py)?, most.into_py_any(py)?);
            ("integer", bounds, Vec::new())
        }
        Kind::Flag => ("flag", (py.None(), py.None()), Vec::new()),
        Kind::Choice(words) => ("choice", (py.None(), py.None()), words.to_vec()),
    };
    let entry = PyDict::new(py);
    entry.set_item("name", parameter.name)?;
    let scope = match parameter.scope {
        Scope::Shared => "shared",
        Scope::Operand => "operand",
    };
    entry.set_item("scope", scope)?;
    entry.set_item("kind", kind)?;
    entry.set_item("default", default(py, parameter)?)?;
    entry.set_item("least", range.0)?;
    entry.set_item("most", range.1)?;
    entry.set_item("choices", choices)?;
    entry.set_item("help", parameter.help)?;
    Ok(entry)
}

/// Bounds; `None` for an infinite one.
fn range(least: f64, most: f64, py: Python<'_>) -> PyResult<(Py<PyAny>, Py<PyAny>)> {
    let bound = |value: f64| value.is_finite().then_some(value).into_py_any(py);
    Ok((bound(least)?, bound(most)?))
}

fn default(py: Python<'_>, parameter: &Parameter) -> PyResult<Py<PyAny>> {
    match parameter.default.to_json() {
        None => Ok(py.None()),
        Some(Value::Bool(flag)) => flag.into_py_any(py),
        Some(Value::String(word)) => word.into_py_any(py),
        Some(Value::Number(number)) => match number.as_u64() {
            Some(whole) => whole.into_py_any(py),
            None => number.as_f64().into_py_any(py),
        },
        Some(_) => Ok(py.None()),
    }
}
