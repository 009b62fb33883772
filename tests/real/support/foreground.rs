//! A mount whose daemon stays in front, as a child of the test.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::mounted::mount_line;
use super::tools::{QCHAINFS, args, need_mounting, start};
use super::watchdog::{LIMIT, Watchdog, wait_until};

/// `qchainfs mount -f` while it runs.
pub struct Foreground {
    child: Child,
    dir: TempDir,
    _watchdog: Watchdog,
}

impl Foreground {
    /// Mounts `image` and waits until the mount answers.
    #[track_caller]
    pub fn start(image: &Path) -> Self {
        need_mounting();
        let dir = TempDir::with_prefix("qchainfs-mount-").expect("make a mountpoint");
        let words: [OsString; 4] = args!["mount", "-f", image, dir.path()];
        let child = start(Command::new(QCHAINFS).args(words).stdin(Stdio::null()));
        let rescue = (dir.path().to_path_buf(), Pid::from_raw(child.id().cast_signed()));
        let watchdog = Watchdog::start("a mount in front".into(), LIMIT, move || {
            let (root, pid) = rescue;
            let _ = umount2(&root, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
            let _ = kill(pid, Signal::SIGKILL);
        });
        let mut front = Self { child, dir, _watchdog: watchdog };
        wait_until("the mount appears", || {
            let ended = front.child.try_wait().expect("ask for a child");
            assert!(ended.is_none(), "qchainfs mount -f ended at once: {ended:?}");
            mount_line(front.dir.path()).is_some() && front.disk().exists()
        });
        front
    }

    /// The active layer.
    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    /// The process in front.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Sends it a signal; panics unless it then ends with code 0 and without a mount.
    #[track_caller]
    pub fn end_by(mut self, signal: Signal) {
        kill(self.pid(), signal).expect("send a signal");
        let status = self.child.wait().expect("wait for a child");
        assert_eq!(status.code(), Some(0), "the end by {signal}: {status}");
        assert!(mount_line(self.dir.path()).is_none(), "{signal} left the mount behind");
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        if mount_line(self.dir.path()).is_some() {
            let _ = umount2(self.dir.path(), MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
