//! Addresses of checkpoints that lie elsewhere: which text is one, and that it holds no secret.

use crate::error::printable;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Kinds of stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Scheme {
    /// Amazon S3, and what speaks like it.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
    /// A server without encryption.
    Http,
    /// A server.
    Https,
}

impl Scheme {
    fn named(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "s3" => Self::S3,
            "gs" => Self::Gs,
            "az" => Self::Az,
            "http" => Self::Http,
            "https" => Self::Https,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// Whether the names of a directory can be asked for.
    pub(crate) fn lists(self) -> bool {
        !matches!(self, Self::Http | Self::Https)
    }
}

/// The address of an object, or of what stands for a directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Location {
    pub scheme: Scheme,
    /// Bucket, container or server.
    pub host: String,
    /// Without slashes at its ends.
    pub key: String,
}

/// Whether a path is an address, of whatever kind: letters, then `://`.
#[must_use]
pub fn is_url(path: &Path) -> bool {
    path.to_str().and_then(|text| text.split_once("://")).is_some_and(|(scheme, _)| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    })
}

impl Location {
    /// Reads an address.
    ///
    /// # Errors
    /// [`Error::Unusable`], which quotes no secret of it, if its scheme is unknown, it names no bucket or server, holds a
    /// user or a query, or has parts that stores and servers understand in different ways.
    pub(crate) fn parse(path: &Path) -> Result<Self> {
        let text = path.to_str().unwrap_or_default();
        let refused = |problem: &str| Err(Error::unusable(&without_secrets(text), problem));
        let Some((scheme, rest)) = text.split_once("://") else {
            return refused("it is no address of an object");
        };
        let Some(scheme) = Scheme::named(scheme) else {
            return refused(
                "models are read from s3://, gs://, az://, http:// and https://; give one of these, or copy it to a \
                 directory",
            );
        };
        let (host, key) = rest.split_once('/').unwrap_or((rest, ""));
        if host.contains('@') {
            return refused(
                "an address may hold no user or password, which would be written into plans and reports; leave them \
                 out and give credentials in the environment",
            );
        }
        if rest.contains(['?', '#']) {
            return refused(
                "an address may hold no query or fragment, as signed ones do: it would be written into plans and \
                 reports; leave it out and give credentials in the environment",
            );
        }
        if host.is_empty() {
            return refused("it names no bucket or server");
        }
        if !host.chars().all(|c| c.is_ascii_alphanumeric() || "-._:[]".contains(c)) {
            return refused("its bucket or server has a name that none can have");
        }
        let key = key.trim_end_matches('/');
        let odd = |part: &str| matches!(part, "" | "." | "..");
        if text.contains(char::is_control) || (!key.is_empty() && key.split('/').any(odd)) {
            return refused("its path has an empty part, `.`, `..` or a control character");
        }
        Ok(Self { scheme, host: host.to_owned(), key: key.to_owned() })
    }

    /// What it is written as.
    pub(crate) fn url(&self) -> PathBuf {
        let slash = if self.key.is_empty() { "" } else { "/" };
        format!("{}{slash}{}", self.root(), self.key).into()
    }

    /// The address of the bucket or server alone.
    pub(crate) fn root(&self) -> String {
        format!("{}://{}", self.scheme.name(), self.host)
    }

    /// The last part of it.
    pub(crate) fn name(&self) -> &str {
        self.key.rsplit('/').next().unwrap_or_default()
    }
}

/// The text of an address as far as it may be shown.
fn without_secrets(text: &str) -> PathBuf {
    let shown = text.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = shown.split_once("://").unwrap_or(("", shown));
    // A password may hold a slash that was not written as it should be: what stands before the last @ is not shown.
    let rest = rest.rsplit_once('@').map_or(rest, |(_, after)| after);
    printable(&format!("{scheme}://{rest}")).into()
}
