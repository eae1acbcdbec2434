//! What tells one input file from another, and whether it is still the file that was opened.

use super::remote::{self, Seen};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What was seen of a shard when its header was read. Serialised as [`StatedIdentity`] has it.
///
/// Of an object the time is that at which it was stored; it has an ETag, and neither inode nor ctime.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct FileIdentity {
    /// Bytes.
    pub size: u64,
    /// Modification time in nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// Time of the last change of the inode (content, owner, links), in nanoseconds since the epoch. Nobody can set it
    /// back, as the modification time can be.
    #[serde(skip_serializing_if = "is_none")]
    pub ctime_ns: i64,
    /// Number of the inode.
    #[serde(skip_serializing_if = "is_none")]
    pub inode: u64,
    /// Number of the device that the inode lies on; other after a reboot, so that nothing on disk says it.
    #[serde(skip)]
    pub device: u64,
    /// BLAKE3 of the length field and the header, hexadecimal.
    pub header_digest: String,
    /// What a store calls this content of an object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// What a store with versions calls this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

fn is_none<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What a plan states of a shard that it reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatedIdentity {
    /// Bytes.
    pub size: u64,
    /// Modification time in nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// As [`FileIdentity::ctime_ns`]; informative.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctime_ns: Option<i64>,
    /// As [`FileIdentity::inode`]; informative.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inode: Option<u64>,
    /// BLAKE3 of the length field and the header, hexadecimal.
    pub header_digest: String,
    /// As [`FileIdentity::etag`]; an object must still have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// As [`FileIdentity::version`]; informative.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl FileIdentity {
    pub(super) fn new(metadata: &Metadata, header_digest: String) -> Self {
        Self {
            size: metadata.len(),
            mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
            device: metadata.dev(),
            header_digest,
            etag: None,
            version: None,
        }
    }

    pub(super) fn of_object(seen: Seen, header_digest: String) -> Self {
        Self {
            size: seen.size,
            mtime_ns: seen.stored_ns,
            ctime_ns: 0,
            inode: 0,
            device: 0,
            header_digest,
            etag: Some(seen.etag),
            version: seen.version,
        }
    }

    /// Checks that a file or an object still looks as it did.
    ///
    /// # Errors
    /// [`Error::InputChanged`] if it does not, [`Error::Read`] and [`Error::Remote`] if it is gone.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        if self.etag.is_none() {
            let metadata = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
            return self.check_metadata(path, &metadata);
        }
        let seen = remote::look_again(path)?;
        let what = if Some(&seen.etag) != self.etag.as_ref() {
            "its ETag differs"
        } else if seen.size != self.size {
            "its size differs"
        } else {
            return Ok(());
        };
        Err(Error::InputChanged { path: path.to_owned(), what })
    }

    /// Checks that a file still looks as it did.
    pub(super) fn check_metadata(&self, path: &Path, metadata: &Metadata) -> Result<()> {
        let found = Self::new(metadata, String::new());
        let what = if found.size != self.size {
            "its size differs"
        } else if found.inode != self.inode {
            "another file has taken its place"
        } else if found.mtime_ns != self.mtime_ns {
            "it was modified"
        } else if found.ctime_ns != self.ctime_ns {
            "its time of change (ctime) differs"
        } else {
            return Ok(());
        };
        Err(Error::InputChanged { path: path.to_owned(), what })
    }

    /// Checks that this is the file that a plan was made for. Times and inode may differ (copies and clones change
    /// them); the size and the header may not.
    ///
    /// # Errors
    /// [`Error::InputChanged`].
    pub fn check_stated(&self, path: &Path, stated: &StatedIdentity) -> Result<()> {
        let what = if self.size != stated.size {
            "its size differs"
        } else if self.header_digest != stated.header_digest {
            "its header differs"
        } else if self.etag != stated.etag && self.etag.is_some() && stated.etag.is_some() {
            "its ETag differs"
        } else {
            return Ok(());
        };
        Err(Error::InputChanged { path: path.to_owned(), what })
    }
}

/// Nanoseconds since 1970 leave 64 bits in the year 2262; a clock beyond that still gives a stable identity.
fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.wrapping_mul(1_000_000_000).wrapping_add(rest)
}
