//! The checkpoints that a plan reads, and whether they are those that it was made for.

use super::schema;
use crate::checkpoint::{Checkpoint, ReadBackend, is_url, normal_url};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

/// A checkpoint that a plan reads, and which of its shards it may.
#[derive(Debug)]
pub(super) struct Source {
    /// What the plan calls it.
    pub name: Arc<str>,
    pub checkpoint: Arc<Checkpoint>,
    /// By the shard's number in the checkpoint.
    pub listed: Vec<bool>,
}

/// Checkpoints that are open already, by the name of the source.
pub type GivenSources = BTreeMap<String, Arc<Checkpoint>>;

/// Sources by their name.
pub(super) type Sources = BTreeMap<String, Source>;

/// Opens the files that a plan lists, or takes the checkpoint that is open, and compares each file with the identity it
/// states. Of files that are opened the modification time may differ (copies and clones change it); the size and the
/// header may not. A checkpoint that is open was looked at before: its files must still be what they were then. A relative
/// path is one in `directory`.
pub(super) fn open_source(
    name: &str,
    source: &schema::Source,
    given: Option<&Arc<Checkpoint>>,
    backend: ReadBackend,
    directory: Option<&Path>,
) -> Result<Source> {
    let checkpoint = match (given, directory) {
        (Some(checkpoint), _) => Arc::clone(checkpoint),
        (None, _) if is_url(&source.path) => {
            let url = normal_url(&source.path)?;
            Arc::new(Checkpoint::open_files(&url, source.files.keys(), backend)?)
        }
        (None, None) if source.path.is_relative() => {
            return Err(Error::Plan(format!(
                "its source `{name}` lies at {}, beside a plan that is in no directory",
                crate::error::printable(&source.path)
            )));
        }
        (None, directory) => {
            let path = directory.map_or_else(|| source.path.clone(), |it| it.join(&source.path));
            Arc::new(Checkpoint::open_files(&path, source.files.keys(), backend)?)
        }
    };
    let mut listed = vec![false; checkpoint.shards().len()];
    let mut found = 0;
    for (shard, listed) in checkpoint.shards().iter().zip(&mut listed) {
        let Some(expected) = source.files.get(&shard.name) else { continue };
        shard.header.identity.check_stated(&shard.path, expected)?;
        if given.is_some() {
            if shard.header.identity.mtime_ns != expected.mtime_ns {
                let what = "it was modified";
                return Err(Error::InputChanged { path: shard.path.clone(), what });
            }
            shard.check_unchanged()?;
        }
        *listed = true;
        found += 1;
    }
    if found < source.files.len() {
        let known: HashSet<&String> = checkpoint.shards().iter().map(|shard| &shard.name).collect();
        let missing = source.files.keys().find(|file| !known.contains(file));
        return Err(Error::Plan(format!(
            "it reads {} of {}, which is no file of that checkpoint",
            missing.map_or("", String::as_str),
            crate::error::printable(checkpoint.path())
        )));
    }
    Ok(Source { name: name.into(), checkpoint, listed })
}
