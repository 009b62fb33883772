//! What is stacked on a mount: loop devices on its files, and file systems on those.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{major, minor};

use super::in_use::loop_devices;
use super::mount_table::{MountEntry, mounts};

/// The file systems that are mounted from loop devices on files under `mountpoint`, one entry for each, and those from loop
/// devices on files of these.
///
/// Others that reach the mount by more than that (LVM, RAID) are not seen.
pub(super) fn stacked_on(mountpoint: &Path) -> Vec<MountEntry> {
    let mut found: Vec<MountEntry> = Vec::new();
    let mut places = vec![mountpoint.to_path_buf()];
    while let Some(place) = places.pop() {
        let devices: Vec<String> =
            loop_devices(&place).iter().flat_map(|device| numbers(device)).collect();
        for mount in mounts().into_iter().filter(|mount| devices.contains(&mount.device)) {
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
    let directory = path.parent().unwrap_or(path);
    let Ok(metadata) = fs::metadata(directory) else { return false };
    let device = format!("{}:{}", major(metadata.dev()), minor(metadata.dev()));
    stacked_on(mountpoint).iter().any(|mount| mount.device == device)
}

/// The numbers, "7:3", of a loop device (its path) and of its partitions.
fn numbers(device: &str) -> Vec<String> {
    let Some(name) = Path::new(device).file_name() else { return Vec::new() };
    let block = Path::new("/sys/block").join(name);
    let partitions = fs::read_dir(&block).into_iter().flatten().flatten();
    [block.clone()]
        .into_iter()
        .chain(partitions.map(|entry| entry.path()))
        .filter_map(|place| fs::read_to_string(place.join("dev")).ok())
        .map(|number| number.trim().to_owned())
        .collect()
}
