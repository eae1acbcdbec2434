//! Which job may be begun, gone on with, or must be refused.

use super::{beside, contents, make, model, names, open, put_shard, refused, stand};
use safemerge_fast::writer::{JobDirectory, Overwrite, Placement};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What stands under the output's name.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Found {
    Absent,
    Empty,
    Same,
    Other,
    Foreign,
    Extended,
    File,
}

/// What must come of it.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    Begins,
    GoesOn,
    Complete,
    Refused(&'static str),
}
use Outcome::{Begins, Complete, GoesOn, Refused};

const FLAGS: [(bool, Overwrite); 6] = [
    (false, Overwrite::No),
    (true, Overwrite::No),
    (false, Overwrite::Exchange),
    (false, Overwrite::InPlace),
    (true, Overwrite::Exchange),
    (true, Overwrite::InPlace),
];

/// The table, written down apart from the code: which outcome for which flags, in their order.
fn expected(found: Found, unfinished: Option<Overwrite>) -> [Outcome; 6] {
    const EXISTS: Outcome = Refused("exists and is complete; pass --overwrite");
    const UNFINISHED: Outcome = Refused("has an unfinished merge in");
    match (found, unfinished) {
        (Found::File, _) => [Refused("is a file; name a directory"); 6],
        (Found::Foreign, _) => {
            [Refused("holds config.json, which safemerge-fast did not write"); 6]
        }
        (Found::Extended, _) => {
            [Refused("holds thesis.tex, which safemerge-fast did not write"); 6]
        }
        (Found::Absent | Found::Empty, None) => [Begins; 6],
        (Found::Absent | Found::Empty, Some(_)) => {
            [UNFINISHED, GoesOn, Begins, Begins, GoesOn, GoesOn]
        }
        (Found::Same, None) => [EXISTS, Complete, Begins, Begins, Complete, Complete],
        (Found::Other, None) => {
            [EXISTS, Refused("made of other inputs"), Begins, Begins, Begins, Begins]
        }
        (Found::Same | Found::Other, Some(Overwrite::No)) => {
            [UNFINISHED, Refused("has appeared while"), Begins, Begins, GoesOn, GoesOn]
        }
        (Found::Same | Found::Other, Some(_)) => {
            [UNFINISHED, GoesOn, Begins, Begins, GoesOn, GoesOn]
        }
    }
}

/// Leaves an unfinished job with one committed shard.
fn leave_unfinished(output: &Path, overwrite: Overwrite) {
    let job = open(output, "new", false, overwrite).unwrap();
    put_shard(&job, "first.safetensors", b"committed", "d").unwrap();
}

fn set_up(output: &Path, found: Found) {
    match found {
        Found::Absent => {}
        Found::Empty => std::fs::create_dir(output).unwrap(),
        Found::Same => stand(output, "new"),
        Found::Other => stand(output, "old"),
        Found::Foreign => {
            std::fs::create_dir(output).unwrap();
            std::fs::write(output.join("config.json"), b"{}").unwrap();
            std::fs::write(output.join("model.safetensors"), b"theirs").unwrap();
        }
        Found::Extended => {
            stand(output, "new");
            std::fs::write(output.join("thesis.tex"), b"years").unwrap();
        }
        Found::File => std::fs::write(output, b"file").unwrap(),
    }
}

#[test]
fn every_cell_of_the_table_is_as_it_is_documented() {
    let all = [
        Found::Absent,
        Found::Empty,
        Found::Same,
        Found::Other,
        Found::Foreign,
        Found::Extended,
        Found::File,
    ];
    let jobs = [None, Some(Overwrite::No), Some(Overwrite::Exchange)];
    for (found, unfinished) in all.into_iter().flat_map(|found| jobs.map(|job| (found, job))) {
        for ((resume, overwrite), outcome) in FLAGS.into_iter().zip(expected(found, unfinished)) {
            let case = format!("{found:?}, {unfinished:?}, resume {resume}, {overwrite:?}");
            let directory = tempfile::tempdir().unwrap();
            let output = directory.path().join("out");
            // The job is made beside nothing, or it would be refused; then the output appears.
            if let Some(mode) = unfinished {
                leave_unfinished(&output, mode);
                std::fs::rename(beside(&output), directory.path().join("away")).unwrap();
            }
            set_up(&output, found);
            if unfinished.is_some() {
                std::fs::rename(directory.path().join("away"), beside(&output)).unwrap();
            }
            let before = (contents(&output), contents(&beside(&output)));
            let opened = open(&output, "new", resume, overwrite);
            match outcome {
                Refused(text) => {
                    let message = refused(opened);
                    assert!(message.contains(text), "{case}: {message}");
                    assert_eq!((contents(&output), contents(&beside(&output))), before, "{case}");
                }
                Complete => {
                    let job = opened.expect(&case);
                    assert!(job.is_complete(), "{case}");
                    assert_eq!(job.files(), job.output(), "{case}");
                    assert!(job.write_file("x", b"x").is_err(), "{case}");
                    job.publish().expect(&case);
                    assert_eq!((contents(&output), contents(&beside(&output))), before, "{case}");
                }
                Begins | GoesOn => {
                    let job = opened.expect(&case);
                    assert!(!job.is_complete(), "{case}");
                    let goes_on = matches!(outcome, GoesOn);
                    let committed: &[&str] = if goes_on { &["first.safetensors"] } else { &[] };
                    assert_eq!(job.committed(), committed, "{case}");
                    assert_eq!(job.has("first.safetensors", 9, "d"), goes_on, "{case}");
                    assert_eq!(contents(&output), before.0, "{case}: opening takes nothing");
                }
            }
        }
    }
}

#[test]
fn a_job_that_was_hardly_begun_is_no_job() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let path = beside(&output);
    std::fs::create_dir_all(path.join("output")).unwrap();
    std::fs::write(path.join("lock"), b"").unwrap();
    std::fs::write(path.join(".job.json.partial"), b"{").unwrap();
    make(&output, "new", false, Overwrite::No).unwrap();
    assert_eq!(contents(&output).unwrap(), model("new"));
    assert_eq!(names(directory.path()), ["out"]);
}

#[test]
fn a_damaged_output_is_not_complete() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    make(&output, "new", false, Overwrite::No).unwrap();
    std::fs::write(output.join("model.safetensors"), b"cut").unwrap();
    let message = refused(open(&output, "new", true, Overwrite::No));
    assert!(message.contains("lacks model.safetensors"), "{message}");
    std::fs::remove_file(output.join("model.safetensors")).unwrap();
    let message = refused(open(&output, "new", true, Overwrite::No));
    assert!(message.contains("lacks model.safetensors"), "{message}");
    make(&output, "new", true, Overwrite::Exchange).unwrap();
    assert_eq!(contents(&output).unwrap(), model("new"));
}

#[test]
fn a_job_without_anything_to_keep_leaves_no_trace() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("deep/er/out");
    drop(open(&output, "new", false, Overwrite::No).unwrap());
    assert_eq!(names(directory.path()), [""; 0]);
    let job = open(&output, "new", false, Overwrite::No).unwrap();
    job.write_file("config.json", b"{}").unwrap();
    drop(job);
    assert_eq!(names(directory.path()), [""; 0]);
    let job = open(&output, "new", false, Overwrite::No).unwrap();
    job.append("scores.jsonl", b"{}\n").unwrap();
    drop(job);
    assert_eq!(names(output.parent().unwrap()), [".out.safemerge"]);
    assert!(refused(open(&output, "new", false, Overwrite::No)).contains("--resume"));
}

#[test]
fn an_overwriting_job_that_has_begun_to_write_stays_to_be_resumed() {
    for overwrite in [Overwrite::Exchange, Overwrite::InPlace] {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        make(&output, "old", false, Overwrite::No).unwrap();
        drop(open(&output, "new", false, overwrite).unwrap());
        assert_eq!(names(directory.path()), ["out"]);
        let job = open(&output, "new", false, overwrite).unwrap();
        job.write_file("config.json", b"{}").unwrap();
        drop(job);
        assert_eq!(contents(&output).unwrap(), model("old"), "no shard was begun");
        make(&output, "new", true, Overwrite::No).unwrap();
        assert_eq!(contents(&output).unwrap(), model("new"));
        assert_eq!(names(directory.path()), ["out"]);
    }
}

#[test]
fn two_jobs_cannot_have_one_output() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let first = open(&output, "new", false, Overwrite::No).unwrap();
    for (resume, overwrite) in FLAGS {
        assert!(refused(open(&output, "new", resume, overwrite)).contains("locked"));
    }
    drop(first);
    assert_eq!(names(directory.path()), [""; 0], "nothing was committed, so nothing stays");
    open(&output, "new", false, Overwrite::No).unwrap();
}

#[test]
fn jobs_that_begin_and_end_all_the_time_never_hold_one_lock_together() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("deep/out");
    let (holders, held) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                start.wait();
                for _ in 0..100 {
                    match open(&output, "new", false, Overwrite::No) {
                        Ok(job) => {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two holders");
                            std::thread::yield_now();
                            holders.fetch_sub(1, Ordering::SeqCst);
                            held.fetch_add(1, Ordering::SeqCst);
                            drop(job);
                        }
                        Err(error) => {
                            let message = error.to_string();
                            assert!(message.contains("is locked"), "{message}");
                        }
                    }
                }
            });
        }
    });
    assert!(held.load(Ordering::SeqCst) > 0);
    let parent = output.parent().unwrap();
    assert!(!parent.exists() || names(parent).is_empty());
}

#[test]
fn links_and_dots_lead_to_the_output_that_they_mean() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().canonicalize().unwrap();
    std::fs::create_dir(root.join("real")).unwrap();
    std::os::unix::fs::symlink("real", root.join("link")).unwrap();
    std::os::unix::fs::symlink("real/dangling", root.join("nowhere")).unwrap();
    std::os::unix::fs::symlink("loop", root.join("loop")).unwrap();
    for (path, leads) in [
        ("link", "real"),
        ("link/new", "real/new"),
        ("nowhere", "real/dangling"),
        ("new/../real/x", "real/x"),
        ("./real/./x/", "real/x"),
    ] {
        let job = open(&root.join(path), "new", false, Overwrite::No).unwrap();
        assert_eq!(job.output(), root.join(leads), "{path}");
    }
    assert!(
        refused(open(&root.join("loop"), "new", false, Overwrite::No)).contains("link to itself")
    );
    assert!(refused(open(Path::new("/"), "new", false, Overwrite::No)).contains("root directory"));
    make(&root.join("link"), "new", false, Overwrite::No).unwrap();
    assert_eq!(contents(&root.join("real")).unwrap(), model("new"));
    assert!(root.join("link").is_symlink());
}

#[test]
fn inputs_are_told_by_what_they_are_and_not_by_their_names() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let input = root.join("input");
    std::fs::create_dir_all(input.join("inner")).unwrap();
    std::fs::write(input.join("model.safetensors"), b"weights").unwrap();
    std::os::unix::fs::symlink(&input, root.join("link")).unwrap();
    let opened = |output: &Path, input: &Path, overwrite| {
        JobDirectory::open(output, "new", &[input.to_owned()], false, overwrite)
    };
    for (output, word) in [
        (input.clone(), " is the input"),
        (root.join("link"), " is the input"),
        (root.join("new/../input"), " is the input"),
        (root.join("link/new/deep"), "lies inside"),
        (input.join("inner"), "lies inside"),
        (root.to_owned(), "contains"),
    ] {
        for overwrite in [Overwrite::No, Overwrite::Exchange, Overwrite::InPlace] {
            let message = refused(opened(&output, &input, overwrite));
            assert!(message.contains(word), "{message}");
        }
    }
    // The file is the input; its directory is the output.
    let file = input.join("model.safetensors");
    assert!(refused(opened(&input, &file, Overwrite::Exchange)).contains("contains the input"));
    // A sibling with the input's name as a prefix is apart.
    drop(opened(&root.join("input2"), &input, Overwrite::No).unwrap());
    assert_eq!(names(root), ["input", "link"]);
}

#[test]
fn an_output_that_shares_a_file_with_an_input_is_never_touched() {
    for link in ["hard", "soft", "the input's"] {
        let directory = tempfile::tempdir().unwrap();
        let (input, output) = (directory.path().join("input"), directory.path().join("out"));
        std::fs::create_dir(&input).unwrap();
        make(&output, "old", false, Overwrite::No).unwrap();
        let (theirs, ours) = (input.join("w.safetensors"), output.join("model.safetensors"));
        match link {
            "hard" => std::fs::hard_link(&ours, &theirs).unwrap(),
            "soft" => {
                std::fs::rename(&ours, &theirs).unwrap();
                std::os::unix::fs::symlink(&theirs, &ours).unwrap();
            }
            _ => std::os::unix::fs::symlink(&ours, &theirs).unwrap(),
        }
        let before = contents(&output);
        for overwrite in [Overwrite::Exchange, Overwrite::InPlace] {
            let opened =
                JobDirectory::open(&output, "new", std::slice::from_ref(&input), false, overwrite);
            let message = refused(opened);
            assert!(message.contains("by another name"), "{link}: {message}");
            assert_eq!(contents(&output), before);
            assert_eq!(names(directory.path()), ["input", "out"]);
        }
    }
}

#[test]
fn a_job_inside_its_output_follows_the_same_table() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let opened = |identity: &str, resume, overwrite| {
        JobDirectory::open_at(&output, identity, &[], resume, overwrite, Placement::Inside)
    };
    let job = opened("new", false, Overwrite::No).unwrap();
    assert_eq!(job.path(), output.join(".safemerge"));
    assert!(refused(opened("new", true, Overwrite::No)).contains("locked"));
    drop(job);
    assert_eq!(names(directory.path()), [""; 0]);
    let job = opened("new", false, Overwrite::No).unwrap();
    put_shard(&job, "first.safetensors", b"committed", "d").unwrap();
    drop(job);
    assert!(refused(opened("new", false, Overwrite::No)).contains("unfinished"));
    // What lies inside is found without being told so.
    let job = open(&output, "new", true, Overwrite::No).unwrap();
    assert_eq!(job.committed(), ["first.safetensors"]);
    drop(job);
    std::fs::write(output.join("thesis.tex"), b"years").unwrap();
    for (resume, overwrite) in FLAGS {
        assert!(refused(opened("new", resume, overwrite)).contains("thesis.tex"));
    }
}
