//! What methods learn of whole tensors before they blend: sums over chunks that many workers take.
//!
//! The sums of chunks are added up in the order of the chunks, those that come too early being kept until their turn, so
//! that neither the number of threads nor their timing changes a bit, and what is kept grows with the number of threads,
//! not of chunks. Counts are whole numbers; their order does not matter.

use super::work::chunks;
use crate::methods::{Facts, Finding, Method, NONFINITE_SUMS};
use crate::plan::Computation;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a worker that waits for others looks whether they have given up.
const POLL: Duration = Duration::from_millis(20);

/// The observation of one tensor, over all passes.
#[derive(Debug)]
pub struct Observation {
    passes: usize,
    chunks: usize,
    state: Mutex<State>,
    advanced: Condvar,
}

#[derive(Debug)]
struct State {
    /// The pass under way; `passes` once nothing is left to learn.
    pass: usize,
    facts: Facts,
    /// Sums of the chunks before this one have been added up.
    next: usize,
    total: Vec<f64>,
    /// Sums of chunks that are ahead of their turn.
    early: BTreeMap<usize, Vec<f64>>,
    counts: Arc<[AtomicU32]>,
}

/// What a worker needs to observe a chunk.
pub(super) struct Assignment {
    pub facts: Facts,
    pub sums: Vec<f64>,
    pub counts: Arc<[AtomicU32]>,
    pub stride: usize,
}

impl Observation {
    /// That of a tensor of so many elements, if its method observes.
    pub(super) fn of(computation: &Computation, elements: usize) -> Option<Self> {
        let method = &computation.method;
        let passes = method.passes();
        let chunks = chunks(elements, method.row()).count();
        if passes == 0 {
            return None;
        }
        let facts = method.start();
        // A tensor without elements has nothing to be learnt of, and nothing to be blended.
        let pass = if chunks == 0 { passes } else { 0 };
        let state = State {
            pass,
            facts,
            next: 0,
            total: Vec::new(),
            early: BTreeMap::new(),
            counts: [].into(),
        };
        Some(Self { passes, chunks, state: Mutex::new(state), advanced: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `pass` has begun, or is over.
    fn wait(&self, pass: usize, stopped: &dyn Fn() -> bool) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while state.pass < pass {
            if stopped() {
                return Err(Error::Interrupted);
            }
            let waited = self.advanced.wait_timeout(state, POLL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state)
    }

    /// What the blend needs to know; waits for it.
    pub(super) fn facts(&self, stopped: &dyn Fn() -> bool) -> Result<Facts> {
        Ok(self.wait(self.passes, stopped)?.facts.clone())
    }

    /// What to do for a chunk of a pass; `None` if that pass turned out not to be needed.
    pub(super) fn begin(
        &self,
        method: &dyn Method,
        pass: usize,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<Assignment>> {
        let mut state = self.wait(pass, stopped)?;
        if state.pass > pass {
            return Ok(None);
        }
        let request = method.request(&state.facts);
        if state.counts.len() != request.counts {
            state.counts = (0..request.counts).map(|_| AtomicU32::new(0)).collect();
        }
        Ok(Some(Assignment {
            facts: state.facts.clone(),
            sums: vec![0.0; request.sums],
            counts: Arc::clone(&state.counts),
            stride: request.stride,
        }))
    }

    /// Hands in a chunk's sums. The last chunk of a pass draws its conclusion.
    pub(super) fn finish(
        &self,
        method: &dyn Method,
        pass: usize,
        number: usize,
        sums: Vec<f64>,
    ) -> std::result::Result<(), String> {
        let mut state = self.lock();
        let State { next, total, early, .. } = &mut *state;
        early.insert(number, sums);
        while let Some(sums) = early.remove(next) {
            total.resize(sums.len(), 0.0);
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
            *next += 1;
        }
        if *next < self.chunks {
            return Ok(());
        }
        *next = 0;
        let total = std::mem::take(total);
        if total.iter().any(|sum| !sum.is_finite()) {
            return Err(NONFINITE_SUMS.to_owned());
        }
        let counts: Vec<u32> =
            state.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let Finding { facts, settled } = method.conclude(&state.facts, &total, &counts)?;
        state.facts = facts;
        state.pass = if settled { self.passes } else { pass + 1 };
        state.counts = [].into();
        self.advanced.notify_all();
        Ok(())
    }
}
