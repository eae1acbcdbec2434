//! Shards and small files of an output in the making.

use super::{names, pair};
use crate::fixtures::{self, Pair, open_job, publish, source};
use safemerge_fast::checkpoint::Checkpoint;
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, execute};
use safemerge_fast::plan::Plan;
use safemerge_fast::writer::{JobDirectory, Overwrite, WriteMode};
use safetensors::Dtype;
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

#[test]
fn resume_redoes_only_what_is_not_committed() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(2).to_string()).unwrap();
    let out = pair.path("out");
    let all = plan.select(None).unwrap();
    let options = Options::default();
    let job = open_job(&out).unwrap();
    let (path, files) = (job.path().to_owned(), job.files());
    execute(&plan, &all[..1], &job, &options, &Progress::default(), &mut || true).unwrap();
    drop(job);
    assert!(!out.exists(), "nothing stands under the output's name before it is whole");
    // As after kill -9 in the middle of the second shard: a partial file lies about, a renamed shard is not in the journal,
    // and the journal's last line is torn.
    std::fs::write(files.join(".model-1.safetensors.partial"), b"half").unwrap();
    std::fs::write(files.join("model-1.safetensors"), b"of another layout").unwrap();
    let journal = std::fs::OpenOptions::new().append(true).open(path.join("journal"));
    journal.unwrap().write_all(b"{\"file\":\"model-1.saf").unwrap();
    let before = std::fs::metadata(files.join("model-0.safetensors")).unwrap();

    let job = JobDirectory::open(&out, "test", &[], true, Overwrite::No).unwrap();
    assert_eq!(job.committed(), ["model-0.safetensors"]);
    assert_eq!(names(&files), ["model-0.safetensors"]);
    let progress = Progress::default();
    let facts = execute(&plan, &all, &job, &options, &progress, &mut || true).unwrap();
    assert_eq!(facts.iter().map(|f| f.resumed).collect::<Vec<_>>(), [true, false]);
    assert_eq!(progress.bytes(), plan.traffic().1);
    publish(&job, "test").unwrap();
    assert_eq!(
        names(&out),
        ["model-0.safetensors", "model-1.safetensors", "safemerge_report.json"]
    );
    assert!(!path.exists());
    let after = std::fs::metadata(out.join("model-0.safetensors")).unwrap();
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
}

#[test]
fn a_committed_shard_counts_only_for_the_very_same_plan_and_if_it_is_there() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(2).to_string()).unwrap();
    let shards = plan.select(None).unwrap();
    let job = open_job(&pair.path("out")).unwrap();
    execute(&plan, &shards, &job, &Options::default(), &Progress::default(), &mut || true).unwrap();
    let (file, size, digest) = (&shards[0].file, shards[0].layout.size, &shards[0].digest);
    assert!(job.has(file, size, digest));
    assert!(!job.has(file, size, &shards[1].digest));
    assert!(!job.has(file, size + 1, digest));
    std::fs::write(job.files().join(file), b"cut").unwrap();
    assert!(!job.has(file, size, digest));
}

#[test]
fn small_files_are_whole_and_stay_inside() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let job = open_job(&out).unwrap();
    job.write_file("config.json", b"{}").unwrap();
    job.write_file("config.json", b"{\"a\":1}").unwrap();
    job.copy_file(&job.files().join("config.json"), "templates/deep/copy.json").unwrap();
    for name in ["../x", "/x", "", ".", "a/../../x", "a//x", "a/", "./a", ".safemerge/x", "a\0b"] {
        assert!(job.write_file(name, b"x").is_err(), "{name}");
        assert!(job.create_shard(name, 1, WriteMode::Auto).is_err(), "{name}");
        assert!(job.append(name, b"x").is_err(), "{name}");
    }
    assert!(!directory.path().join("x").exists());
    let written = job.written();
    let digest = blake3::hash(b"{\"a\":1}").to_hex().to_string();
    let known: Vec<_> = written.iter().map(|file| (file.name.as_str(), file.bytes)).collect();
    assert_eq!(known, [("config.json", 7), ("templates/deep/copy.json", 7)]);
    assert!(written.iter().all(|file| file.digest.as_ref() == Some(&digest)));
    publish(&job, "test").unwrap();
    assert_eq!(std::fs::read(out.join("templates/deep/copy.json")).unwrap(), b"{\"a\":1}");
    assert_eq!(names(&out), ["config.json", "safemerge_report.json", "templates"]);
}

#[test]
fn only_regular_files_are_copied() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let job = open_job(&directory.path().join("out")).unwrap();
    for source in [pipe.as_path(), directory.path(), Path::new("/dev/zero")] {
        let error = job.copy_file(source, "copy").unwrap_err().to_string();
        assert!(error.contains("regular file"), "{error}");
    }
    assert_eq!(names(&job.files()), [""; 0]);
}

#[test]
fn files_of_the_job_are_appended_to_and_never_part_of_the_output() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let job = open_job(&out).unwrap();
    assert_eq!(job.read("scores.jsonl").unwrap(), None);
    job.append("scores.jsonl", b"one\n").unwrap();
    job.append("scores.jsonl", b"two\n").unwrap();
    for name in
        ["lock", "journal", "job.json", "output", "old", "doomed", "publish.json", ".x", "a/b"]
    {
        assert!(job.append(name, b"x").is_err(), "{name}");
        assert!(job.read(name).is_err() && job.remove(name).is_err(), "{name}");
    }
    drop(job);
    let job = JobDirectory::open(&out, "test", &[], true, Overwrite::No).unwrap();
    assert_eq!(job.read("scores.jsonl").unwrap().unwrap(), b"one\ntwo\n");
    job.append("other", b"x").unwrap();
    job.remove("other").unwrap();
    job.remove("other").unwrap();
    assert_eq!(job.read("other").unwrap(), None);
    publish(&job, "test").unwrap();
    assert_eq!(names(&out), ["safemerge_report.json"]);
    assert_eq!(names(directory.path()), ["out"]);
}

#[test]
fn another_identity_keeps_shards_by_digest_and_files_of_the_job() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let job = super::open(&out, "one", false, Overwrite::No).unwrap();
    for (name, digest) in [("kept.safetensors", "k"), ("stale.safetensors", "s")] {
        super::put_shard(&job, name, b"bytes", digest).unwrap();
    }
    job.append("scores.jsonl", b"of one").unwrap();
    drop(job);
    let job = super::open(&out, "two", true, Overwrite::No).unwrap();
    assert_eq!(job.read("scores.jsonl").unwrap().unwrap(), b"of one");
    assert_eq!(job.written(), [], "nothing is claimed yet");
    assert!(job.has("kept.safetensors", 5, "k") && !job.has("stale.safetensors", 5, "t"));
    publish(&job, "two").unwrap();
    assert_eq!(names(&out), ["kept.safetensors", "safemerge_report.json"]);
}

#[test]
fn files_get_the_permissions_of_the_umask() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    let job = open_job(&pair.path("out")).unwrap();
    let shards = plan.select(None).unwrap();
    execute(&plan, &shards, &job, &Options::default(), &Progress::default(), &mut || true).unwrap();
    publish(&job, "test").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let plain = pair.path("plain");
    std::fs::write(&plain, b"").unwrap();
    for name in ["model-0.safetensors", "safemerge_report.json"] {
        assert_eq!(mode(&pair.path("out").join(name)), mode(&plain));
    }
}

#[test]
fn a_forced_mode_is_kept_or_refused() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    let shards = plan.select(None).unwrap();
    for (write, direct) in [(WriteMode::Buffered, false), (WriteMode::Direct, true)] {
        let job = open_job(&pair.path("out")).unwrap();
        let options = Options { write, ..Options::default() };
        match execute(&plan, &shards, &job, &options, &Progress::default(), &mut || true) {
            Ok(facts) => assert_eq!(facts[0].write == "direct", direct),
            Err(error) => {
                assert!(direct && error.to_string().contains("refuses direct writes"), "{error}")
            }
        }
    }
}

#[test]
fn a_shard_that_equals_an_input_is_cloned_where_blocks_can_be_shared() {
    let pair = Pair::new(&[("a", Dtype::BF16, &[40, 30]), ("b", Dtype::F32, &[7])]);
    let input = pair.path("first").join("model.safetensors");
    let checkpoint = Checkpoint::open(&pair.path("first")).unwrap();
    let tensors: Vec<_> = checkpoint
        .tensors()
        .map(|(_, tensor)| {
            json!({"name": tensor.name, "dtype": tensor.dtype.to_string(), "shape": tensor.shape,
                   "copy": {"source": "first", "tensor": tensor.name}})
        })
        .collect();
    let part = json!({"name": "c", "dtype": "F32", "shape": [7], "copy": {"source": "first", "tensor": "b"}});
    let plan = fixtures::plan(
        json!({"first": source(&pair.path("first"))}),
        vec![
            json!({"file": "whole.safetensors", "tensors": tensors}),
            json!({"file": "part.safetensors", "tensors": [part]}),
        ],
    );
    let plan = Plan::from_json(&plan.to_string()).unwrap();
    assert!(plan.equal_input(&plan.shards()[0]).unwrap().is_some());
    assert!(plan.equal_input(&plan.shards()[1]).unwrap().is_none());
    let job = open_job(&pair.path("out")).unwrap();
    let shards = plan.select(None).unwrap();
    let done = |options: &Options| {
        execute(&plan, &shards, &job, options, &Progress::default(), &mut || true).unwrap()
    };
    let facts = done(&Options::default());
    // What coreutils can do in this directory, the engine must have done.
    let copied = std::process::Command::new("cp")
        .arg("--reflink=always")
        .args([&input, &pair.path("cloned")])
        .stderr(std::process::Stdio::null())
        .status();
    let shares = copied.is_ok_and(|status| status.success());
    assert_eq!(facts[0].write == "cloned", shares);
    assert_ne!(facts[1].write, "cloned");
    let written = std::fs::read(job.files().join("whole.safetensors")).unwrap();
    assert!(written == std::fs::read(input).unwrap());
}
