//! Names of an output's files, checked: what a journal or report says never leads out of the directory.

use serde::{Deserialize, Serialize};
use std::path::{Component, Path};

/// Name of a job directory that lies inside its output.
pub(super) const INSIDE: &str = ".safemerge";

/// Name of the output in the making, in a job directory.
pub(super) const MAKING: &str = "output";

/// Name of the list of moves by which such a job publishes its output.
pub(super) const MOVES: &str = "publish.json";

/// A file of an output: a relative path of plain components, joined by single slashes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct FileName(String);

impl FileName {
    /// The name, if it is one.
    pub(super) fn new(name: &str) -> Option<Self> {
        let parts: Option<Vec<&str>> = Path::new(name)
            .components()
            .map(|part| match part {
                Component::Normal(part) => part.to_str(),
                _ => None,
            })
            .collect();
        let parts = parts.filter(|parts| parts.first().is_some_and(|&first| first != INSIDE))?;
        (parts.join("/") == name && !name.contains('\0')).then(|| Self(name.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether loaders look for this file first: an output without it is taken for no model.
    pub(super) fn is_mark(&self) -> bool {
        self.0 == "config.json"
            || self.0 == "adapter_config.json"
            || self.0.ends_with(".index.json")
    }

    /// Name of the hidden file in which this one is made. It lies in the output's own directory, where stale ones are swept.
    pub(super) fn partial(&self) -> String {
        format!(".{}.partial", self.0.replace('/', "%"))
    }
}

impl TryFrom<String> for FileName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::new(&name).ok_or_else(|| format!("`{}` is no file of an output", name.escape_debug()))
    }
}

impl From<FileName> for String {
    fn from(name: FileName) -> Self {
        name.0
    }
}

impl std::fmt::Display for FileName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}
