//! Arguments that Python gives in more than one form: JSON, and open checkpoints by role.

use super::checkpoint::Checkpoint;
use crate::plan::GivenSources;
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The bytes of JSON that is given as text, as bytes, or as the plain data that it stands for.
pub(super) fn json_bytes(value: &Bound<'_, PyAny>) -> PyResult<Json> {
    if let Ok(text) = value.extract::<PyBackedStr>() {
        return Ok(Json::Text(text));
    }
    if let Ok(bytes) = value.extract::<PyBackedBytes>() {
        return Ok(Json::Bytes(bytes));
    }
    let text = value.py().import("json")?.call_method1("dumps", (value,))?;
    Ok(Json::Text(text.extract::<PyBackedStr>()?))
}

/// JSON that Python holds.
pub(super) enum Json {
    Text(PyBackedStr),
    Bytes(PyBackedBytes),
}

impl std::ops::Deref for Json {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// Open checkpoints by role, for the engine.
pub(super) fn shared_sources(sources: &BTreeMap<String, Bound<'_, Checkpoint>>) -> GivenSources {
    let shared =
        sources.iter().map(|(name, source)| (name.clone(), Arc::clone(&source.get().inner)));
    shared.collect()
}
