//! Loop devices and the file systems on them, as guards.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

use super::mounted::mount_line;
use super::tools::{args, attempt, need_mounting, run};
use super::watchdog::{LIMIT, Watchdog, wait_until};

/// A loop device on a file.
pub struct LoopDevice {
    device: PathBuf,
    _watchdog: Watchdog,
}

impl LoopDevice {
    /// Attaches `file` to a free device, read-only where the file is.
    #[track_caller]
    pub fn attach(file: &Path) -> Self {
        let read_only = fs::metadata(file).expect("stat").permissions().readonly();
        Self::attach_with(if read_only { "-rfP" } else { "-fP" }, file)
    }

    /// Attaches `file` to a free device that can't write.
    #[track_caller]
    pub fn attach_read_only(file: &Path) -> Self {
        Self::attach_with("-rfP", file)
    }

    #[track_caller]
    fn attach_with(mode: &str, file: &Path) -> Self {
        need_mounting();
        let said = run("losetup", &args![mode, "--show", file]);
        let device = PathBuf::from(said.trim());
        let lost = device.clone();
        let watchdog = Watchdog::start(format!("{} on a view", lost.display()), LIMIT, move || {
            let _ = Command::new("losetup").arg("-d").arg(lost).status();
        });
        Self { device, _watchdog: watchdog }
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The devices of its partitions. A kernel without parsers for partition tables is told about
    /// them by `partx`.
    #[track_caller]
    pub fn partitions(&self) -> Vec<PathBuf> {
        if self.partition_devices().is_empty() {
            run("partx", &args!["-a", self.device]);
        }
        self.partition_devices()
    }

    fn partition_devices(&self) -> Vec<PathBuf> {
        let name = self.device.file_name().expect("a device name").to_string_lossy();
        let entries = fs::read_dir(format!("/sys/block/{name}")).expect("list a block device");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let part = format!("{name}p");
        let mut found: Vec<_> = names
            .filter(|entry| entry.to_string_lossy().starts_with(&part))
            .map(|entry| self.device.with_file_name(entry))
            .collect();
        found.sort();
        found
    }

    fn backing_file(&self) -> PathBuf {
        let name = self.device.file_name().expect("a device name").to_string_lossy();
        PathBuf::from(format!("/sys/block/{name}/loop/backing_file"))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = attempt("losetup", &args!["-d", self.device]);
        if !std::thread::panicking() {
            detached.ok();
            wait_until("the loop device lets its file go", || !self.backing_file().exists());
        }
    }
}

/// A file system mounted on a directory of its own.
pub struct FileSystem {
    dir: TempDir,
    _watchdog: Watchdog,
}

impl FileSystem {
    /// Mounts `source` with the options of `mount -o`.
    #[track_caller]
    pub fn mount(source: &Path, options: &str) -> Self {
        Self::mount_by(&args!["-o", options, source])
    }

    /// A new one in memory: in each of them the first file has the same inode number.
    #[track_caller]
    pub fn in_memory() -> Self {
        Self::mount_by(&args!["-t", "tmpfs", "tmpfs"])
    }

    /// A new one in memory with room for `bytes`.
    #[track_caller]
    pub fn with_room_for(bytes: u64) -> Self {
        let size = format!("size={bytes}");
        Self::mount_by(&args!["-t", "tmpfs", "-o", size, "tmpfs"])
    }

    fn mount_by(words: &[OsString]) -> Self {
        need_mounting();
        let dir = TempDir::with_prefix("qchainfs-inner-").expect("make a mountpoint");
        let root = dir.path().to_path_buf();
        let words = [words, &args![root]].concat();
        let watchdog = Watchdog::start(format!("{} as a file system", root.display()), LIMIT, {
            let root = root.clone();
            move || {
                let _ = umount2(&root, MntFlags::MNT_DETACH);
            }
        });
        run("mount", &words);
        Self { dir, _watchdog: watchdog }
    }

    /// A file in it.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join(inside)
    }

    /// Its root directory.
    pub fn root(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        if mount_line(self.dir.path()).is_none() {
            return;
        }
        let unmounted = attempt("umount", &args![self.dir.path()]);
        if !std::thread::panicking() {
            unmounted.ok();
        } else if unmounted.code != Some(0) {
            let _ = umount2(self.dir.path(), MntFlags::MNT_DETACH);
        }
    }
}
