//! Each step of the protocol fails or is the last one: what stands under the output's name is the old whole output, the new
//! one, or nothing, and a later run ends as if nothing had been.
//!
//! Jobs run in processes of their own, this test binary again, so that their fail points are no other test's.

use super::publication::killed;
use super::{beside, contents, fill, model, names, open, put_shard, stand};
use crate::fixtures::publish;
use safemerge_fast::writer::{
    JobDirectory, Overwrite, Placement, Workplace, WriteMode, fault_points,
};
use safemerge_fast::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const KILLED: i32 = 9;

/// What a job meets, and how it is asked for.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    name: &'static str,
    set_up: fn(&Path),
    resume: bool,
    overwrite: &'static str,
    inside: bool,
    /// Fail points besides the one in question.
    always: &'static str,
}

const FRESH: Scenario = Scenario {
    name: "fresh",
    set_up: |_| {},
    resume: false,
    overwrite: "no",
    inside: false,
    always: "",
};
const OVER: Scenario = Scenario { name: "exchange", set_up: old, overwrite: "exchange", ..FRESH };

const SCENARIOS: &[Scenario] = &[
    FRESH,
    OVER,
    Scenario { name: "set aside", always: "publish.exchange=return(einval)", ..OVER },
    Scenario { name: "in place", overwrite: "in-place", ..OVER },
    Scenario { name: "resumed", set_up: unfinished, resume: true, ..FRESH },
    Scenario { name: "begun anew", set_up: unfinished, overwrite: "exchange", ..FRESH },
    Scenario { name: "exchanged", set_up: exchanged, resume: true, ..FRESH },
    Scenario { name: "was set aside", set_up: was_set_aside, resume: true, ..FRESH },
    Scenario { name: "inside", inside: true, ..FRESH },
    Scenario { name: "inside, exchange", inside: true, ..OVER },
    Scenario { name: "inside, in place", inside: true, overwrite: "in-place", ..OVER },
];

fn old(output: &Path) {
    stand(output, "old");
}

/// A job of another identity, with a shard of the same name, one of another layout, files of the job, and what a kill leaves.
fn unfinished(output: &Path) {
    let job = open(output, "other", false, Overwrite::No).unwrap();
    put_shard(&job, "model.safetensors", b"other", "other").unwrap();
    put_shard(&job, "stale.safetensors", b"stale", "other").unwrap();
    job.append("scores.jsonl", b"other\n").unwrap();
    std::fs::create_dir_all(job.files().join("templates/deep")).unwrap();
    std::fs::write(job.files().join("templates/deep/x"), b"").unwrap();
    std::fs::write(job.files().join(".model-b.safetensors.partial"), b"half").unwrap();
    // An attempt that a worker of that job is still at.
    let attempts = job.begin_attempts(&["model-b.safetensors"]).unwrap();
    let place = Workplace::open(job.path()).unwrap();
    let half = place.create("model-b.safetensors", &attempts[0], 5, WriteMode::Buffered).unwrap();
    std::mem::forget(half);
}

/// A job that was killed right behind the exchange.
fn exchanged(output: &Path) {
    stand(output, "old");
    killed(output, Overwrite::Exchange);
    let (making, away) = (beside(output).join("output"), output.with_file_name("away"));
    std::fs::rename(output, &away).unwrap();
    std::fs::rename(&making, output).unwrap();
    std::fs::rename(&away, &making).unwrap();
}

/// A job that was killed while no output was there.
fn was_set_aside(output: &Path) {
    stand(output, "old");
    killed(output, Overwrite::Exchange);
    std::fs::rename(output, beside(output).join("old")).unwrap();
}

/// The whole life of a job.
fn work(output: &Path, resume: bool, overwrite: Overwrite, placement: Placement) -> Result<()> {
    let job = JobDirectory::open_at(output, "new", &[], resume, overwrite, placement)?;
    if job.is_complete() {
        return Ok(());
    }
    job.append("scores.jsonl", b"one\n")?;
    job.append("scores.jsonl", b"two\n")?;
    job.append("passing", b"x")?;
    job.remove("passing")?;
    let source = std::fs::File::open("/proc/self/exe").unwrap();
    // Whether or not it can be cloned, the shard is not wanted.
    drop(job.clone_shard("clone.safetensors", 5, &source)?);
    fill(&job, "new")?;
    publish(&job, "new")
}

/// A job with fail points, run by `run_child`. By itself it has nothing to do.
#[test]
fn child() {
    let Ok(output) = std::env::var("FAULTS_OUTPUT") else { return };
    let flags = std::env::var("FAULTS_FLAGS").unwrap();
    let overwrite = flags.split(' ').find_map(|flag| flag.strip_prefix("overwrite=")).unwrap();
    let inside = flags.contains("inside");
    let placement = if inside { Placement::Inside } else { Placement::Auto };
    let scenario = fail::FailScenario::setup();
    let overwrite = Overwrite::named(overwrite).unwrap();
    let done = work(Path::new(&output), flags.contains("resume"), overwrite, placement);
    scenario.teardown();
    std::process::exit(match done {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            if matches!(error, Error::DiskFull { .. }) { 6 } else { 5 }
        }
    });
}

fn run_child(output: &Path, resume: bool, overwrite: &str, inside: bool, points: &str) -> Output {
    let resume = if resume { "resume" } else { "" };
    let inside = if inside { "inside" } else { "" };
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer::faults::child", "--nocapture"])
        .env("FAULTS_OUTPUT", output)
        .env("FAULTS_FLAGS", format!("{resume} {inside} overwrite={overwrite}"))
        .env("FAILPOINTS", points)
        .output()
        .unwrap()
}

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// What stands there, the job directory left out.
fn standing(output: &Path) -> Option<Files> {
    let mut found = contents(output)?;
    found.retain(|name, _| !name.starts_with(".safemerge"));
    (!found.is_empty()).then_some(found)
}

/// The old whole output, the new one, or nothing. Inside, where files move one by one, nothing looks complete meanwhile.
fn check_standing(output: &Path, inside: bool, case: &str) {
    let Some(mut found) = standing(output) else { return };
    let is_mark = |name: &Path| {
        let name = name.to_str().unwrap();
        name == "config.json" || name == "adapter_config.json" || name.ends_with(".index.json")
    };
    let mut whole = [model("old"), model("new")];
    if inside {
        if !found.keys().any(|name| is_mark(name)) {
            return;
        }
        for files in whole.iter_mut().chain([&mut found]) {
            files.retain(|name, _| !is_mark(name));
        }
    }
    assert!(whole.contains(&found), "{case}: a mixture: {:?}", found.keys());
}

/// Resumes as a person would, and looks at what comes of it.
fn check_resumed(output: &Path, scenario: &Scenario, case: &str) {
    let path = if scenario.inside { output.join(".safemerge") } else { beside(output) };
    let begun = ["job.json", "publish.json"].iter().any(|name| path.join(name).exists());
    let mut resumed = run_child(output, true, "no", scenario.inside, "");
    let message = String::from_utf8_lossy(&resumed.stderr).into_owned();
    if !resumed.status.success() && !begun && message.contains("replace it with --overwrite") {
        // Nothing had begun, and the old output stands.
        assert_eq!(standing(output), Some(model("old")), "{case}");
        resumed = run_child(output, true, scenario.overwrite, scenario.inside, "");
    }
    let message = String::from_utf8_lossy(&resumed.stderr);
    assert!(resumed.status.success(), "{case}: {message}");
    assert_eq!(contents(output).unwrap(), model("new"), "{case}");
    assert_eq!(names(output.parent().unwrap()), ["out"], "{case}");
}

/// A place for an output; in memory, since nobody here waits for a disk.
fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// Runs a scenario with an action at a point. Returns whether the point was passed, as far as that shows: the job ended other
/// than well.
fn try_point(scenario: &Scenario, point: &str, action: &str) -> Option<(Output, String)> {
    let case = format!("{}: {point}={action}", scenario.name);
    let directory = place();
    let output = directory.path().join("deep/out");
    (scenario.set_up)(&output);
    let points = format!("{};{point}={action}", scenario.always);
    let done = run_child(&output, scenario.resume, scenario.overwrite, scenario.inside, &points);
    let code = done.status.code();
    let expected = done.status.signal() == Some(KILLED) || matches!(code, Some(0 | 5 | 6));
    assert!(expected, "{case}: {done:?}");
    check_standing(&output, scenario.inside, &case);
    check_resumed(&output, scenario, &case);
    (code != Some(0)).then_some((done, case))
}

/// The points that a scenario passes, found by dying at them.
fn passed(scenario: &Scenario) -> BTreeSet<&'static str> {
    let mut passed = BTreeSet::new();
    for &point in fault_points() {
        if scenario.always.starts_with(point) {
            continue;
        }
        if try_point(scenario, point, "1*return(kill)").is_some() {
            passed.insert(point);
            for later in ["1*off->1*return(kill)", "3*off->1*return(kill)"] {
                try_point(scenario, point, later);
            }
        }
    }
    passed
}

fn for_all(work: impl Fn(&Scenario) + Sync) {
    std::thread::scope(|scope| {
        for half in SCENARIOS.chunks(SCENARIOS.len().div_ceil(2)) {
            scope.spawn(|| half.iter().for_each(&work));
        }
    });
}

#[test]
fn every_step_may_be_the_last_or_fail() {
    let met = std::sync::Mutex::new(BTreeSet::new());
    for_all(|scenario| {
        let points = passed(scenario);
        for point in &points {
            for action in ["enospc", "edquot", "efbig", "eio"] {
                let Some((done, case)) = try_point(scenario, point, &format!("1*return({action})"))
                else {
                    continue;
                };
                let message = String::from_utf8_lossy(&done.stderr);
                assert_eq!(message.lines().count(), 1, "{case}: {message}");
                let full = message.contains("no space left");
                assert_eq!(full, action != "eio", "{case}: {message}");
                if done.status.code() == Some(6) {
                    assert!(message.contains("--resume"), "{case}: {message}");
                }
            }
            for action in ["1*return(eintr)", "2*return(eintr)", "return(short)"] {
                let failed = try_point(scenario, point, action);
                assert!(failed.is_none(), "{failed:?}");
            }
        }
        met.lock().unwrap().extend(points);
    });
    let all: BTreeSet<&str> = fault_points().iter().copied().collect();
    let met = met.into_inner().unwrap();
    assert_eq!(all.difference(&met).collect::<Vec<_>>(), [&""; 0], "points that nothing passes");
}
