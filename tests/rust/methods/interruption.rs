//! Workers that wait for one another's observations stop when there is nothing left to wait for.

use super::scene::{Case, Scene, Shape, cases};
use crate::fixtures::open_job;
use safemerge_fast::Error;
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, execute};
use safemerge_fast::plan::Plan;
use safetensors::Dtype;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// One chunk of an observe pass, so that all workers but one wait; and another tensor behind it.
const LAYOUT: &[Shape] =
    &[("first", Dtype::BF16, &[1 << 10, 1 << 10]), ("second", Dtype::BF16, &[1500, 1024])];
const PATIENCE: Duration = Duration::from_secs(60);

/// Methods whose chunks, rows that are sorted, take long; and those that make many passes.
fn observing() -> Vec<Case> {
    cases()
        .into_iter()
        .filter(|case| ["della_linear", "ties", "sce"].contains(&case.method))
        .collect()
}

#[test]
fn cancelled_workers_stop_waiting_at_once() {
    let scene = Scene::new(LAYOUT);
    let plan = Plan::from_json(&scene.plan(&observing(), 1).to_string()).unwrap();
    let shards = plan.select(None).unwrap();
    for threads in [1, 8] {
        let output = open_job(&scene.path("out")).unwrap();
        let progress = Progress::default();
        let options = Options { threads, ..Options::default() };
        let mut asked = None;
        let mut poll = || {
            asked.get_or_insert_with(Instant::now);
            false
        };
        let stopped = execute(&plan, &shards, &output, &options, &progress, &mut poll);
        let since = asked.expect("the work was over before it was interrupted").elapsed();
        assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
        assert!(since < Duration::from_millis(200), "{threads} threads took {since:?}");
        drop(output);
        assert!(!scene.path("out").exists());
    }
}

#[test]
fn a_chunk_that_fails_ends_the_wait_of_the_others() {
    // The fault lies in the second tensor's second chunk; the sums of the passes before it are there.
    let scene = Scene::with(LAYOUT, |model, name, mut values| {
        if model == 0 && name == "second" {
            values[(1 << 20) + 5] = f32::INFINITY;
        }
        values
    });
    let slerp: Vec<Case> = cases().into_iter().filter(|case| case.method == "slerp").collect();
    for threads in [1, 2, 8] {
        let plan = Plan::from_json(&scene.plan(&slerp, 1).to_string()).unwrap();
        let path = scene.path("out");
        let (sender, receiver) = mpsc::channel();
        // By itself, since a merge that hangs would hang the tests.
        std::thread::spawn(move || {
            let output = open_job(&path).unwrap();
            let shards = plan.select(None).unwrap();
            let options = Options { threads, tile_bytes: 1 << 20, ..Options::default() };
            let progress = Progress::default();
            let found = execute(&plan, &shards, &output, &options, &progress, &mut || true);
            drop(output);
            sender.send(found.map(drop)).unwrap();
        });
        let found = receiver.recv_timeout(PATIENCE).expect("the workers hang");
        let Err(Error::Merge { tensor, .. }) = &found else { panic!("{found:?}") };
        assert_eq!(tensor, "0.second");
        assert!(!scene.path("out").exists(), "something was left behind");
    }
}
