//! The inputs of a job, told from its output by device and inode: a path is only one of a file's names.

use super::disk::{self, FileId};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Files and directories that must stay as they are.
#[derive(Debug)]
pub(super) struct Inputs {
    paths: Vec<PathBuf>,
}

impl Inputs {
    pub(super) fn new(paths: &[PathBuf]) -> Self {
        Self { paths: paths.to_vec() }
    }

    /// Refuses a directory, there or not, that is one of the inputs, lies in one or holds one. `named` is what the error is
    /// about. Links in `directory` are resolved.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub(super) fn check_apart(&self, directory: &Path, named: &Path) -> Result<()> {
        let own = identity(directory);
        let above: Vec<(&Path, FileId)> = directory
            .ancestors()
            .skip(1)
            .filter_map(|path| Some((path, identity(path)?)))
            .collect();
        for input in &self.paths {
            let resolved = input.canonicalize();
            let resolved = resolved.or_else(|_| std::path::absolute(input));
            let resolved = resolved.unwrap_or_else(|_| input.clone());
            let other = identity(&resolved);
            let holds = |path: &Path| own.is_some() && identity(path) == own;
            let relation = if resolved == directory || (own.is_some() && own == other) {
                "is"
            } else if directory.starts_with(&resolved)
                || above.iter().any(|&(_, id)| Some(id) == other)
            {
                "lies inside"
            } else if resolved.starts_with(directory) || resolved.ancestors().skip(1).any(holds) {
                "contains"
            } else {
                continue;
            };
            return Err(Error::output(
                named,
                format!("{relation} the input {}; choose a directory of its own", input.display()),
            ));
        }
        Ok(())
    }

    /// Refuses to touch a directory that holds an input's file, by a link or by its other name.
    ///
    /// # Errors
    /// [`Error::Output`] about `named`; [`Error::Read`].
    pub(super) fn check_files(&self, directory: &Path, named: &Path) -> Result<()> {
        if disk::look(directory)?.is_none() {
            return Ok(());
        }
        let held = disk::walk(directory)?;
        if held.is_empty() {
            return Ok(());
        }
        let inputs = self.files();
        for (name, _) in held {
            let path = directory.join(&name);
            // The file itself counts, and what it links to.
            let ids = [identity(&path), FileId::at(&path)?];
            if let Some(input) = ids.iter().flatten().find_map(|id| inputs.get(id)) {
                return Err(Error::output(
                    named,
                    format!(
                        "holds {}, which is the input {} by another name; choose a directory of its own",
                        name.display(),
                        input.display()
                    ),
                ));
            }
        }
        Ok(())
    }

    /// All that the inputs consist of.
    fn files(&self) -> BTreeMap<FileId, PathBuf> {
        let mut found = BTreeMap::new();
        for path in &self.paths {
            // What cannot be read cannot be an input.
            let inner = disk::walk(path).unwrap_or_default();
            let all = inner.into_iter().map(|(name, _)| path.join(name)).chain([path.clone()]);
            for path in all {
                let ids = [identity(&path), FileId::at(&path).ok().flatten()];
                found.extend(ids.into_iter().flatten().map(|id| (id, path.clone())));
            }
        }
        found
    }
}

/// The identity of what a path leads to, links followed.
fn identity(path: &Path) -> Option<FileId> {
    std::fs::metadata(path).ok().as_ref().map(FileId::of)
}
