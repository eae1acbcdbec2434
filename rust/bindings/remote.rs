//! What lies at an address, and small files of it.

use super::error::detached;
use crate::checkpoint::{self, Checkpoint};
use pyo3::prelude::*;
use std::path::PathBuf;

/// An address as plans and reports have it.
#[pyfunction]
pub(super) fn normal_url(py: Python<'_>, url: PathBuf) -> PyResult<String> {
    detached(py, || Ok(checkpoint::normal_url(&url)?.to_string_lossy().into_owned()))
}

/// Names and sizes of what lies in a directory of a store.
#[pyfunction]
pub(super) fn list_directory(py: Python<'_>, url: PathBuf) -> PyResult<Vec<(String, u64)>> {
    detached(py, || Checkpoint::listed(&url))
}

/// Copies small files of a directory in a store into a local one.
#[pyfunction]
#[pyo3(signature = (url, names, directory, *, most))]
pub(super) fn fetch_small(
    py: Python<'_>,
    url: PathBuf,
    names: Vec<String>,
    directory: PathBuf,
    most: u64,
) -> PyResult<Vec<String>> {
    detached(py, || Checkpoint::fetch_small(&url, &names, &directory, most))
}
