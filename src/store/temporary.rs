//! Files without a name, of which nothing stays behind.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::FileStore;
use super::file::Lasting;
use crate::error::{At, Doing, Error, Result};

/// A directory for temporary files. It stays the same one, whatever is mounted over its name later.
#[derive(Debug)]
pub struct TemporaryDirectory {
    path: PathBuf,
    directory: File,
}

impl TemporaryDirectory {
    /// Opens the directory and finds out whether it can hold such files.
    ///
    /// # Errors
    /// A directory that is not there or can't be written; a file system without unnamed files.
    pub fn open(path: &Path) -> Result<Self> {
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path);
        let directory = opened.doing("open the directory for temporary files").at(path)?;
        let directory = Self { path: path.to_path_buf(), directory };
        directory.make_file()?;
        Ok(directory)
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new, empty file that never has a name: it goes with its descriptor, however this process ends.
    ///
    /// # Errors
    /// The operating system's answer.
    pub fn make_file(&self) -> Result<FileStore> {
        // With O_EXCL nobody can ever give it a name.
        let flags = OFlag::O_TMPFILE | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        match openat(&self.directory, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(file) => FileStore::from_file(file.into(), Lasting::WhileOpen),
            // The latter from kernels that don't know the flag: to them it opens the directory.
            Err(nix::Error::EOPNOTSUPP | nix::Error::EISDIR) => Err(Error::unsupported(
                "temporary files without a name, which its file system lacks",
            )),
            Err(errno) => Err(errno).doing("make a temporary file"),
        }
        .at(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::store::Store;
    use crate::units::HostOffset;

    #[test]
    fn a_temporary_file_is_nobodys_but_ours_and_has_no_name() {
        let place = tempfile::tempdir().unwrap();
        let directory = TemporaryDirectory::open(place.path()).unwrap();
        let file = directory.make_file().unwrap();
        file.write_at(&[b"abc"], HostOffset::new(5)).unwrap();
        let mut found = [9; 8];
        file.read_at(&mut found, HostOffset::ZERO).unwrap();
        assert_eq!(&found, b"\0\0\0\0\0abc");
        assert_eq!(file.file().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = TemporaryDirectory::open(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.headline().contains("/nowhere/at/all"), "{error}");
    }
}
