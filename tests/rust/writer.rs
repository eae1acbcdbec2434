//! What stands in the output directory after success, failure, a crash, and in between.

use crate::fixtures::{self, Pair, source};
use safemerge_fast::Error;
use safemerge_fast::checkpoint::Checkpoint;
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, execute};
use safemerge_fast::plan::Plan;
use safemerge_fast::writer::{JOURNAL, Output, WriteMode};
use safetensors::Dtype;
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn pair() -> Pair {
    Pair::new(&[
        ("a", Dtype::BF16, &[300, 40]),
        ("b", Dtype::F32, &[500]),
        ("c", Dtype::I64, &[9]),
        ("d", Dtype::F16, &[64, 64]),
    ])
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn refusal(path: &Path, inputs: &[&Path], resume: bool, overwrite: bool) -> String {
    let opened = Output::open(path, inputs.iter().copied(), resume, overwrite);
    let error = opened.expect_err("must be refused");
    assert!(matches!(error, Error::Output { .. }));
    error.to_string()
}

#[test]
fn resume_redoes_only_what_is_not_committed() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(2).to_string()).unwrap();
    let out = pair.path("out");
    let all = plan.select(None).unwrap();
    let options = Options::default();
    let output = Output::open(&out, [], false, false).unwrap();
    execute(&plan, &all[..1], &output, &options, &Progress::default(), &mut || true).unwrap();
    // As after kill -9 in the middle of the second shard: the journal stays, a partial file lies about, its line is torn.
    drop(output);
    std::fs::write(out.join(".model-1.safetensors.partial"), b"half").unwrap();
    let journal = std::fs::read_to_string(out.join(JOURNAL)).unwrap();
    std::fs::write(out.join(JOURNAL), format!("{journal}{{\"file\":\"model-1.saf")).unwrap();
    let first = out.join("model-0.safetensors");
    let before = std::fs::metadata(&first).unwrap().modified().unwrap();

    assert!(refusal(&out, &[], false, false).contains("--resume"));
    let output = Output::open(&out, [], true, false).unwrap();
    assert_eq!(output.committed(), ["model-0.safetensors"]);
    let progress = Progress::default();
    let facts = execute(&plan, &all, &output, &options, &progress, &mut || true).unwrap();
    assert_eq!(facts.iter().map(|f| f.resumed).collect::<Vec<_>>(), [true, false]);
    assert_eq!(progress.bytes(), plan.traffic().1);
    output.finish().unwrap();
    assert_eq!(names(&out), ["model-0.safetensors", "model-1.safetensors"]);
    assert_eq!(std::fs::metadata(&first).unwrap().modified().unwrap(), before);
}

#[test]
fn a_committed_shard_counts_only_for_the_very_same_plan_and_if_it_is_there() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(2).to_string()).unwrap();
    let shards = plan.select(None).unwrap();
    let output = Output::open(&pair.path("out"), [], false, false).unwrap();
    execute(&plan, &shards, &output, &Options::default(), &Progress::default(), &mut || true)
        .unwrap();
    let (file, size, digest) = (&shards[0].file, shards[0].layout.size, &shards[0].digest);
    assert!(output.has(file, size, digest));
    assert!(!output.has(file, size, &shards[1].digest));
    assert!(!output.has(file, size + 1, digest));
    std::fs::write(pair.path("out").join(file), b"cut").unwrap();
    assert!(!output.has(file, size, digest));
}

#[test]
fn two_writers_cannot_share_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let first = Output::open(&out, [], false, false).unwrap();
    assert!(refusal(&out, &[], true, false).contains("locked"));
    drop(first);
    assert!(!out.exists(), "nothing was committed, so nothing stays");
    Output::open(&out, [], false, false).unwrap();
}

#[test]
fn inputs_are_never_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let input = directory.path().join("input");
    std::fs::create_dir(&input).unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&input, &link).unwrap();
    for (out, word) in [
        (input.clone(), " is the input"),
        (link.clone(), " is the input"),
        (link.join("new/deep"), "lies inside"),
        (directory.path().to_owned(), "contains"),
    ] {
        let message = refusal(&out, &[&input], false, true);
        assert!(message.contains(word), "{message}");
    }
    // A sibling with the input's name as a prefix is apart.
    Output::open(&directory.path().join("input2"), [input.as_path()], false, false).unwrap();
}

#[test]
fn overwriting_waits_for_the_first_new_file_and_then_takes_the_old_model_away() {
    let pair = pair();
    let out = pair.path("out");
    std::fs::create_dir(&out).unwrap();
    for name in ["config.json", "model.safetensors", "model.safetensors.index.json", "notes.txt"] {
        std::fs::write(out.join(name), b"old").unwrap();
    }
    assert!(refusal(&out, &[], false, false).contains("--overwrite"));
    drop(Output::open(&out, [], false, true).unwrap());
    assert_eq!(names(&out).len(), 4, "a run that wrote nothing took nothing");

    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    let output = Output::open(&out, [], false, true).unwrap();
    let shards = plan.select(None).unwrap();
    execute(&plan, &shards, &output, &Options::default(), &Progress::default(), &mut || true)
        .unwrap();
    output.finish().unwrap();
    assert_eq!(names(&out), ["model-0.safetensors", "notes.txt"]);
}

#[test]
fn small_files_are_whole_and_stay_inside() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let output = Output::open(&out, [], false, false).unwrap();
    output.write_file("config.json", b"{}").unwrap();
    output.write_file("config.json", b"{\"a\":1}").unwrap();
    output.copy_file(&out.join("config.json"), "templates/deep/copy.json").unwrap();
    assert_eq!(std::fs::read(out.join("templates/deep/copy.json")).unwrap(), b"{\"a\":1}");
    for name in ["../x", "/x", "", "a/../../x"] {
        assert!(output.write_file(name, b"x").is_err(), "{name}");
    }
    assert!(!directory.path().join("x").exists());
    output.finish().unwrap();
    assert_eq!(names(&out), ["config.json", "templates"]);
}

#[test]
fn files_get_the_permissions_of_the_umask() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    let output = Output::open(&pair.path("out"), [], false, false).unwrap();
    let shards = plan.select(None).unwrap();
    execute(&plan, &shards, &output, &Options::default(), &Progress::default(), &mut || true)
        .unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let plain = pair.path("plain");
    std::fs::write(&plain, b"").unwrap();
    assert_eq!(mode(&pair.path("out").join("model-0.safetensors")), mode(&plain));
}

#[test]
fn a_forced_mode_is_kept_or_refused() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    let shards = plan.select(None).unwrap();
    for (write, direct) in [(WriteMode::Buffered, false), (WriteMode::Direct, true)] {
        let output = Output::open(&pair.path("out"), [], false, true).unwrap();
        let options = Options { write, ..Options::default() };
        match execute(&plan, &shards, &output, &options, &Progress::default(), &mut || true) {
            Ok(facts) => assert_eq!(facts[0].write == "direct", direct),
            Err(error) => {
                assert!(direct && error.to_string().contains("refuses direct writes"), "{error}")
            }
        }
        output.finish().unwrap();
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
    let shards = vec![
        json!({"file": "whole.safetensors", "tensors": tensors}),
        json!({"file": "part.safetensors", "tensors": [
            {"name": "c", "dtype": "F32", "shape": [7], "copy": {"source": "first", "tensor": "b"}}]}),
    ];
    let plan = fixtures::plan(json!({"first": source(&pair.path("first"))}), shards);
    let plan = Plan::from_json(&plan.to_string()).unwrap();
    assert!(plan.equal_input(&plan.shards()[0]).unwrap().is_some());
    assert!(plan.equal_input(&plan.shards()[1]).unwrap().is_none());
    let output = Output::open(&pair.path("out"), [], false, false).unwrap();
    let shards = plan.select(None).unwrap();
    let done = |options: &Options| {
        execute(&plan, &shards, &output, options, &Progress::default(), &mut || true).unwrap()
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
    let written = std::fs::read(pair.path("out").join("whole.safetensors")).unwrap();
    assert!(written == std::fs::read(input).unwrap());
}
