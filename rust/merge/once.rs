//! A value that whoever needs it first makes for all others, who wait meanwhile.

use crate::{Error, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often somebody who waits looks whether there is still something to wait for.
const POLL: Duration = Duration::from_millis(20);

/// Made once, unless making it failed: then the next who needs it tries again, and finds out why for himself.
#[derive(Debug)]
pub(super) struct Once<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
enum State<T> {
    Missing,
    InTheMaking,
    Made(Arc<T>),
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self { state: Mutex::new(State::Missing), changed: Condvar::new() }
    }
}

/// Says on the way out, also by an error or a panic, that nobody is making the value any more.
struct Maker<'a, T>(&'a Once<T>);

impl<T> Drop for Maker<'_, T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if matches!(*state, State::InTheMaking) {
            *state = State::Missing;
        }
        self.0.changed.notify_all();
    }
}

impl<T> Once<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value, made by `make` if there is none.
    ///
    /// # Errors
    /// That of `make`; [`Error::Interrupted`] if `stopped` says so while another makes it.
    pub(super) fn get(
        &self,
        stopped: &dyn Fn() -> bool,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let mut state = self.lock();
        loop {
            match &*state {
                State::Made(value) => return Ok(Arc::clone(value)),
                State::Missing => break,
                State::InTheMaking if stopped() => return Err(Error::Interrupted),
                State::InTheMaking => {
                    let waited = self.changed.wait_timeout(state, POLL);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        *state = State::InTheMaking;
        drop(state);
        let _maker = Maker(self);
        let value = Arc::new(make()?);
        *self.lock() = State::Made(Arc::clone(&value));
        Ok(value)
    }
}
