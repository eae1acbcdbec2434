//! Several attempts at one shard: each in a file of its own, one of them named, the others gone.

use super::{names, pair};
use crate::fixtures::{open_job, publish};
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::preparing::{PreparedShard, prepare};
use safemerge_fast::merge::stream::{Options, execute};
use safemerge_fast::plan::Plan;
use safemerge_fast::writer::{AttemptId, Commit, JobDirectory, Overwrite, Workplace, WriteMode};
use safemerge_fast::{Error, Result};
use std::path::Path;

fn at(plan: &Plan, number: usize, job: &Path, attempt: &AttemptId) -> Result<PreparedShard> {
    let (options, progress) = (Options::default(), Progress::default());
    let place = Workplace::open(job)?;
    prepare(plan, &plan.shards()[number], &place, attempt, &options, &progress, &mut || true)
}

fn reopen(out: &Path) -> JobDirectory {
    JobDirectory::open(out, "test", &[], true, Overwrite::No).unwrap()
}

#[test]
fn the_first_that_is_prepared_wins_and_bytes_are_those_of_one_process() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(2).to_string()).unwrap();
    let (one, many) = (pair.path("one"), pair.path("many"));
    let job = open_job(&one).unwrap();
    let all = plan.select(None).unwrap();
    execute(&plan, &all, &job, &Options::default(), &Progress::default(), &mut || true).unwrap();
    publish(&job, "test").unwrap();

    let job = open_job(&many).unwrap();
    let files: Vec<&str> = plan.shards().iter().map(|shard| shard.file.as_str()).collect();
    let attempts = job.begin_attempts(&[files[0], files[1], files[0]]).unwrap();
    let journal = std::fs::read_to_string(job.path().join("journal")).unwrap();
    for attempt in &attempts {
        assert!(journal.contains(&format!("{{\"attempt\":\"{}\"", attempt.as_str())), "{journal}");
    }
    let late = at(&plan, 0, job.path(), &attempts[0]).unwrap();
    let first = at(&plan, 0, job.path(), &attempts[2]).unwrap();
    let other = at(&plan, 1, job.path(), &attempts[1]).unwrap();
    assert_eq!(names(&job.files()), [""; 0], "nothing has a name before it is committed");
    // As it comes from another process.
    let first = PreparedShard::from_json(&first.to_json().unwrap()).unwrap();
    assert_eq!(first.commit(&plan, &job).unwrap(), Commit::Named);
    assert_eq!(late.commit(&plan, &job).unwrap(), Commit::Late);
    assert_eq!(first.commit(&plan, &job).unwrap(), Commit::Late, "said twice");
    assert_eq!(other.commit(&plan, &job).unwrap(), Commit::Named);
    assert_eq!(names(&job.path().join("attempts")), [""; 0]);
    publish(&job, "test").unwrap();
    assert_eq!(super::contents(&one), super::contents(&many));
    assert!(!job.path().exists());
}

#[test]
fn an_attempt_that_is_given_up_comes_to_nothing() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(2).to_string()).unwrap();
    let file = plan.shards()[0].file.clone();
    let out = pair.path("out");
    let job = open_job(&out).unwrap();
    let attempts = job.begin_attempts(&[&file, &file]).unwrap();
    // Its worker hangs in the middle of it.
    let place = Workplace::open(job.path()).unwrap();
    let half = place.create(&file, &attempts[0], 5, WriteMode::Buffered).unwrap();
    let prepared = at(&plan, 0, job.path(), &attempts[1]).unwrap();
    job.abort(&file, &attempts[0]).unwrap();
    job.abort(&file, &attempts[1]).unwrap();
    assert_eq!(prepared.commit(&plan, &job).unwrap(), Commit::Gone);
    let error = place.prepare(&half, "x", &Default::default()).unwrap_err();
    assert!(matches!(&error, Error::Output { .. }), "{error}");
    assert!(error.to_string().contains("given up"), "{error}");

    // A takeover gives up all, and what begins after it finds no place.
    job.append("scores", b"so that the job stays").unwrap();
    let half = place.create(&file, &attempts[0], 5, WriteMode::Buffered).unwrap();
    drop(job);
    let job = reopen(&out);
    job.take_over().unwrap();
    assert!(place.prepare(&half, "x", &Default::default()).is_err());
    assert!(place.create(&file, &attempts[1], 5, WriteMode::Buffered).is_err());
    assert!(at(&plan, 0, job.path(), &attempts[1]).is_err());
    // Numbers go on where the earlier run stopped.
    let next = job.begin_attempts(&[&file]).unwrap();
    assert!(!attempts.contains(&next[0]), "{next:?}");
    // Its worker is at it until long after the end.
    let half = place.create(&file, &next[0], 5, WriteMode::Buffered).unwrap();
    let all = plan.select(None).unwrap();
    execute(&plan, &all, &job, &Options::default(), &Progress::default(), &mut || true).unwrap();
    publish(&job, "test").unwrap();
    let whole = super::contents(&out);
    assert!(place.prepare(&half, "x", &Default::default()).is_err());
    drop(half);
    assert_eq!(super::contents(&out), whole);
    assert!(!out.with_file_name(".out.safemerge").exists());
    assert!(Workplace::open(&out.with_file_name(".out.safemerge")).is_err());
}

#[test]
fn only_attempts_of_this_job_and_shards_of_this_plan_are_committed() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(2).to_string()).unwrap();
    let other = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    let job = open_job(&pair.path("out")).unwrap();
    job.hand_out().unwrap();
    let own = AttemptId::new("w1f").unwrap();
    let prepared = at(&plan, 0, job.path(), &own).unwrap();
    let error = prepared.commit(&plan, &job).unwrap_err().to_string();
    assert!(error.contains("begun no attempt w1f"), "{error}");
    job.adopt(prepared.shard.file(), &own).unwrap();
    let again = at(&plan, 0, job.path(), &own);
    assert!(again.is_err(), "two attempts never share a file");
    assert!(prepared.commit(&other, &job).is_err());
    assert_eq!(prepared.commit(&plan, &job).unwrap(), Commit::Named);
    for name in ["", "A", "a/b", "..", "a.b", &"1".repeat(41)] {
        assert!(AttemptId::new(name).is_err(), "{name}");
    }
}
