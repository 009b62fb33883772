//! File systems on loop devices over a mount, holding still while its disk changes hands.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::stacked::stacked_on;
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
        let mut frozen = Self { places: Vec::new() };
        // What lies on another one first: freezing it writes to that.
        for mount in stacked_on(mountpoint).into_iter().rev() {
            fsfreeze("--freeze", &mount.mountpoint)?;
            frozen.places.push(mount.mountpoint);
        }
        Ok(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for place in self.places.iter().rev() {
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
