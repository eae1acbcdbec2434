//! Which files make up a checkpoint, by the rules that transformers follows.

use super::regular;
use super::weight_map::{Index, WeightMap};
use crate::{Error, Result};
use std::collections::BTreeSet;
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
    if !path.exists() {
        return Err(Error::NotFound { path: path.to_owned() });
    }
    if path.is_file() {
        return match (path.parent(), path.file_name().and_then(|name| name.to_str())) {
            (Some(directory), Some(name)) => {
                Ok(Found::single(directory.to_owned(), name.to_owned()))
            }
            _ => Err(Error::NotFound { path: path.to_owned() }),
        };
    }
    let names = file_names(path)?;
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
        [] => {
            let pickled = names.iter().find(|name| {
                name.ends_with(".bin") || name.ends_with(".pth") || name.ends_with(".pt")
            });
            let problem = pickled.map_or_else(
                || "give the directory that holds model.safetensors or its shards".to_owned(),
                |name| format!("{name} is a pickle, which is not opened; load the model with transformers and save_pretrained it"),
            );
            Err(Error::NoWeights { path: path.to_owned(), problem })
        }
        [first, ..] => Err(Error::NoWeights {
            path: path.to_owned(),
            problem: format!(
                "it has {} such files ({first}, …) but no model.safetensors.index.json that says how they belong together",
                weights.len()
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
        if !directory.join(file).is_file() {
            return Err(Error::index(
                &path,
                format!(
                    "it names the shard {file}, which is missing; download the checkpoint again"
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
                "it names the file `{file}`, which lies outside its directory; only plain file names are allowed"
            ),
        )),
    }
}

fn file_names(directory: &Path) -> Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(directory).map_err(|e| Error::read(directory, e))?;
    let mut names = BTreeSet::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::read(directory, e))?;
        // Hidden files are partial outputs and caches; a name that is not UTF-8 cannot stand in an index.
        if let Ok(name) = entry.file_name().into_string()
            && !name.starts_with('.')
        {
            names.insert(name);
        }
    }
    Ok(names)
}
