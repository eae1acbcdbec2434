//! Journals, records, reports and lists that somebody else wrote.

use super::{Change, beside, contents, make, model, open, put_shard, refused};
use safemerge_fast::writer::{JobDirectory, Overwrite, Placement};
use serde_json::json;
use std::io::Write;
use std::path::Path;

const HOSTILE: [&str; 7] =
    ["../victim", "/victim", "a/../../victim", "", "..", ".safemerge/victim", "victim\u{0}"];

fn append(path: &Path, text: &str) {
    let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn a_journal_never_leads_out_of_its_directory() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let job = open(&output, "new", false, Overwrite::No).unwrap();
    put_shard(&job, "first.safetensors", b"first", "d").unwrap();
    put_shard(&job, "second.safetensors", b"second", "d").unwrap();
    let (path, files) = (job.path().to_owned(), job.files());
    drop(job);
    let victims = [directory.path().join("victim"), path.join("victim"), files.join("victim")];
    for victim in &victims {
        std::fs::write(victim, b"theirs").unwrap();
    }
    for name in HOSTILE {
        append(
            &path.join("journal"),
            &format!("{}\n", json!({"file": name, "size": 6, "digest": "d"})),
        );
        append(&path.join("journal"), &format!("{}\n", json!({"revoked": name})));
    }
    let lines = [
        json!({"file": "first.safetensors"}).to_string(),
        json!({"file": "first.safetensors", "size": -1, "digest": "d"}).to_string(),
        json!({"file": "first.safetensors", "size": 1e300, "digest": "d"}).to_string(),
        json!([1, 2]).to_string(),
        "[".repeat(100_000),
        "\u{0}\u{1}".to_owned(),
        json!({"file": "gone.safetensors", "size": 6, "digest": "d"}).to_string(),
        json!({"revoked": "second.safetensors"}).to_string(),
    ];
    append(&path.join("journal"), &lines.join("\n"));
    let job = open(&output, "new", true, Overwrite::No).unwrap();
    assert_eq!(job.committed(), ["first.safetensors"]);
    assert!(job.has("first.safetensors", 5, "d"));
    assert!(!files.join("second.safetensors").exists(), "what is taken back is swept");
    // Only the one in the output in the making is this job's to remove.
    assert!(victims[0].exists() && victims[1].exists() && !victims[2].exists());
}

#[test]
fn a_report_that_names_files_elsewhere_is_no_mark() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    let victim = directory.path().join("victim");
    std::fs::write(&victim, b"theirs").unwrap();
    let report = |files: serde_json::Value| json!({"job": {"identity": "old"}, "files": files});
    let listed = |name: &str| json!([{"name": name, "bytes": 6, "digest": null}]);
    let mut reports: Vec<String> =
        HOSTILE.iter().map(|name| report(listed(name)).to_string()).collect();
    reports.extend([
        json!({"files": []}).to_string(),
        json!({"job": {"identity": "old"}}).to_string(),
        json!({"job": {"identity": 3}, "files": []}).to_string(),
        report(json!([{"name": "a", "bytes": -1}])).to_string(),
        report(json!({"a": 1})).to_string(),
        r#"{"job":{"identity":"a"},"job":{"identity":"b"},"files":[]}"#.to_owned(),
        String::new(),
        "[".repeat(200_000),
        format!("{{\"deep\":{}", "[".repeat(200_000)),
        report(json!([])).to_string() + "x",
    ]);
    for report in reports {
        std::fs::create_dir(&output).unwrap();
        std::fs::write(output.join("safemerge_report.json"), &report).unwrap();
        for overwrite in [Overwrite::No, Overwrite::Exchange, Overwrite::InPlace] {
            let message = refused(open(&output, "new", false, overwrite));
            assert!(message.contains("does not list the output's files"), "{message}");
            assert!(!message.contains('\u{0}'), "{message:?}");
        }
        assert_eq!(std::fs::read(output.join("safemerge_report.json")).unwrap(), report.as_bytes());
        std::fs::remove_dir_all(&output).unwrap();
    }
    assert!(victim.exists());
}

#[test]
fn what_the_report_does_not_list_is_refused_by_name() {
    let add: [Change; 5] = [
        ("thesis.tex", |output| std::fs::write(output.join("thesis.tex"), b"").unwrap()),
        (".hidden", |output| std::fs::write(output.join(".hidden"), b"").unwrap()),
        ("templates/mine", |output| std::fs::write(output.join("templates/mine"), b"").unwrap()),
        ("empty", |output| std::fs::create_dir(output.join("empty")).unwrap()),
        ("config.json", |output| {
            std::fs::remove_file(output.join("config.json")).unwrap();
            std::fs::create_dir(output.join("config.json")).unwrap();
        }),
    ];
    for (name, add) in add {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        make(&output, "old", false, Overwrite::No).unwrap();
        add(&output);
        for overwrite in [Overwrite::No, Overwrite::Exchange, Overwrite::InPlace] {
            let message = refused(open(&output, "new", false, overwrite));
            assert!(message.contains(&format!("holds {name}, which")), "{message}");
        }
        assert_eq!(super::names(directory.path()), ["out"]);
    }
}

#[test]
fn a_job_directory_of_something_else_is_refused_and_not_touched() {
    let set_up: [Change; 6] = [
        ("move it away", |job| std::fs::write(job, b"file").unwrap()),
        ("move it away", |job| {
            let elsewhere = job.with_file_name("elsewhere");
            std::fs::create_dir(&elsewhere).unwrap();
            std::os::unix::fs::symlink(elsewhere, job).unwrap();
        }),
        ("holds notes of something else", |job| {
            std::fs::create_dir(job).unwrap();
            std::fs::write(job.join("notes"), b"theirs").unwrap();
        }),
        ("of something else", |job| {
            std::fs::create_dir_all(job.join("output")).unwrap();
            std::fs::write(job.join("output/model.safetensors"), b"theirs").unwrap();
        }),
        ("not safemerge-fast's", |job| {
            std::fs::create_dir(job).unwrap();
            std::fs::write(job.join("job.json"), b"{}").unwrap();
        }),
        ("not safemerge-fast's", |job| {
            std::fs::create_dir(job).unwrap();
            std::fs::write(job.join("job.json"), "[".repeat(300_000)).unwrap();
        }),
    ];
    for (text, set_up) in set_up {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        set_up(&beside(&output));
        let before = contents(directory.path()).unwrap();
        for resume in [false, true] {
            for overwrite in [Overwrite::No, Overwrite::Exchange] {
                let message = refused(open(&output, "new", resume, overwrite));
                assert!(message.contains(text), "{message}");
                let mut after = contents(directory.path()).unwrap();
                after.retain(|name, _| !name.ends_with("lock"));
                assert_eq!(after, before);
            }
        }
    }
}

#[test]
fn pipes_and_devices_hold_nobody_up() {
    for name in ["journal", "job.json", "lock", "scores.jsonl"] {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("out");
        let job = open(&output, "new", false, Overwrite::No).unwrap();
        put_shard(&job, "first.safetensors", b"first", "d").unwrap();
        let path = job.path().join(name);
        drop(job);
        drop(std::fs::remove_file(&path));
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let opened = open(&output, "new", true, Overwrite::No);
        match name {
            "scores.jsonl" => assert!(opened.unwrap().read(name).is_err()),
            "lock" => drop(opened),
            _ => assert!(opened.unwrap_err().to_string().contains("regular file")),
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    std::fs::create_dir(&output).unwrap();
    std::os::unix::fs::symlink("/dev/zero", output.join("safemerge_report.json")).unwrap();
    let message = refused(open(&output, "new", false, Overwrite::Exchange));
    assert!(message.contains("regular file"), "{message}");
}

#[test]
fn a_list_of_moves_never_leads_out_of_the_output() {
    for name in HOSTILE {
        for list in [json!({"add": [name], "remove": []}), json!({"add": [], "remove": [name]})] {
            let directory = tempfile::tempdir().unwrap();
            let output = directory.path().join("out");
            std::fs::create_dir_all(output.join(".safemerge/output")).unwrap();
            std::fs::write(output.join(".safemerge/victim"), b"theirs").unwrap();
            std::fs::write(output.join(".safemerge/publish.json"), list.to_string()).unwrap();
            std::fs::write(directory.path().join("victim"), b"theirs").unwrap();
            let before = contents(directory.path()).unwrap();
            let (exchange, inside) = (Overwrite::Exchange, Placement::Inside);
            let message =
                refused(JobDirectory::open_at(&output, "new", &[], true, exchange, inside));
            assert!(message.contains("not safemerge-fast's"), "{message}");
            let mut after = contents(directory.path()).unwrap();
            after.retain(|name, _| !name.ends_with("lock"));
            assert_eq!(after, before, "{name}");
        }
    }
}

#[test]
fn links_in_an_old_output_are_removed_and_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out");
    make(&output, "old", false, Overwrite::No).unwrap();
    let victim = directory.path().join("victim");
    std::fs::create_dir(&victim).unwrap();
    std::fs::write(victim.join("file"), b"theirs").unwrap();
    std::fs::remove_file(output.join("config.json")).unwrap();
    std::os::unix::fs::symlink(&victim, output.join("config.json")).unwrap();
    make(&output, "new", false, Overwrite::Exchange).unwrap();
    assert_eq!(contents(&output).unwrap(), model("new"));
    assert_eq!(std::fs::read(victim.join("file")).unwrap(), b"theirs");
}
