//! Checkpoints in object stores and on servers, read by ranges. Without the feature `remote` every address is refused.

mod location;
mod seen;

#[cfg(feature = "remote")]
mod blocks;
#[cfg(feature = "remote")]
mod client;
#[cfg(feature = "remote")]
mod failure;
#[cfg(feature = "remote")]
mod listing;
#[cfg(feature = "remote")]
mod object;

#[cfg(not(feature = "remote"))]
mod absent;
#[cfg(not(feature = "remote"))]
pub(crate) use absent::bound;
#[cfg(not(feature = "remote"))]
pub(super) use absent::{RemoteFile, beginning, fetch_small, find, listed, look_again, read_small};

#[cfg(feature = "remote")]
pub(crate) use blocks::bound;
#[cfg(feature = "remote")]
pub use client::mount_store;
#[cfg(feature = "remote")]
pub(super) use client::read_small;
#[cfg(feature = "remote")]
pub(super) use listing::{beginning, fetch_small, find, listed, look_again};
#[cfg(feature = "remote")]
pub(super) use object::RemoteFile;

use crate::Result;
use location::Location;
pub use location::is_url;
pub(super) use seen::Seen;
use std::path::{Path, PathBuf};

/// An address as plans and reports have it.
///
/// # Errors
/// [`crate::Error::Unusable`] if it is not one that models are read from, or holds a user, a password or a query.
pub fn normal_url(url: &Path) -> Result<PathBuf> {
    Ok(Location::parse(url)?.url())
}
