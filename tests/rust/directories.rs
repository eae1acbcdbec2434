//! Directories, indices and files that are not what they should be: one error at once, and what to do.

use crate::fixtures::{Tensor, write};
use rustix::fs::{Mode, mknodat};
use safemerge_fast::checkpoint::Checkpoint;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

fn refusal(path: &Path) -> String {
    let message = Checkpoint::open(path).expect_err("must be refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

fn pipe(path: &Path) {
    let kind = rustix::fs::FileType::Fifo;
    mknodat(rustix::fs::CWD, path, kind, Mode::from(0o644), 0).unwrap();
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn pipes_devices_and_directories_in_place_of_files_are_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    pipe(&path.join("pipe"));
    assert!(refusal(&path.join("pipe")).contains("a pipe, socket or device"));
    assert!(refusal(Path::new("/dev/zero")).contains("a pipe, socket or device"));

    let weights = path.join("model.safetensors");
    pipe(&weights);
    assert!(refusal(path).contains("a pipe, socket or device, not a regular file"));
    std::fs::remove_file(&weights).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &weights).unwrap();
    assert!(refusal(path).contains("a pipe, socket or device, not a regular file"));
    std::fs::remove_file(&weights).unwrap();
    std::fs::create_dir(&weights).unwrap();
    assert!(refusal(path).contains("it is a directory, not a regular file"));
    std::fs::remove_dir(&weights).unwrap();

    pipe(&path.join(INDEX));
    assert!(refusal(path).contains("a pipe, socket or device, not a regular file"));
    std::fs::remove_file(path.join(INDEX)).unwrap();
    std::fs::create_dir(path.join(INDEX)).unwrap();
    assert!(refusal(path).contains("it is a directory, not a regular file"));
}

#[test]
fn indices_that_are_no_index_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write(&path.join("x.safetensors"), &[Tensor::f32("a", &[1.0])]);
    let deep = |count: usize| {
        let nested = format!("{}{}", "[".repeat(count), "]".repeat(count));
        format!(r#"{{"metadata":{nested},"weight_map":{{"a":"x.safetensors"}}}}"#)
    };
    for (text, fault) in [
        (deep(100_000), "recursion"),
        ("[]".to_owned(), "not an index"),
        ("{}".to_owned(), "weight_map"),
        (r#"{"weight_map":{"a":1}}"#.to_owned(), "not an index"),
        (r#"{"weight_map":{"a":"x\u0000.safetensors"}}"#.to_owned(), r"x\x00.safetensors"),
        (r#"{"weight_map":{"a\u001b[2J\n":"x.safetensors"}}"#.to_owned(), r"a\x1b[2J\n"),
        ("version https://git-lfs.github.com/spec/v1\n".to_owned(), "git lfs pull"),
    ] {
        std::fs::write(path.join(INDEX), text).unwrap();
        let message = refusal(path);
        assert!(message.contains(fault) && message.contains(INDEX), "{message}");
    }
    // A sparse file of more than is read.
    std::fs::File::create(path.join(INDEX)).unwrap().set_len((256 << 20) + 1).unwrap();
    assert!(refusal(path).contains("more than 268435456 bytes"));

    std::fs::write(path.join(INDEX), deep(50)).unwrap();
    assert_eq!(Checkpoint::open(path).unwrap().len(), 1);
    // A reader of JSON takes the last of two.
    let twice = r#"{"weight_map":{"a":"nowhere","a":"x.safetensors"}}"#;
    std::fs::write(path.join(INDEX), twice).unwrap();
    assert!(refusal(path).contains("the shard nowhere, which is missing"));
    write(&path.join("y.safetensors"), &[Tensor::f32("a", &[2.0])]);
    let twice = r#"{"weight_map":{"a":"y.safetensors","a":"x.safetensors"}}"#;
    std::fs::write(path.join(INDEX), twice).unwrap();
    let checkpoint = Checkpoint::open(path).unwrap();
    assert_eq!(checkpoint.len(), 1);
    assert_eq!(checkpoint.get("a").unwrap().0.name, "x.safetensors");
}

#[test]
fn names_that_are_not_unicode_are_shown_and_refused() {
    let outer = tempfile::tempdir().unwrap();
    let directory = outer.path().join(OsStr::from_bytes(b"mod\xffel"));
    std::fs::create_dir(&directory).unwrap();
    write(&directory.join("model.safetensors"), &[Tensor::f32("a", &[1.0])]);
    let message = refusal(&directory);
    assert!(message.contains(r"mod\xffel") && message.contains("not UTF-8"), "{message}");

    let inner = outer.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    write(&inner.join(OsStr::from_bytes(b"x\xff.safetensors")), &[Tensor::f32("a", &[1.0])]);
    let message = refusal(&inner);
    assert!(message.contains(r"x\xff.safetensors") && message.contains("not UTF-8"), "{message}");
}

#[test]
fn what_stands_in_place_of_weights_is_named_with_the_way_out() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    let cases: [(&[&str], &str); 17] = [
        (&["checkpoint-90/", "checkpoint-1000/", "checkpoint-x/", "trainer.pt"], "checkpoint-1000"),
        (&["__0_0.distcp", ".metadata"], "accelerate merge-weights"),
        (&["pytorch_model_fsdp_0/", "optimizer.bin"], "pytorch_model_fsdp_0 OUT"),
        (&["zero_to_fp32.py", "global_step5/"], "zero_to_fp32.py"),
        (&["pytorch_model.bin"], "pytorch_model.bin is a pickle"),
        (&["model.Q4.gguf"], "GGUF"),
        (&["__0_0.distcp"], "torch.distributed.checkpoint.format_utils dcp_to_torch"),
        (&["global_step500/", "latest"], "deepspeed.utils.zero_to_fp32"),
        (&["iter_0000100/", "latest_checkpointed_iteration.txt"], "Megatron"),
        (&["mp_rank_00/"], "Megatron"),
        (&["consolidated.00.pth", "params.json"], "convert_llama_weights_to_hf"),
        (&["model_index.json", "unet/", "vae/"], "/unet"),
        (&["tf_model.h5"], "tf_model.h5 is of TensorFlow or Keras"),
        (&["flax_model.msgpack"], "of Flax"),
        (&["model.onnx"], "ONNX"),
        (&["model.keras"], "of Keras"),
        (&["README.md"], "give the directory that holds model.safetensors"),
    ];
    for (entries, advice) in cases {
        let directory = tempfile::tempdir().unwrap();
        for entry in entries {
            match entry.strip_suffix('/') {
                Some(name) => std::fs::create_dir(directory.path().join(name)).unwrap(),
                None => std::fs::write(directory.path().join(entry), b"").unwrap(),
            }
        }
        let message = refusal(directory.path());
        assert!(message.contains(advice), "{message}");
    }
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("model.safetensors"), pointer).unwrap();
    let message = refusal(directory.path());
    assert!(message.contains("git-lfs pointer") && message.contains("`git lfs pull`"), "{message}");
    for (start, advice) in [
        (&b"GGUF\x03\0\0\0\x10\0\0\0"[..], "GGUF"),
        (b"PK\x03\x04\x14\0\0\x08zip", "is a pickle"),
        (b"\x80\x02}q\0X\x01\0\0", "is a pickle"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"<html><body>Not found", "web page"),
    ] {
        std::fs::write(directory.path().join("model.safetensors"), start).unwrap();
        let message = refusal(directory.path());
        assert!(message.contains(advice), "{message}");
    }
}
