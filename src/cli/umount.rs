//! `qchainfs umount`.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};

use super::exit;
use crate::error::{At, Doing, Error, Problem, Result};
use crate::mount::{Detach, detach, is_dead, open_process, our_mount, our_mounts, server};

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
    let Some(mount) = our_mount(&mountpoint) else {
        return Err(Error::new(Problem::NotMounted).at(&mountpoint));
    };
    match open_disk(&mountpoint) {
        // While the mount is still there, whatever goes wrong can be told.
        Ok(disk) => disk.sync_all().doing("make all changes durable").at(&mountpoint)?,
        // Its process is dead, or just dying: there is nothing left to lose or to wait for.
        Err(error) if error.raw_os_error().is_some_and(is_dead) => {
            return detach(&mountpoint, Detach::Now);
        }
        // Root may unmount what only its owner may look into. Its process makes all durable when it ends.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        Err(error) => return Err(Error::io("open its disk", error).at(&mountpoint)),
    }

    let process = server(&mount).or_else(|| server_by_itself(&mountpoint));
    detach(&mountpoint, how)?;
    // Those who still use a mount that was taken away anyhow may take as long as they like; and so may those of a
    // bind mount that shows the same elsewhere.
    let elsewhere = || our_mounts().iter().any(|other| other.device == mount.device);
    match process {
        Some(process) if how == Detach::WhenIdle && !elsewhere() => {
            wait_for(&process).at(&mountpoint)
        }
        _ => Ok(()),
    }
}

/// The disk of the view at the root: the mount itself where that is a file.
fn open_disk(mountpoint: &Path) -> io::Result<File> {
    if fs::metadata(mountpoint)?.is_dir() {
        match File::open(mountpoint.join("disk.raw")) {
            // A mount beside a writer has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => File::open(mountpoint),
            opened => opened,
        }
    } else {
        File::open(mountpoint)
    }
}

/// The process that serves the mount, as the mount itself says where it is a directory.
fn server_by_itself(mountpoint: &Path) -> Option<OwnedFd> {
    let text = fs::read(mountpoint.join(".qchainfs/daemon.json")).ok()?;
    let daemon: serde_json::Value = serde_json::from_slice(&text).ok()?;
    open_process(daemon["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok())?)
}

fn wait_for(process: &OwnedFd) -> Result<()> {
    let mut events = [PollFd::new(process, PollFlags::IN)];
    while let Err(error) = poll(&mut events, None) {
        if error != rustix::io::Errno::INTR {
            return Err(Error::io("wait for its process", error.into()));
        }
    }
    Ok(())
}
