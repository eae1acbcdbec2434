//! What stands under an output's name after success, failure, a crash, and in between.

mod attempts;
#[cfg(feature = "faults")]
mod faults;
mod hostile;
mod opening;
mod publication;
mod shards;

use crate::fixtures::{Pair, publish};
use safemerge_fast::plan::Changes;
use safemerge_fast::writer::{JobDirectory, Overwrite, Placement, REPORT, TileBuffer, WriteMode};
use safemerge_fast::{Error, Result};
use safetensors::Dtype;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What is done to a path, and a name for it or the words that must come of it.
pub type Change = (&'static str, fn(&Path));

pub fn pair() -> Pair {
    Pair::new(&[
        ("a", Dtype::BF16, &[300, 40]),
        ("b", Dtype::F32, &[500]),
        ("c", Dtype::I64, &[9]),
        ("d", Dtype::F16, &[64, 64]),
    ])
}

/// The names in a directory, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Paths and bytes of all files under a directory, the report left out; `None` if it is not there.
pub fn contents(directory: &Path) -> Option<BTreeMap<PathBuf, Vec<u8>>> {
    fn collect(directory: &Path, inner: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for name in names(&directory.join(inner)) {
            let inner = inner.join(&name);
            if directory.join(&inner).is_dir() {
                collect(directory, &inner, found);
            } else if name != "safemerge_report.json" {
                found.insert(inner.clone(), std::fs::read(directory.join(&inner)).unwrap());
            }
        }
    }
    directory.is_dir().then(|| {
        let mut found = BTreeMap::new();
        collect(directory, Path::new(""), &mut found);
        found
    })
}

/// Opens a job of these inputs.
pub fn open(
    output: &Path,
    identity: &str,
    resume: bool,
    overwrite: Overwrite,
) -> Result<JobDirectory> {
    JobDirectory::open(output, identity, &[], resume, overwrite)
}

/// The message of a refusal, which must be about the output.
pub fn refused(opened: Result<JobDirectory>) -> String {
    let error = opened.expect_err("must be refused");
    assert!(matches!(error, Error::Output { .. }), "{error}");
    error.to_string()
}

/// Writes and commits a shard of these bytes.
pub fn put_shard(job: &JobDirectory, name: &str, bytes: &[u8], digest: &str) -> Result<()> {
    let mut buffer = TileBuffer::new(bytes.len().next_multiple_of(4096))?;
    buffer.filled(bytes.len()).copy_from_slice(bytes);
    let shard = job.create_shard(name, bytes.len(), WriteMode::Auto)?;
    shard.write(&mut buffer, 0)?;
    job.commit_shard(&shard, digest, &Changes::new())
}

/// The files of a made-up model; `kind` decides on bytes, and on the layout.
pub fn model(kind: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let shards = if kind == "old" {
        ["model-a.safetensors", "model.safetensors"]
    } else {
        ["model-b.safetensors", "model.safetensors"]
    };
    let small = ["config.json", "model.safetensors.index.json", "templates/deep/chat.jinja"];
    let own = if kind == "old" { "adapter_config.json" } else { "templates/new.jinja" };
    let bytes = |name: &str, length: usize| format!("{kind} {name} ").into_bytes().repeat(length);
    let weights = shards.iter().map(|name| (PathBuf::from(name), bytes(name, 300)));
    let others = small.iter().chain([&own]).map(|name| (PathBuf::from(name), bytes(name, 1)));
    weights.chain(others).collect()
}

/// Puts a finished made-up model under an output's name, by hand.
pub fn stand(output: &Path, kind: &str) {
    for (name, bytes) in model(kind) {
        let path = output.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let files: Vec<_> = model(kind)
        .iter()
        .map(|(name, bytes)| json!({"name": name, "bytes": bytes.len()}))
        .collect();
    let report = json!({"files": files, "job": {"identity": kind}}).to_string();
    std::fs::write(output.join(REPORT), report).unwrap();
}

/// Makes all files of a made-up model, shards as far as they are missing; does not publish.
pub fn fill(job: &JobDirectory, kind: &str) -> Result<()> {
    for (name, bytes) in model(kind) {
        let name = name.to_str().unwrap();
        if !name.ends_with(".safetensors") {
            job.write_file(name, &bytes)?;
        } else if !job.has(name, bytes.len(), kind) {
            put_shard(job, name, &bytes, kind)?;
        }
    }
    Ok(())
}

/// Makes a made-up model of the identity `kind` and publishes it.
pub fn make(output: &Path, kind: &str, resume: bool, overwrite: Overwrite) -> Result<()> {
    make_at(output, kind, resume, overwrite, Placement::Auto)
}

/// The same, with the job directory where the placement says.
pub fn make_at(
    output: &Path,
    kind: &str,
    resume: bool,
    overwrite: Overwrite,
    placement: Placement,
) -> Result<()> {
    let job = JobDirectory::open_at(output, kind, &[], resume, overwrite, placement)?;
    if job.is_complete() {
        return Ok(());
    }
    fill(&job, kind)?;
    publish(&job, kind)
}

/// The job directory of an output beside it.
pub fn beside(output: &Path) -> PathBuf {
    let name = output.file_name().unwrap().to_str().unwrap();
    output.with_file_name(format!(".{name}.safemerge"))
}
