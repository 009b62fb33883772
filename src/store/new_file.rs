//! New files that get their name when they are complete.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::linkat;

use super::file::Lasting;
use super::{FileStore, Store};
use crate::error::{At, Doing, Error, Problem, Result};

/// A new file. Until it is published there is nothing of its name, and nothing stays if that never happens; where the file
/// system has no unnamed files, it has its name from the beginning.
pub struct NewFile {
    store: Arc<FileStore>,
    path: PathBuf,
    name: Name,
}

#[derive(PartialEq, Eq)]
enum Name {
    Given,
    Missing,
}

impl NewFile {
    /// Makes the file that shall be `path`, empty and open for writing.
    ///
    /// # Errors
    /// [`Problem::Exists`]; the operating system's answer.
    pub fn create(path: &Path) -> Result<Self> {
        if fs::symlink_metadata(path).is_ok() {
            return Err(Error::new(Problem::Exists).at(path));
        }
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(0o666);
        let (store, name) = match openat(AT_FDCWD, directory_of(path), flags, mode) {
            Ok(file) => {
                (FileStore::from_file(file.into(), Lasting::Forever).at(path)?, Name::Missing)
            }
            Err(nix::Error::EOPNOTSUPP | nix::Error::EISDIR) => {
                (FileStore::create_new(path).at(path)?, Name::Given)
            }
            Err(errno) => return Err(errno).doing("create it").at(path),
        };
        Ok(Self { store: Arc::new(store), path: path.to_path_buf(), name })
    }

    /// Its content.
    pub fn store(&self) -> &Arc<FileStore> {
        &self.store
    }

    /// Makes its content durable and gives it its name.
    ///
    /// # Errors
    /// [`Problem::Exists`] if somebody else has made such a file meanwhile; the operating system's answer.
    pub fn publish(self) -> Result<()> {
        self.store.sync().doing("make it durable").at(&self.path)?;
        if self.name == Name::Missing {
            let file = PathBuf::from(format!("/proc/self/fd/{}", self.store.file().as_raw_fd()));
            match linkat(AT_FDCWD, &file, AT_FDCWD, &self.path, AtFlags::AT_SYMLINK_FOLLOW) {
                Err(nix::Error::EEXIST) => Err(Error::new(Problem::Exists)),
                linked => linked.doing("give it its name"),
            }
            .at(&self.path)?;
        }
        self.store.make_name_durable(&self.path).doing("make its name durable").at(&self.path)
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::HostOffset;

    #[test]
    fn a_new_file_has_no_name_until_it_is_complete_and_takes_nobodys() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("new");
        let names = || fs::read_dir(place.path()).unwrap().count();
        drop(NewFile::create(&path).unwrap());
        assert_eq!(names(), 0);
        let (first, second) = (NewFile::create(&path).unwrap(), NewFile::create(&path).unwrap());
        first.store().write_at(&[b"first"], HostOffset::ZERO).unwrap();
        first.publish().unwrap();
        assert!(matches!(second.publish().unwrap_err().problem(), Problem::Exists));
        assert!(matches!(NewFile::create(&path).err().unwrap().problem(), Problem::Exists));
        assert_eq!((fs::read(&path).unwrap(), names()), (b"first".to_vec(), 1));
    }
}
