//! Engine errors as the exceptions of `safemerge_fast.errors`.

use crate::error::{Error, Stage};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

/// The exception for an engine error. The classes live in Python, where exit codes and documentation are.
pub(super) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error.stage() {
        Stage::Checkpoint => "CheckpointError",
        Stage::Plan => "PlanError",
        Stage::Output => "OutputError",
        Stage::Verification => "VerificationError",
        Stage::Interrupted => return PyKeyboardInterrupt::new_err(error.to_string()),
    };
    let raised = py
        .import("safemerge_fast.errors")
        .and_then(|module| module.getattr(class))
        .and_then(|class| class.call1((error.to_string(),)));
    match raised {
        Ok(exception) => PyErr::from_value(exception),
        Err(problem) => problem,
    }
}

/// Runs `work` without the GIL and turns its error into an exception.
pub(super) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> crate::Result<T> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(|error| to_python(py, &error))
}

/// Runs long `work` without the GIL. The work's poll function looks for signals, so that Ctrl-C stops it; the
/// exception that the signal's handler raised is then the one that is raised here.
pub(super) fn interruptible<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&mut dyn FnMut() -> bool) -> crate::Result<T> + Send,
) -> PyResult<T> {
    let mut signal = None;
    let result = py.detach(|| {
        work(&mut || match Python::attach(|py| py.check_signals()) {
            Ok(()) => true,
            Err(raised) => {
                signal = Some(raised);
                false
            }
        })
    });
    match (result, signal) {
        (Ok(value), None) => Ok(value),
        (_, Some(raised)) => Err(raised),
        (Err(error), None) => Err(to_python(py, &error)),
    }
}

/// As [`interruptible`], for work that asks by itself whether it is to stop, from the calling thread. Signals are looked
/// for every 50 ms at the most.
pub(super) fn interruptible_within<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&dyn Fn() -> bool) -> crate::Result<T> + Send,
) -> PyResult<T> {
    let (result, signal) = py.detach(|| {
        let looked = Cell::new(Instant::now());
        let signal = RefCell::new(None);
        let stopped = || {
            if looked.get().elapsed() >= Duration::from_millis(50) {
                looked.set(Instant::now());
                if let Err(raised) = Python::attach(|py| py.check_signals()) {
                    signal.replace(Some(raised));
                }
            }
            signal.borrow().is_some()
        };
        let result = work(&stopped);
        (result, signal.into_inner())
    });
    match (result, signal) {
        (Ok(value), None) => Ok(value),
        (_, Some(raised)) => Err(raised),
        (Err(error), None) => Err(to_python(py, &error)),
    }
}
