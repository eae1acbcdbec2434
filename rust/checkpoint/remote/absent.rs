//! What stands in for the client where it was left out: everything is refused.

use super::location::Location;
use super::seen::Seen;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

fn refused<T>(url: &Path) -> Result<T> {
    let location = Location::parse(url)?;
    let lists = if location.scheme.lists() { "object stores" } else { "servers" };
    let name = if location.name().is_empty() { &location.host } else { location.name() };
    Err(Error::unusable(
        &location.url(),
        format!(
            "this build reads nothing from {lists}; build it with the feature `remote`, or copy {name} to a directory"
        ),
    ))
}

/// Never made.
#[derive(Debug)]
pub(in crate::checkpoint) enum RemoteFile {}

impl RemoteFile {
    pub(in crate::checkpoint) fn open(url: &Path, _: u64, _: &str) -> Result<Self> {
        refused(url)
    }

    pub(in crate::checkpoint) fn read(&self, _: Range<usize>, _: &mut [u8]) -> Result<()> {
        match *self {}
    }

    pub(in crate::checkpoint) fn prefetch(&self, _: &Range<usize>) {
        match *self {}
    }
}

/// There are no blocks.
pub(crate) fn bound(_: Option<usize>) -> usize {
    0
}

pub(in crate::checkpoint) fn read_small(url: &Path, _: u64) -> Result<Vec<u8>> {
    refused(url)
}

pub(in crate::checkpoint) fn look_again(url: &Path) -> Result<Seen> {
    refused(url)
}

pub(in crate::checkpoint) fn beginning(url: &Path, _: u64) -> Result<Option<(Seen, Vec<u8>)>> {
    refused(url)
}

pub(in crate::checkpoint) fn listed(url: &Path) -> Result<Vec<(String, u64)>> {
    refused(url)
}

pub(in crate::checkpoint) fn fetch_small(
    url: &Path,
    _: &[String],
    _: u64,
) -> Result<Vec<Option<Vec<u8>>>> {
    refused(url)
}

pub(in crate::checkpoint) fn find(url: &Path) -> Result<Option<BTreeSet<String>>> {
    refused(url)
}
