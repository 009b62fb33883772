//! A mount of one view on a regular file, which ends with the test.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::mounted::{is_running, mount_line};
use super::tools::{args, need_mounting, qchainfs};
use super::watchdog::{LIMIT, Watchdog, wait_until};

/// What is in the file before and after the mount.
const UNDERNEATH: &str = "what was there before";

/// A live mount on a file of its own.
pub struct MountedFile {
    file: PathBuf,
    state: PathBuf,
    daemon: Pid,
    _watchdog: Watchdog,
    _dir: TempDir,
}

impl MountedFile {
    /// Mounts `addr` with options.
    #[track_caller]
    pub fn with(options: &[OsString], addr: impl AsRef<OsStr>) -> Self {
        need_mounting();
        let dir = TempDir::with_prefix("qchainfs-file-").expect("make a directory");
        let file = dir.path().join("disk");
        fs::write(&file, UNDERNEATH).expect("make a mountpoint");
        let rescue = file.clone();
        let watchdog = Watchdog::start("a mount on a file".into(), LIMIT, move || {
            let _ = umount2(&rescue, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        });
        mount(options, addr.as_ref(), &file);
        let state = state_of(&file);
        let daemon = pid_in(&state);
        Self { file, state, daemon, _watchdog: watchdog, _dir: dir }
    }

    /// The mountpoint, which is the disk.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// The process that serves the mount.
    pub fn daemon(&self) -> Pid {
        self.daemon
    }

    /// Ends the daemon with no chance to tidy up.
    pub fn kill(&self) {
        kill(self.daemon, Signal::SIGKILL).expect("kill the daemon");
        wait_until("the daemon dies", || !is_running(self.daemon));
    }

    /// Mounts once more where a killed daemon has left its mount.
    #[track_caller]
    pub fn again(&mut self, addr: impl AsRef<OsStr>) {
        mount(&[], addr.as_ref(), &self.file);
        self.state = state_of(&self.file);
        self.daemon = pid_in(&self.state);
    }

    /// Unmounts; panics unless the daemon has ended by then and the file is as it was before.
    #[track_caller]
    pub fn umount(self) {
        qchainfs(&args!["umount", self.file]).ok();
        assert!(!is_running(self.daemon), "umount did not wait for the daemon");
        // Another mount may have got the number, and the file with it.
        let left = names(&self.state, self.daemon);
        assert!(!left, "{} is left", self.state.display());
        self.is_over();
    }

    /// Panics unless nothing is mounted any more and the daemon ends.
    #[track_caller]
    pub fn is_over(&self) {
        assert!(mount_line(&self.file).is_none(), "it is still mounted");
        wait_until("the daemon ends", || !is_running(self.daemon));
        assert_eq!(fs::read_to_string(&self.file).expect("read"), UNDERNEATH);
    }
}

impl Drop for MountedFile {
    fn drop(&mut self) {
        while mount_line(&self.file).is_some() {
            if umount2(&self.file, MntFlags::MNT_DETACH).is_err() {
                break;
            }
        }
        if std::thread::panicking() && is_running(self.daemon) {
            let _ = kill(self.daemon, Signal::SIGKILL);
        }
    }
}

#[track_caller]
fn mount(options: &[OsString], addr: &OsStr, file: &Path) {
    let mut words = args!["mount"].to_vec();
    words.extend_from_slice(options);
    words.extend(args![addr, file]);
    qchainfs(&words).ok();
}

/// The file in which the daemon of the mount on `root` says who it is.
pub fn state_of(root: &Path) -> PathBuf {
    let device = fs::metadata(root).expect("stat").dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    PathBuf::from(format!("/run/qchainfs/{major}-{minor}.json"))
}

/// Whether the file `state` is there and is that of `daemon`.
pub fn names(state: &Path, daemon: Pid) -> bool {
    let text = fs::read(state).unwrap_or_default();
    let value: Value = serde_json::from_slice(&text).unwrap_or_default();
    value["pid"].as_i64() == Some(daemon.as_raw().into())
}

fn pid_in(state: &Path) -> Pid {
    let text = fs::read(state).expect("read the state of a mount");
    let value: Value = serde_json::from_slice(&text).expect("JSON");
    Pid::from_raw(i32::try_from(value["pid"].as_i64().expect("a pid")).expect("an i32"))
}
