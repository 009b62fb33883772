//! What is stacked on a mount: loop devices on its files, and file systems on those.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::in_use::{loop_devices_of, names_in};
use super::mount_table::{MountEntry, mounts};

/// The file systems that are mounted from loop devices on files under `mountpoint`, one entry for each, and those from loop
/// devices on files of these.
///
/// What the device mapper or a RAID has made of such devices counts as them.
pub(super) fn stacked_on(mountpoint: &Path) -> Vec<MountEntry> {
    let mut found: Vec<MountEntry> = Vec::new();
    let mut places = vec![mountpoint.to_path_buf()];
    while let Some(place) = places.pop() {
        let devices: Vec<String> =
            loop_devices_of(&place, |_| true).iter().flat_map(|device| numbers(device)).collect();
        for mount in mounts().into_iter().filter(|mount| is_from(mount, &devices)) {
            if found.iter().all(|known| known.device != mount.device) {
                places.push(mount.mountpoint.clone());
                found.push(mount);
            }
        }
    }
    found
}

/// Whether the new file `path` would lie on a file system that is stacked on the mount: writing it would have to wait for the
/// mount, and the mount for it.
pub(super) fn lies_on(path: &Path, mountpoint: &Path) -> bool {
    let in_directory = || path.parent().and_then(|directory| directory.canonicalize().ok());
    // A link leads to where the file is.
    let Some(place) = path.canonicalize().ok().or_else(in_directory) else { return false };
    let around = mounts().into_iter().filter(|mount| place.starts_with(&mount.mountpoint));
    // Of several at one place the last is on top.
    let holder = around.max_by_key(|mount| mount.mountpoint.components().count());
    holder.is_some_and(|holder| {
        stacked_on(mountpoint).iter().any(|mount| mount.device == holder.device)
    })
}

/// Whether a file system is mounted from one of `devices`. A btrfs has a number of its own, which is not that of any device.
fn is_from(mount: &MountEntry, devices: &[String]) -> bool {
    let source = || {
        // Names of devices only: to look at others could mean to ask a mount that hangs.
        let source = Some(&mount.source).filter(|source| source.starts_with("/dev"))?;
        let found =
            fs::metadata(source).ok().filter(|found| found.file_type().is_block_device())?;
        Some(format!("{}:{}", major(found.rdev()), minor(found.rdev())))
    };
    devices.contains(&mount.device) || source().is_some_and(|number| devices.contains(&number))
}

/// The numbers, "7:3", of a loop device (its path), of its partitions, and of what is made of any of these.
fn numbers(device: &str) -> Vec<String> {
    let Some(name) = Path::new(device).file_name() else { return Vec::new() };
    let mut numbers = Vec::new();
    let mut places = vec![Path::new("/sys/block").join(name)];
    while let Some(place) = places.pop() {
        let number = fs::read_to_string(place.join("dev"));
        numbers.extend(number.map(|number| number.trim().to_owned()));
        let partitions = inside(&place).filter(|place| place.join("partition").exists());
        places.extend(partitions.chain(inside(&place.join("holders"))));
    }
    numbers
}

fn inside(directory: &Path) -> impl Iterator<Item = PathBuf> {
    names_in(directory).map(move |name| directory.join(name))
}
