//! Which files make up a checkpoint, by the rules that transformers follows.

use super::advice::advice;
use super::weight_map::{Index, WeightMap};
use super::{regular, remote};
use crate::error::printable;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Bytes of an index at most; that of a million tensors has some 100 MB.
const LARGEST_INDEX: u64 = 256 << 20;

/// The files of a checkpoint.
pub(super) struct Found {
    pub directory: PathBuf,
    pub index: Option<String>,
    pub files: Vec<String>,
    pub weight_map: Option<WeightMap>,
}

impl Found {
    fn single(directory: PathBuf, file: String) -> Self {
        Self { directory, index: None, files: vec![file], weight_map: None }
    }
}

/// Finds the shards of a checkpoint: one file, `model.safetensors`, an index, or the only weights in the directory.
pub(super) fn find(path: &Path) -> Result<Found> {
    if remote::is_url(path) {
        return match remote::find(path)? {
            Some(names) => among(path, &names),
            None => single_file(path),
        };
    }
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            Error::NotFound { path: path.to_owned() }
        }
        _ => Error::read(path, error),
    })?;
    if path.to_str().is_none() {
        // Plans, reports and indices are JSON, which holds Unicode only.
        return Err(Error::unusable(path, "its path is not UTF-8; rename it"));
    }
    if metadata.is_file() {
        return single_file(path);
    }
    if !metadata.is_dir() {
        return Err(Error::unusable(
            path,
            "it is a pipe, socket or device, not a file or directory",
        ));
    }
    among(path, &file_names(path)?)
}

fn single_file(path: &Path) -> Result<Found> {
    match (path.parent(), path.file_name().and_then(|name| name.to_str())) {
        (Some(directory), Some(name)) => Ok(Found::single(directory.to_owned(), name.to_owned())),
        _ => Err(Error::NotFound { path: path.to_owned() }),
    }
}

/// Finds the shards of a directory that holds these names.
fn among(path: &Path, names: &BTreeSet<String>) -> Result<Found> {
    let has = |name: &str| names.contains(name);
    // transformers prefers the single file over an index.
    if has("model.safetensors") {
        return Ok(Found::single(path.to_owned(), "model.safetensors".to_owned()));
    }
    let indices: Vec<&String> =
        names.iter().filter(|name| name.ends_with(".safetensors.index.json")).collect();
    match indices.as_slice() {
        [only] => return from_index(path, only),
        [_, ..] if has("model.safetensors.index.json") => {
            return from_index(path, "model.safetensors.index.json");
        }
        [_, ..] => {
            return Err(Error::NoWeights {
                path: path.to_owned(),
                problem:
                    "it has several indices and none is model.safetensors.index.json; keep one"
                        .to_owned(),
            });
        }
        [] => {}
    }
    let weights: Vec<&String> =
        names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    match weights.as_slice() {
        [only] => Ok(Found::single(path.to_owned(), (*only).clone())),
        [] => Err(Error::NoWeights { path: path.to_owned(), problem: advice(path, names) }),
        [first, ..] => Err(Error::NoWeights {
            path: path.to_owned(),
            problem: format!(
                "it has {} such files ({}, …) but no model.safetensors.index.json that says how they belong together",
                weights.len(),
                printable(first)
            ),
        }),
    }
}

fn from_index(directory: &Path, name: &str) -> Result<Found> {
    let path = directory.join(name);
    let bytes = regular::read(&path, LARGEST_INDEX)?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|e| Error::index(&path, format!("it is not an index in JSON ({e})")))?;
    let mut files = index.weight_map.files().to_vec();
    files.sort_unstable();
    if files.is_empty() {
        return Err(Error::index(&path, "its weight_map is empty"));
    }
    for file in &files {
        check_file_name(&path, file)?;
        // Of what lies elsewhere the header's request will tell.
        if !remote::is_url(directory) && !directory.join(file).exists() {
            return Err(Error::index(
                &path,
                format!(
                    "it names the shard {}, which is missing; download the checkpoint again",
                    printable(file)
                ),
            ));
        }
    }
    Ok(Found {
        directory: directory.to_owned(),
        index: Some(name.to_owned()),
        files,
        weight_map: Some(index.weight_map),
    })
}

/// Refuses anything but the plain name of a file beside `owner`: an index or a plan may come from anyone.
pub(crate) fn check_file_name(owner: &Path, file: &str) -> Result<()> {
    let mut components = Path::new(file).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) if name.to_str() == Some(file) => Ok(()),
        _ => Err(Error::index(
            owner,
            format!(
                "it names the file `{}`, which lies outside its directory; only plain file names are allowed",
                printable(file)
            ),
        )),
    }
}

fn file_names(directory: &Path) -> Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(directory).map_err(|e| Error::read(directory, e))?;
    let mut names = BTreeSet::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::read(directory, e))?;
        match entry.file_name().into_string() {
            // Hidden files are partial outputs and caches.
            Ok(name) if name.starts_with('.') => {}
            Ok(name) => drop(names.insert(name)),
            // Neither an index nor a plan could name it.
            Err(name) if Path::new(&name).extension().is_some_and(|e| e == "safetensors") => {
                return Err(Error::unusable(
                    &directory.join(name),
                    "its name is not UTF-8; rename it",
                ));
            }
            Err(_) => {}
        }
    }
    Ok(names)
}
