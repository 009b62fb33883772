//! A mount that ends with the test, in order or not.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::tools::{Outcome, args, need_mounting, qchainfs};
use super::watchdog::{LIMIT, Watchdog, wait_until};

/// A live mount of qchainfs on a directory of its own.
pub struct Mounted {
    dir: Option<TempDir>,
    root: PathBuf,
    daemon: Arc<Mutex<Option<Pid>>>,
    _watchdog: Watchdog,
}

impl Mounted {
    /// Mounts `addr` read-write.
    #[track_caller]
    pub fn new(addr: impl AsRef<OsStr>) -> Self {
        Self::with(&[], addr)
    }

    /// Mounts `addr` read-only.
    #[track_caller]
    pub fn read_only(addr: impl AsRef<OsStr>) -> Self {
        Self::with(&args!["-r"], addr)
    }

    /// Mounts `addr` with options.
    #[track_caller]
    pub fn with(options: &[OsString], addr: impl AsRef<OsStr>) -> Self {
        match Self::attempt(options, addr) {
            Ok(mounted) => mounted,
            Err(outcome) => panic!("{outcome}"),
        }
    }

    /// Panics unless mounting `addr` fails with `code`; gives what was said about it.
    #[track_caller]
    pub fn refused(options: &[OsString], addr: impl AsRef<OsStr>, code: i32) -> String {
        match Self::attempt(options, &addr) {
            Ok(_) => panic!("{} was mounted", addr.as_ref().display()),
            Err(outcome) => outcome.fails(code),
        }
    }

    /// Mounts `addr`, or tells why that failed.
    #[track_caller]
    pub fn attempt(options: &[OsString], addr: impl AsRef<OsStr>) -> Result<Self, Outcome> {
        Self::attempt_by(addr.as_ref(), |addr, root| {
            let mut words = args!["mount"].to_vec();
            words.extend_from_slice(options);
            words.extend(args![addr, root]);
            qchainfs(&words)
        })
    }

    /// Mounts by another command, which is given the address and the mountpoint.
    #[track_caller]
    pub fn attempt_by(
        addr: &OsStr,
        mount: impl FnOnce(&OsStr, &Path) -> Outcome,
    ) -> Result<Self, Outcome> {
        need_mounting();
        let dir = TempDir::with_prefix("qchainfs-mount-").expect("make a mountpoint");
        let root = dir.path().to_path_buf();
        let daemon = Arc::new(Mutex::new(None));
        let rescue = (root.clone(), Arc::clone(&daemon));
        let watchdog =
            Watchdog::start(format!("the mount of {}", addr.display()), LIMIT, move || {
                let (root, daemon) = rescue;
                let _ = umount2(&root, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
                if let Some(pid) = *daemon.lock().unwrap_or_else(PoisonError::into_inner) {
                    let _ = kill(pid, Signal::SIGKILL);
                }
            });
        let mut mounted = Self { dir: Some(dir), root, daemon, _watchdog: watchdog };
        let outcome = mount(addr, &mounted.root);
        if outcome.code == Some(0) {
            assert!(mounted.is_live(), "it succeeded, but nothing is mounted: {outcome}");
            *mounted.daemon.lock().expect("the daemon's pid") = Some(mounted.read_pid());
            Ok(mounted)
        } else {
            assert!(!mounted.is_live(), "it failed, but left a mount behind: {outcome}");
            mounted.dir.take();
            Err(outcome)
        }
    }

    /// The mountpoint.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A file or directory of the mount.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside)
    }

    /// The active layer.
    pub fn disk(&self) -> PathBuf {
        self.path("disk.raw")
    }

    /// The process that serves the mount.
    pub fn daemon(&self) -> Pid {
        self.daemon.lock().expect("the daemon's pid").expect("a live mount has a daemon")
    }

    /// Unmounts; panics unless that succeeds, the mount is gone and its daemon ends.
    #[track_caller]
    pub fn umount(self) {
        qchainfs(&args!["umount", self.root]).ok();
        self.is_over();
    }

    /// Panics unless the mount is gone and its daemon ends.
    #[track_caller]
    pub fn is_over(&self) {
        assert!(!self.is_live(), "{} is still mounted", self.root.display());
        let daemon = self.daemon();
        wait_until("the daemon ends", || !is_running(daemon));
    }

    /// The line of `/proc/self/mounts` that shows the mount: its source, type and options.
    pub fn mount_line(&self) -> Option<Vec<String>> {
        mount_line(&self.root)
    }

    fn is_live(&self) -> bool {
        self.mount_line().is_some()
    }

    #[track_caller]
    fn read_pid(&self) -> Pid {
        let text = fs::read(self.path(".qchainfs/daemon.json")).expect("read daemon.json");
        let value: Value = serde_json::from_slice(&text).expect("daemon.json is JSON");
        let pid = value["pid"].as_i64().expect("daemon.json has a pid");
        Pid::from_raw(i32::try_from(pid).expect("a pid is an i32"))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        while self.is_live() {
            if umount2(&self.root, MntFlags::MNT_DETACH).is_err() {
                break;
            }
        }
        let daemon = *self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = daemon.filter(|pid| is_running(*pid)) {
            end(pid);
        }
        if self.is_live() {
            // Removing the directory would reach into the mount.
            let _ = self.dir.take().map(TempDir::keep);
        }
    }
}

/// Lets a daemon that has lost its mount finish, and kills it if it doesn't.
fn end(pid: Pid) {
    for _ in 0..2000 {
        if !is_running(pid) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let _ = kill(pid, Signal::SIGKILL);
}

/// The line of `/proc/self/mounts` that shows what is mounted on `root`.
pub fn mount_line(root: &Path) -> Option<Vec<String>> {
    // Somebody else may have mounted a file whose name is no UTF-8.
    let mounts = fs::read("/proc/self/mounts").expect("read /proc/self/mounts");
    let mounts = String::from_utf8_lossy(&mounts);
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    mounts.lines().map(words).find(|words| Path::new(&words[1]) == root)
}

/// Whether the process exists and is more than a zombie.
pub fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, rest)) = stat.rsplit_once(") ") else { return false };
    // The first thread may be dead before the others, which still hold files and their locks.
    let alone = rest.split(' ').nth(17) == Some("1");
    !(rest.starts_with(['Z', 'X']) && alone)
}
