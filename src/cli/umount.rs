//! `qchainfs umount`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::exit;
use crate::error::{At, Doing, Error, Problem, Result};
use crate::mount::{Detach, detach, mounted_type};

/// Take a mount away; returns when its image is closed and clean
#[derive(clap::Args)]
pub struct Arguments {
    /// Where it is mounted
    mountpoint: PathBuf,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    umount(&arguments.mountpoint, Detach::WhenIdle)?;
    Ok(ExitCode::from(exit::DONE))
}

/// Unmounts and waits for the process behind the mount to end.
pub fn umount(mountpoint: &Path, how: Detach) -> Result<()> {
    let mountpoint = std::path::absolute(mountpoint).doing("find out the current directory")?;
    if mounted_type(&mountpoint).as_deref() != Some("fuse.qchainfs") {
        return Err(Error::new(Problem::NotMounted).at(&mountpoint));
    }
    let server = match server(&mountpoint) {
        Ok(server) => server,
        // Its process is dead: there is nothing left to lose or to wait for.
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            return detach(&mountpoint, Detach::Now);
        }
        Err(error) => return Err(Error::io("ask who serves it", error).at(&mountpoint)),
    };
    // While the mount is still there, whatever goes wrong can be told.
    let disk = File::open(mountpoint.join("disk.raw")).doing("open disk.raw").at(&mountpoint)?;
    disk.sync_all().doing("make all changes durable").at(&mountpoint)?;
    drop(disk);

    let process = server.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    detach(&mountpoint, how)?;
    // Those who still use a mount that was taken away anyhow may take as long as they like.
    if let (Some(Ok(process)), Detach::WhenIdle) = (process, how) {
        let mut events = [PollFd::new(&process, PollFlags::IN)];
        while let Err(error) = poll(&mut events, None) {
            if error != rustix::io::Errno::INTR {
                return Err(Error::io("wait for its process", error.into()).at(&mountpoint));
            }
        }
    }
    Ok(())
}

/// The process that serves the mount, as it says itself.
fn server(mountpoint: &Path) -> std::io::Result<Option<Pid>> {
    let text = fs::read_to_string(mountpoint.join(".qchainfs/daemon.json"))?;
    let daemon: serde_json::Value = serde_json::from_str(&text)?;
    let pid = daemon["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    Ok(pid.and_then(Pid::from_raw))
}
