//! Threads that take work from a queue, while the calling thread watches for an interruption.

use super::Progress;
use super::queue::{Item, Queue};
use crate::{Error, Result};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// How often the calling thread looks for an interruption.
const POLL: Duration = Duration::from_millis(50);

/// More threads than any machine has processors; their bookkeeping alone would take all memory.
const MOST_THREADS: usize = 4096;

/// Tells the others when its thread panics, so that nobody waits for what that thread had in hand.
struct Alarm<'a>(&'a AtomicBool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Runs `threads` workers, each with a state from `start`, until the queue is empty, one of them fails, or `progress`
/// is cancelled; `work` gets a function that says whether it is time to give up. `poll` is called on the calling thread about every 50 ms; when it returns false the work is cancelled.
/// Returns the workers' states.
pub(super) fn run<State: Send>(
    queue: &Queue<'_>,
    threads: usize,
    progress: &Progress,
    poll: &mut dyn FnMut() -> bool,
    start: impl Fn() -> Result<State> + Sync,
    work: impl Fn(&mut State, Item, &dyn Fn() -> bool) -> Result<()> + Sync,
) -> Result<Vec<State>> {
    if threads > MOST_THREADS {
        return Err(Error::Option(format!(
            "{threads} worker threads were asked for; {MOST_THREADS} are the most, and a few more than processors are best"
        )));
    }
    let failure = Mutex::new(None);
    let fail = |error: Error| {
        let mut first = failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        first.get_or_insert(error);
    };
    let gone = AtomicBool::new(false);
    let stopped = || {
        progress.cancelled()
            || gone.load(Ordering::Relaxed)
            || failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_some()
    };
    let worker = || {
        let _alarm = Alarm(&gone);
        let mut state = match start() {
            Ok(state) => state,
            Err(error) => {
                fail(error);
                return None;
            }
        };
        while !stopped() {
            let done = match queue.take() {
                Ok(Some(item)) => work(&mut state, item, &stopped),
                Ok(None) => return Some(state),
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                fail(error);
            }
        }
        None
    };
    let states: Vec<Option<State>> = std::thread::scope(|scope| {
        let (finished, finishes) = mpsc::channel::<()>();
        let worker = &worker;
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let finished = finished.clone();
                let work = move || {
                    let state = worker();
                    drop(finished);
                    state
                };
                // Spawned the short way, a thread that cannot start is a panic, which in turn may find no memory.
                std::thread::Builder::new().spawn_scoped(scope, work).inspect_err(|error| {
                    fail(Error::Option(format!(
                        "cannot start {threads} worker threads: {error}; ask for fewer with --threads"
                    )));
                })
            })
            .collect();
        drop(finished);
        // Nothing is ever sent: the channel closes when the last worker, finished or panicked, drops its sender.
        while let Err(mpsc::RecvTimeoutError::Timeout) = finishes.recv_timeout(POLL) {
            if !poll() {
                progress.cancel();
            }
        }
        workers
            .into_iter()
            .map(|worker| match worker {
                Ok(worker) => {
                    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                }
                Err(_) => None,
            })
            .collect()
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(error);
    }
    states.into_iter().collect::<Option<Vec<State>>>().ok_or(Error::Interrupted)
}
