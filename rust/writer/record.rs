//! job.json: what a job directory is for.

use super::disk::{self, FileId, Steps};
use super::fault::Point;
use super::name::FileName;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Its name.
pub(super) const RECORD: &str = "job.json";
/// The name under which it is made.
pub(super) const RECORD_PARTIAL: &str = ".job.json.partial";
/// Identities are digests or small documents.
const LARGEST: u64 = 16 << 20;

/// What to do with a finished output that is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overwrite {
    /// Refuse.
    #[default]
    No,
    /// Keep it until the new one is complete, then exchange them.
    Exchange,
    /// Remove it before the first new shard: there is no room for both.
    InPlace,
}

impl Overwrite {
    /// The mode of this name.
    ///
    /// # Errors
    /// [`Error::Option`] if there is none.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "no" => Ok(Self::No),
            "exchange" => Ok(Self::Exchange),
            "in-place" => Ok(Self::InPlace),
            _ => Err(Error::Option(format!(
                "there is no way `{name}` to overwrite; choose no, exchange or in-place"
            ))),
        }
    }
}

/// The content of job.json.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Version of the program that began the job.
    pub program: String,
    /// What tells this job from another; the caller's.
    pub identity: String,
    pub overwrite: Overwrite,
    /// The directory of the output in the making.
    pub making: FileId,
    /// The finished output that the job replaces.
    pub replaced: Option<FileId>,
    /// Digests of shards that were committed under another identity: part of this job's output only once they are asked for.
    pub inherited: BTreeMap<FileName, String>,
}

impl Record {
    /// The record of a job directory; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Output`] if it cannot be understood.
    pub(super) fn read(job: &Path) -> Result<Option<Self>> {
        let path = job.join(RECORD);
        let Some(bytes) = disk::read_capped(&path, LARGEST)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::output(
                job,
                format!("holds a job.json that is not safemerge-fast's ({error}); move it away"),
            )
        })
    }

    pub(super) fn write(&self, job: &Path) -> Result<()> {
        let path = job.join(RECORD);
        let bytes = serde_json::to_vec(self).map_err(|error| Error::write(&path, error.into()))?;
        let steps = Steps {
            create: Point::RecordCreate,
            write: Point::RecordWrite,
            sync: Point::RecordSync,
            rename: Point::RecordRename,
            directory: Point::RecordDirectorySync,
        };
        let needed = bytes.len() as u64;
        disk::place(&steps, &job.join(RECORD_PARTIAL), &path, needed, |file| {
            disk::write_all(steps.write, file, &bytes)
                .map_err(|error| disk::failure(&path, needed, error))
        })
    }
}
