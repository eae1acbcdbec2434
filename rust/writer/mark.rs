//! What stands under an output's name, and whether this program wrote it: its report lists its files.

use super::disk::{self, FileId};
use super::name::{FileName, INSIDE};
use crate::Result;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read};
use std::path::Path;

/// Name of the report in an output.
pub const REPORT: &str = "safemerge_report.json";
/// Reports of the largest models have 50 MB.
const LARGEST: u64 = 256 << 20;

/// A finished output of this program.
#[derive(Debug)]
pub(super) struct Mark {
    /// Of the job that made it.
    pub identity: String,
    /// Bytes of its files, the report left out.
    pub files: BTreeMap<FileName, u64>,
    /// The directory.
    pub directory: FileId,
}

/// What stands under an output's name.
#[derive(Debug)]
pub(super) enum Standing {
    Absent,
    /// A directory that holds nothing.
    Empty,
    /// Something that is no directory.
    File,
    /// A finished output, and nothing besides.
    Ours(Mark),
    /// A directory with something that this program did not write; what, and what to do.
    Foreign(String),
}

#[derive(Deserialize)]
struct Report {
    job: Job,
    files: Vec<Listed>,
}

#[derive(Deserialize)]
struct Job {
    identity: String,
}

#[derive(Deserialize)]
struct Listed {
    name: FileName,
    bytes: u64,
}

impl Mark {
    /// Names of the output's files, the report among them.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(FileName::as_str).filter(|&name| name != REPORT).chain([REPORT])
    }

    /// A listed file that is missing or has another size.
    pub(super) fn damage(&self, output: &Path) -> Option<&FileName> {
        let whole = |name: &FileName, bytes: u64| {
            let metadata = std::fs::metadata(output.join(name.as_str()));
            metadata.is_ok_and(|found| found.is_file() && found.len() == bytes)
        };
        self.files.iter().find(|&(name, &bytes)| !whole(name, bytes)).map(|(name, _)| name)
    }
}

/// Looks at an output. `inside` says that the job directory lies in it, and does not count.
///
/// # Errors
/// [`Error::Read`] if that cannot be told.
pub(super) fn look(output: &Path, inside: bool) -> Result<Standing> {
    let Some(metadata) = disk::look(output)? else { return Ok(Standing::Absent) };
    if !metadata.is_dir() {
        return Ok(Standing::File);
    }
    let mut entries = disk::walk(output)?;
    if inside {
        // A volume of its own has a place for lost files.
        entries.retain(|(name, _)| !name.starts_with(INSIDE) && !name.starts_with("lost+found"));
    }
    let Some((first, _)) = entries.first() else { return Ok(Standing::Empty) };
    let foreign = |name: &Path| {
        Standing::Foreign(format!(
            "holds {}, which safemerge-fast did not write; move it away or choose another directory",
            name.display()
        ))
    };
    let path = output.join(REPORT);
    if disk::look(&path)?.is_none() {
        return Ok(foreign(first));
    }
    let report = match read(&path) {
        Ok(report) => report,
        Err(problem) => {
            return Ok(Standing::Foreign(format!(
                "holds a {REPORT} that does not list the output's files ({problem}); move the directory away or \
                 choose another"
            )));
        }
    };
    let files: BTreeMap<FileName, u64> =
        report.files.into_iter().map(|listed| (listed.name, listed.bytes)).collect();
    let directories: BTreeSet<&Path> =
        files.keys().flat_map(|name| Path::new(name.as_str()).ancestors().skip(1)).collect();
    let listed = |name: &Path, directory: bool| match name.to_str().and_then(FileName::new) {
        Some(_) if directory => directories.contains(name),
        Some(file) => file.as_str() == REPORT || files.contains_key(&file),
        None => false,
    };
    if let Some((name, _)) = entries.iter().find(|(name, directory)| !listed(name, *directory)) {
        return Ok(foreign(name));
    }
    Ok(Standing::Ours(Mark {
        identity: report.job.identity,
        files,
        directory: FileId::of(&metadata),
    }))
}

/// Reads the two parts of a report that matter here, passing over the rest.
fn read(path: &Path) -> std::result::Result<Report, String> {
    let (file, size) = disk::open_regular(path).map_err(|error| error.to_string())?;
    if size > LARGEST {
        return Err(format!("it has {size} bytes"));
    }
    serde_json::from_reader(BufReader::new(file.take(LARGEST))).map_err(|error| error.to_string())
}
