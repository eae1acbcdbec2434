//! `Watchdog`: ends the process soon after Ctrl-C, even while the interpreter cannot run the handler of the signal.
//!
//! Python runs handlers between two of its own instructions. One call of a library, such as loading torch's shared
//! objects, can keep it from that for a third of a second or, on a cold disk, for many. The C part of Python's handler
//! writes the signal's number to a pipe at once; a thread that needs no interpreter reads it there.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use std::io::{IsTerminal, Read, Write, pipe};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Exit code of an interrupted command.
const INTERRUPTED: i32 = 130;

/// How long the interpreter has to run its handler.
const UNTIL_ANSWER: Duration = Duration::from_millis(120);

/// How long it may then take to stop in good order.
const UNTIL_END: Duration = Duration::from_millis(1500);

/// SIGINT and SIGTERM, the same numbers on every Unix.
const SIGNALS: [u8; 2] = [2, 15];

#[derive(Default)]
struct State {
    answered: bool,
    said: bool,
    message: String,
    /// A directory that is removed in the end.
    temporary: Option<PathBuf>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    answer: Condvar,
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.answer.notify_all();
    }
}

/// A thread that ends the process with exit code 130 if nobody else does.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Watchdog {
    shared: Arc<Shared>,
    /// Where Python's C handler writes to; open as long as this object lives.
    signals: std::io::PipeWriter,
}

#[pymethods]
impl Watchdog {
    #[new]
    fn new() -> PyResult<Self> {
        let (reader, signals) = pipe().map_err(|error| PyOSError::new_err(error.to_string()))?;
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        thread::Builder::new()
            .name("safemerge-signals".to_owned())
            .spawn(move || watch(reader, &watched))
            .map_err(|error| PyOSError::new_err(error.to_string()))?;
        Ok(Self { shared, signals })
    }

    /// The descriptor for signal.set_wakeup_fd.
    fn fileno(&self) -> i32 {
        self.signals.as_raw_fd()
    }

    /// What is said after `error: ` if this thread has to say it.
    fn set_message(&self, message: String) {
        self.shared.change(|state| state.message = message);
    }

    /// A directory that does not outlast the process.
    fn set_temporary(&self, directory: PathBuf) {
        self.shared.change(|state| state.temporary = Some(directory));
    }

    /// The handler runs, so that the interpreter stops in good order.
    fn answer(&self) {
        self.shared.change(|state| state.answered = true);
    }

    /// The interruption has been said, so that it is not said again.
    fn said(&self) {
        self.shared.change(|state| state.said = true);
    }
}

fn watch(mut signals: std::io::PipeReader, shared: &Shared) {
    let mut number = [0];
    while signals.read_exact(&mut number).is_ok() {
        if SIGNALS.contains(&number[0]) {
            wait(shared);
            end(shared);
        }
    }
}

/// Waits while the interpreter answers, and then while it stops.
fn wait(shared: &Shared) {
    let state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    let (state, _) = shared
        .answer
        .wait_timeout_while(state, UNTIL_ANSWER, |state| !state.answered)
        .unwrap_or_else(PoisonError::into_inner);
    if state.answered {
        drop(state);
        thread::sleep(UNTIL_END);
    }
}

fn end(shared: &Shared) -> ! {
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    if !state.said {
        state.said = true;
        let mut stderr = std::io::stderr();
        // Progress bars hide the cursor.
        let clear = if stderr.is_terminal() { "\r\x1b[K\x1b[?25h" } else { "" };
        // There is nobody to tell if this fails.
        let _ = writeln!(stderr, "{clear}error: {}", state.message);
    }
    if let Some(directory) = state.temporary.take() {
        // What is left is small, and others clear up there.
        let _ = std::fs::remove_dir_all(directory);
    }
    // Without the destructors of libraries that other threads are still in.
    signal_hook::low_level::exit(INTERRUPTED)
}
