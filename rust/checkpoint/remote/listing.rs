//! What lies at an address: an object, or objects whose names begin alike.

use super::client::{Target, fetch_all, list};
use super::failure::Failure;
use super::location::{Location, is_url};
use super::seen::Seen;
use crate::{Error, Result};
use bytes::Bytes;
use object_store::ObjectMeta;
use std::collections::BTreeSet;
use std::path::Path;

/// Objects of one directory at most.
const MOST_OBJECTS: usize = 100_000;

/// What the store says of an object; one without an ETag is refused, for nobody could say whether it has changed.
fn seen(url: &Path, meta: ObjectMeta) -> Result<Seen> {
    let Some(etag) = meta.e_tag.filter(|etag| !etag.is_empty()) else {
        return Err(Error::unusable(
            url,
            "its server gives no ETag, so that nobody could notice a change; download the files",
        ));
    };
    let stored_ns = meta.last_modified.timestamp_nanos_opt().unwrap_or_default();
    Ok(Seen { size: meta.size, stored_ns, etag, version: meta.version })
}

fn target(url: &Path) -> Result<Target> {
    Target::of(Location::parse(url)?)
}

/// What the store says of the object at an address that was read before.
pub(in crate::checkpoint) fn look_again(url: &Path) -> Result<Seen> {
    seen(url, target(url)?.head(true)?)
}

/// The first bytes of an object, at most so many; none if it is empty.
pub(in crate::checkpoint) fn beginning(url: &Path, most: u64) -> Result<Option<(Seen, Bytes)>> {
    let Some((meta, bytes)) = target(url)?.beginning(most)? else { return Ok(None) };
    Ok(Some((seen(url, meta)?, bytes)))
}

/// Names and sizes of the objects of a directory. A plain server is asked for the usual weights, and names nothing else.
pub(in crate::checkpoint) fn listed(url: &Path) -> Result<Vec<(String, u64)>> {
    let target = target(url)?;
    if target.location.scheme.lists() {
        let names = list(&target, MOST_OBJECTS)?;
        if names.is_empty() {
            let problem =
                "the store has no object there (nothing is listed below it); correct the address";
            return Err(Failure::Missing(problem.to_owned()).error(url));
        }
        return Ok(names);
    }
    let mut names = Vec::new();
    for name in ["model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"] {
        match Target::of(Location::parse(&url.join(name))?)?.head(false) {
            Ok(meta) => names.push((name.to_owned(), meta.size)),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(names)
}

/// Some files of a directory, in the order of their names; none in place of what is not there.
pub(in crate::checkpoint) fn fetch_small(
    url: &Path,
    names: &[String],
    most: u64,
) -> Result<Vec<Option<Bytes>>> {
    let targets: Result<Vec<Target>> = names.iter().map(|name| target(&url.join(name))).collect();
    fetch_all(&targets?, most)
}

/// Names that lie in a directory, as far as they decide which its weights are; none if the address is that of a file.
pub(in crate::checkpoint) fn find(url: &Path) -> Result<Option<BTreeSet<String>>> {
    debug_assert!(is_url(url));
    let location = Location::parse(url)?;
    if location.name().ends_with(".safetensors") {
        return Ok(None);
    }
    let names = listed(url)?.into_iter().map(|(name, _)| name);
    Ok(Some(names.filter(|name| !name.starts_with('.') && !name.contains('/')).collect()))
}
