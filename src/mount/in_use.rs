//! Who keeps a mount busy.
//!
//! Only the kernel's own tables are read: the mount itself may be dead or hang.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process;

use super::mount_table;
use crate::store::Access;

/// How a scratch twin is called that keeps what it is a twin of in use.
pub const TWIN: &str =
    "a scratch twin that is being written or holds changes, which last as long as the mount";

/// Everything that holds a file under `mountpoint`, an absolute path without links: processes as
/// "bash (pid 123)", loop devices as "/dev/loop3", other mounts as "the mount on /mnt/x/y".
///
/// Other users' processes can't be seen without root's rights. This process is left out.
pub fn holders(mountpoint: &Path) -> Vec<String> {
    let mut holders = holders_of(mountpoint, |_| true);
    holders.extend(mounts_below(mountpoint));
    holders
}

/// The processes and loop devices, as [`holders`] shows them, that use a file under `mountpoint` in a way that `concerns`.
pub fn holders_of(mountpoint: &Path, concerns: impl Fn(&Use<'_>) -> bool) -> Vec<String> {
    let search = Search { mountpoint, concerns: &concerns };
    let mut holders = search.processes();
    holders.extend(search.loop_devices());
    holders
}

/// The loop devices over files under `mountpoint` that `concerns`.
pub fn loop_devices_of(mountpoint: &Path, concerns: impl Fn(&Use<'_>) -> bool) -> Vec<String> {
    Search { mountpoint, concerns: &concerns }.loop_devices()
}

/// How somebody uses a file.
pub struct Use<'a> {
    /// The file, seen from the mountpoint.
    pub file: &'a Path,
    /// What it is open for.
    pub access: Access,
}

/// What is looked for.
struct Search<'a> {
    mountpoint: &'a Path,
    concerns: &'a dyn Fn(&Use<'_>) -> bool,
}

impl Search<'_> {
    fn finds(&self, file: &Path, access: Access) -> bool {
        let file = file.strip_prefix(self.mountpoint);
        file.is_ok_and(|file| (self.concerns)(&Use { file, access }))
    }

    fn processes(&self) -> Vec<String> {
        let mut pids: Vec<u32> = names_in(Path::new("/proc"))
            .filter_map(|name| name.to_str()?.parse().ok())
            .filter(|&pid| pid != process::id())
            .collect();
        pids.sort_unstable();
        pids.into_iter()
            .map(|pid| (pid, PathBuf::from(format!("/proc/{pid}"))))
            .filter(|(_, process)| self.finds_any_of(process))
            .map(|(pid, process)| {
                let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
                format!("{} (pid {pid})", name.trim_end())
            })
            .collect()
    }

    /// Whether `process`, a directory of `/proc`, has such a file open or mapped, or runs in there.
    fn finds_any_of(&self, process: &Path) -> bool {
        let places = ["cwd", "root", "exe"].iter().any(|name| {
            let place = fs::read_link(process.join(name));
            place.is_ok_and(|place| self.finds(&place, Access::ReadOnly))
        });
        let descriptors = process.join("fd");
        let opens = |name: OsString| {
            let file = fs::read_link(descriptors.join(&name));
            file.is_ok_and(|file| self.finds(&file, opened_for(&process.join("fdinfo").join(name))))
        };
        places || names_in(&descriptors).any(opens) || self.finds_mapped_by(process)
    }

    /// Whether `process` maps such a file: the mapping outlives the descriptor.
    fn finds_mapped_by(&self, process: &Path) -> bool {
        // Unlike the links in map_files, this can be read without root's rights.
        let maps = fs::read(process.join("maps")).unwrap_or_default();
        maps.split(|&byte| byte == b'\n').any(|line| {
            let permissions = line.split(|&byte| byte == b' ').nth(1);
            // A private mapping never writes to its file.
            let shared = matches!(permissions, Some([_, b'w', _, b's']));
            let access = if shared { Access::ReadWrite } else { Access::ReadOnly };
            mapped_file(line).is_some_and(|file| self.finds(file, access))
        })
    }

    fn loop_devices(&self) -> Vec<String> {
        let block = Path::new("/sys/block");
        let mut devices: Vec<_> = names_in(block)
            .filter(|name| {
                let device = block.join(name);
                let Ok(file) = fs::read(device.join("loop/backing_file")) else { return false };
                let only_read = fs::read(device.join("ro")).is_ok_and(|ro| ro.starts_with(b"1"));
                let access = if only_read { Access::ReadOnly } else { Access::ReadWrite };
                self.finds(Path::new(OsStr::from_bytes(file.trim_ascii_end())), access)
            })
            .map(|name| Path::new("/dev").join(name).display().to_string())
            .collect();
        devices.sort_unstable();
        devices
    }
}

/// What a descriptor is open for, whose file in `fdinfo` is `info`.
fn opened_for(info: &Path) -> Access {
    let info = fs::read_to_string(info).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    match flags.map(|flags| flags & libc::O_ACCMODE) {
        Some(libc::O_WRONLY | libc::O_RDWR) => Access::ReadWrite,
        _ => Access::ReadOnly,
    }
}

/// The file in a line `7f00-7f01 r--p 00000000 fd:01 1234       /path with spaces`.
fn mapped_file(line: &[u8]) -> Option<&Path> {
    let start = line.iter().position(|&byte| byte == b'/')?;
    Some(Path::new(OsStr::from_bytes(&line[start..])))
}

fn mounts_below(mountpoint: &Path) -> Vec<String> {
    mount_table::mounts()
        .into_iter()
        .map(|mount| mount.mountpoint)
        .filter(|place| place != mountpoint && place.starts_with(mountpoint))
        .map(|place| format!("the mount on {}", place.display()))
        .collect()
}

/// The names in a directory; none if it can't be read.
pub(super) fn names_in(directory: &Path) -> impl Iterator<Item = OsString> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.file_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_may_have_spaces_in_its_name() {
        let line = b"7f00-7f01 r--p 00000000 fd:01 1234      /mnt/my disk/disk.raw";
        assert_eq!(mapped_file(line), Some(Path::new("/mnt/my disk/disk.raw")));
        assert_eq!(mapped_file(b"7f00-7f01 rw-p 00000000 00:00 0 [heap]"), None);
    }

    #[test]
    fn a_child_is_found_by_its_working_directory() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let place = directory.path().canonicalize().expect("its path");
        let mut child = process::Command::new("sleep")
            .arg("60")
            .current_dir(&place)
            .spawn()
            .expect("start sleep");
        let found = holders(&place);
        child.kill().expect("kill sleep");
        child.wait().expect("wait for sleep");
        assert_eq!(found, [format!("sleep (pid {})", child.id())]);
        assert!(holders(&place).is_empty());
    }
}
