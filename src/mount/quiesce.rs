//! File systems on loop devices over a mount, holding still while its disk changes hands.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::in_use::loop_devices;
use super::mount_table::mounts;
use crate::error::{Error, Problem, Result};

/// File systems that take no writes, all that they had written. They go on when this is dropped.
pub(super) struct Frozen {
    places: Vec<PathBuf>,
}

impl Frozen {
    /// Freezes all that are mounted from loop devices on files under `mountpoint`, by `fsfreeze` of util-linux.
    ///
    /// # Errors
    /// One that can't be frozen; the others go on then.
    pub fn all_on(mountpoint: &Path) -> Result<Self> {
        let devices: Vec<String> =
            loop_devices(mountpoint).iter().flat_map(|device| numbers(device)).collect();
        let mut frozen = Self { places: Vec::new() };
        let mut done: Vec<String> = Vec::new();
        for mount in mounts() {
            // A file system can be mounted at several places and is frozen once.
            if devices.contains(&mount.device) && !done.contains(&mount.device) {
                fsfreeze("--freeze", &mount.mountpoint)?;
                frozen.places.push(mount.mountpoint);
                done.push(mount.device);
            }
        }
        Ok(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for place in &self.places {
            if let Err(error) = fsfreeze("--unfreeze", place) {
                log::error!("{error}: thaw it by hand");
            }
        }
    }
}

fn fsfreeze(action: &str, place: &Path) -> Result<()> {
    let helper = |message: String| Error::new(Problem::Helper { program: "fsfreeze", message });
    let output = Command::new("fsfreeze").arg(action).arg(place).output();
    let output = output.map_err(|error| helper(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(helper(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// The numbers, "7:3", of a loop device (its path) and of its partitions.
fn numbers(device: &str) -> Vec<String> {
    let Some(name) = Path::new(device).file_name() else { return Vec::new() };
    let block = Path::new("/sys/block").join(name);
    let partitions = std::fs::read_dir(&block).into_iter().flatten().flatten();
    [block.clone()]
        .into_iter()
        .chain(partitions.map(|entry| entry.path()))
        .filter_map(|place| std::fs::read_to_string(place.join("dev")).ok())
        .map(|number| number.trim().to_owned())
        .collect()
}
