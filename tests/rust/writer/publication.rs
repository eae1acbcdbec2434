//! How an output gets its name, and what an older one becomes.

use super::{Change, beside, contents, fill, make, make_at, model, names, open, refused};
use crate::fixtures::publish;
use safemerge_fast::writer::{JobDirectory, Overwrite, Placement};
use std::path::Path;

#[test]
fn a_published_output_holds_what_was_written_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("deep/out");
    for empty in [false, true] {
        if empty {
            std::fs::remove_dir_all(&output).unwrap();
            std::fs::create_dir(&output).unwrap();
        }
        let job = open(&output, "new", false, Overwrite::No).unwrap();
        fill(&job, "new").unwrap();
        // What nobody wrote through the job is no part of the output.
        std::fs::create_dir(job.files().join("stray")).unwrap();
        std::fs::write(job.files().join("stray/file"), b"x").unwrap();
        publish(&job, "new").unwrap();
        assert!(job.is_complete());
        assert_eq!(job.files(), output.canonicalize().unwrap());
        assert_eq!(contents(&output).unwrap(), model("new"));
        assert_eq!(names(output.parent().unwrap()), ["out"]);
    }
}

#[test]
fn an_old_output_stays_whole_until_the_new_one_is() {
    for placement in [Placement::Auto, Placement::Inside] {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        make_at(&output, "old", false, Overwrite::No, placement).unwrap();
        let overwrite = Overwrite::Exchange;
        let job = JobDirectory::open_at(&output, "new", &[], false, overwrite, placement).unwrap();
        fill(&job, "new").unwrap();
        let mut standing = contents(&output).unwrap();
        standing.retain(|name, _| !name.starts_with(".safemerge"));
        assert_eq!(standing, model("old"));
        publish(&job, "new").unwrap();
        assert_eq!(contents(&output).unwrap(), model("new"));
        assert_eq!(names(directory.path()), ["out"]);
    }
}

#[test]
fn in_place_the_old_output_goes_before_the_first_shard() {
    for placement in [Placement::Auto, Placement::Inside] {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        make_at(&output, "old", false, Overwrite::No, placement).unwrap();
        let opened = |resume, overwrite| {
            JobDirectory::open_at(&output, "new", &[], resume, overwrite, placement).unwrap()
        };
        let job = opened(false, Overwrite::InPlace);
        job.append("scores.jsonl", b"{}\n").unwrap();
        job.write_file("config.json", b"{}").unwrap();
        assert!(output.join("model-a.safetensors").exists());
        super::put_shard(&job, "model.safetensors", b"new", "n").unwrap();
        let left = if output.exists() { names(&output) } else { Vec::new() };
        assert!(left.iter().all(|name| name == ".safemerge"), "{left:?}");
        drop(job);
        // The mode is remembered.
        let job = opened(true, Overwrite::No);
        fill(&job, "new").unwrap();
        publish(&job, "new").unwrap();
        assert_eq!(contents(&output).unwrap(), model("new"));
        assert_eq!(names(directory.path()), ["out"]);
    }
}

#[test]
fn an_output_that_changes_meanwhile_is_not_replaced() {
    let change: [Change; 3] = [
        ("a file is added", |output| std::fs::write(output.join("thesis.tex"), b"years").unwrap()),
        ("another takes its place", |output| {
            std::fs::rename(output, output.with_file_name("away")).unwrap();
            make(output, "old", false, Overwrite::No).unwrap();
        }),
        ("it becomes a file", |output| {
            std::fs::rename(output, output.with_file_name("away")).unwrap();
            std::fs::write(output, b"file").unwrap();
        }),
    ];
    for (case, change) in change {
        for overwrite in [Overwrite::Exchange, Overwrite::InPlace] {
            let directory = tempfile::tempdir().unwrap();
            let output = directory.path().join("out");
            make(&output, "old", false, Overwrite::No).unwrap();
            let job = open(&output, "new", false, overwrite).unwrap();
            job.append("scores.jsonl", b"{}\n").unwrap();
            let aside = directory.path().join("job");
            // Whoever changes it does not ask this program, or would meet its lock.
            std::fs::rename(job.path(), &aside).unwrap();
            change(&output);
            std::fs::rename(&aside, job.path()).unwrap();
            let before = contents(&output);
            let done = fill(&job, "new").and_then(|()| publish(&job, "new"));
            let message = done.unwrap_err().to_string();
            assert!(message.contains("has changed while the merge ran"), "{case}: {message}");
            assert_eq!(contents(&output), before, "{case}");
        }
    }
}

#[test]
fn an_output_that_appears_meanwhile_is_not_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let job = open(&output, "new", false, Overwrite::No).unwrap();
    fill(&job, "new").unwrap();
    std::fs::create_dir(&output).unwrap();
    std::fs::write(output.join("notes"), b"theirs").unwrap();
    let message = publish(&job, "new").unwrap_err().to_string();
    assert!(
        message.contains("move what stands there away and continue with --resume"),
        "{message}"
    );
    drop(job);
    assert_eq!(std::fs::read(output.join("notes")).unwrap(), b"theirs");
    std::fs::remove_dir_all(&output).unwrap();
    make(&output, "new", true, Overwrite::No).unwrap();
    assert_eq!(contents(&output).unwrap(), model("new"));
}

#[test]
fn an_input_that_becomes_part_of_the_old_output_is_not_removed() {
    for overwrite in [Overwrite::Exchange, Overwrite::InPlace] {
        let directory = tempfile::tempdir().unwrap();
        let (input, output) = (directory.path().join("input"), directory.path().join("out"));
        std::fs::create_dir(&input).unwrap();
        std::fs::write(input.join("w.safetensors"), b"weights").unwrap();
        make(&output, "old", false, Overwrite::No).unwrap();
        let inputs = [input.clone()];
        let job = JobDirectory::open(&output, "new", &inputs, false, overwrite).unwrap();
        std::fs::remove_file(output.join("model.safetensors")).unwrap();
        std::fs::hard_link(input.join("w.safetensors"), output.join("model.safetensors")).unwrap();
        let done = fill(&job, "new").and_then(|()| publish(&job, "new"));
        let message = done.unwrap_err().to_string();
        assert!(message.contains("by another name"), "{message}");
        assert_eq!(std::fs::read(output.join("model.safetensors")).unwrap(), b"weights");
    }
}

/// A job that is about to publish, killed: its directory as a kill leaves it.
pub fn killed(output: &Path, overwrite: Overwrite) {
    let job = open(output, "new", false, overwrite).unwrap();
    fill(&job, "new").unwrap();
    let files: Vec<_> = job
        .written()
        .iter()
        .map(|file| serde_json::json!({"name": file.name, "bytes": file.bytes}))
        .collect();
    let report = serde_json::json!({"job": {"identity": "new"}, "files": files}).to_string();
    job.write_file("safemerge_report.json", report.as_bytes()).unwrap();
}

#[test]
fn a_job_killed_behind_its_publication_is_complete_and_cleaned_up() {
    for old in [false, true] {
        for resume in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let output = directory.path().join("out");
            if old {
                make(&output, "old", false, Overwrite::No).unwrap();
            }
            killed(&output, if old { Overwrite::Exchange } else { Overwrite::No });
            // The rename, and where there was an old output, the exchange.
            let (making, away) = (beside(&output).join("output"), directory.path().join("away"));
            if old {
                std::fs::rename(&output, &away).unwrap();
            }
            std::fs::rename(&making, &output).unwrap();
            if old {
                std::fs::rename(&away, &making).unwrap();
            }
            let opened = open(&output, "new", resume, Overwrite::No);
            if resume {
                assert!(opened.unwrap().is_complete());
            } else {
                assert!(refused(opened).contains("exists and is complete"));
            }
            assert_eq!(contents(&output).unwrap(), model("new"));
            assert_eq!(names(directory.path()), ["out"]);
        }
    }
}

#[test]
fn an_old_output_that_was_set_aside_comes_back() {
    for (resume, overwrite) in [(true, Overwrite::No), (false, Overwrite::Exchange)] {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        make(&output, "old", false, Overwrite::No).unwrap();
        killed(&output, Overwrite::Exchange);
        std::fs::rename(&output, beside(&output).join("old")).unwrap();
        let job = open(&output, "new", resume, overwrite).unwrap();
        assert_eq!(contents(&output).unwrap(), model("old"));
        fill(&job, "new").unwrap();
        publish(&job, "new").unwrap();
        assert_eq!(contents(&output).unwrap(), model("new"));
        assert_eq!(names(directory.path()), ["out"]);
    }
}

#[test]
fn moves_that_were_begun_are_carried_out_by_whoever_comes_next() {
    for moved in ["nothing", "a shard", "a mark"] {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        make_at(&output, "old", false, Overwrite::No, Placement::Inside).unwrap();
        let (exchange, inside) = (Overwrite::Exchange, Placement::Inside);
        let job = JobDirectory::open_at(&output, "new", &[], false, exchange, inside).unwrap();
        fill(&job, "new").unwrap();
        let path = job.path().to_owned();
        drop(job);
        let list = |kind: &str| model(kind).into_keys().collect::<Vec<_>>();
        let moves = serde_json::json!({"add": list("new"), "remove": list("old")}).to_string();
        std::fs::write(path.join("publish.json"), moves).unwrap();
        if moved != "nothing" {
            for name in list("old") {
                std::fs::remove_file(output.join(name)).unwrap();
            }
            let name = if moved == "a mark" { "config.json" } else { "model.safetensors" };
            std::fs::rename(path.join("output").join(name), output.join(name)).unwrap();
        }
        // The report of this made-up list is missing, so that the output is nobody's; but it is whole.
        std::fs::remove_file(output.join("safemerge_report.json")).unwrap();
        refused(open(&output, "new", true, Overwrite::No));
        assert_eq!(contents(&output).unwrap(), model("new"), "{moved}");
        assert_eq!(names(&output.join("templates")), ["deep", "new.jinja"]);
        assert!(!path.exists());
    }
}
