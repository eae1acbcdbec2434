//! Where a job directory lies: beside its output, or inside it where the output cannot be renamed.

use super::disk;
use super::fault::Point;
use super::name::{INSIDE, MOVES};
use super::record::RECORD;
use crate::{Error, Result};
use std::ffi::OsString;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Most links that lead to one output.
const MOST_LINKS: usize = 40;

/// Where the job directory may lie.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Placement {
    /// Beside the output if that is possible, else inside.
    #[default]
    Auto,
    /// Inside the output, as if it were a volume of its own.
    Inside,
}

/// The places of a job.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The output: absolute, links resolved.
    pub output: PathBuf,
    /// The directory that holds it.
    pub parent: PathBuf,
    /// The job directory.
    pub job: PathBuf,
    /// Whether that lies in the output.
    pub inside: bool,
}

impl Place {
    /// Finds the places of an output; changes nothing.
    ///
    /// # Errors
    /// [`Error::Output`] if the path can never be one.
    pub(super) fn find(output: &Path, placement: Placement) -> Result<Self> {
        let path = resolve(output)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::output(output, "is a root directory; name a directory in it"));
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".safemerge");
        let beside = Self {
            parent: parent.to_owned(),
            job: parent.join(hidden),
            inside: false,
            output: path.clone(),
        };
        let hidden = path.join(INSIDE);
        let begun = [RECORD, MOVES].iter().any(|name| hidden.join(name).is_file());
        let inside = placement == Placement::Inside || begun || is_mount_point(&path);
        Ok(if inside { beside.moved_inside() } else { beside })
    }

    fn moved_inside(self) -> Self {
        Self { job: self.output.join(INSIDE), inside: true, ..self }
    }

    /// Makes the job directory and all above it; goes inside if the parent does not let it. Returns the place, and the
    /// directories that were made on the way, outermost first, the job directory left out.
    ///
    /// # Errors
    /// [`Error::Output`], [`Error::DiskFull`], [`Error::Write`].
    pub(super) fn make(self) -> Result<(Self, Vec<PathBuf>)> {
        let mut made = Vec::new();
        match self.try_make(&mut made) {
            Ok(()) => Ok((self, made)),
            Err(error) => {
                let refused = matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                );
                if refused && !self.inside && self.output.is_dir() {
                    return self.moved_inside().make();
                }
                remove_empty(&made);
                Err(disk::failure(&self.job, 0, error))
            }
        }
    }

    fn try_make(&self, made: &mut Vec<PathBuf>) -> io::Result<()> {
        let missing: Vec<&Path> = self
            .job
            .ancestors()
            .skip(1)
            .take_while(|path| matches!(path.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound))
            .collect();
        for path in missing.into_iter().rev() {
            if disk::make_directory(Point::ParentMake, path)? {
                made.push(path.to_owned());
                if let Some(parent) = path.parent() {
                    disk::sync_names(Point::ParentSync, parent)?;
                }
            }
        }
        disk::make_directory(Point::JobMake, &self.job).map(drop)
    }
}

/// Removes directories that were made for nothing, as far as they are empty.
pub(super) fn remove_empty(made: &[PathBuf]) {
    for path in made.iter().rev() {
        drop(std::fs::remove_dir(path));
    }
}

/// Whether a directory is where a file system or a bind mount begins.
fn is_mount_point(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
        if let Ok(found) = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())
            && found.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT)
        {
            return found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        }
    }
    let device = |path: &Path| {
        let metadata = std::fs::symlink_metadata(path).ok()?;
        Some(disk::FileId::of(&metadata).device)
    };
    match (device(path), path.parent().and_then(device)) {
        (Some(own), Some(above)) => own != above,
        _ => false,
    }
}

/// The path with links resolved, whether or not it leads to anything. What is missing would be a plain directory, so that `..`
/// behind it leads back.
fn resolve(path: &Path) -> Result<PathBuf> {
    let mut waiting: Vec<PathBuf> = vec![
        std::path::absolute(path)
            .map_err(|_| Error::output(path, "is no path; name a directory"))?,
    ];
    let mut resolved = PathBuf::from("/");
    let mut links = 0;
    while let Some(next) = waiting.pop() {
        let mut parts = next.components();
        let Some(part) = parts.next() else { continue };
        let rest = parts.as_path();
        if !rest.as_os_str().is_empty() {
            waiting.push(rest.to_owned());
        }
        match part {
            Component::RootDir => resolved = PathBuf::from("/"),
            Component::ParentDir => drop(resolved.pop()),
            Component::Normal(name) => {
                let joined = resolved.join(name);
                match std::fs::read_link(&joined) {
                    Ok(target) => {
                        links += 1;
                        if links > MOST_LINKS {
                            return Err(Error::output(
                                path,
                                "is a link to itself; name a directory",
                            ));
                        }
                        waiting.push(target);
                    }
                    Err(_) => resolved = joined,
                }
            }
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(resolved)
}
