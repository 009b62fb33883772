//! Who keeps a mount busy.
//!
//! Only the kernel's own tables are read: the mount itself may be dead or hang.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process;

use super::mount_table;

/// How a scratch twin is called that keeps what it is a twin of in use.
pub const TWIN: &str = "a scratch twin that is being written or holds changes";

/// Everything that holds a file under `mountpoint`, an absolute path without links: processes as
/// "bash (pid 123)", loop devices as "/dev/loop3", other mounts as "the mount on /mnt/x/y".
///
/// Other users' processes can't be seen without root's rights. This process is left out.
pub fn holders(mountpoint: &Path) -> Vec<String> {
    let mut holders = processes(mountpoint);
    holders.extend(loop_devices(mountpoint));
    holders.extend(mounts_below(mountpoint));
    holders
}

fn processes(mountpoint: &Path) -> Vec<String> {
    let mut pids: Vec<u32> = names_in(Path::new("/proc"))
        .filter_map(|name| name.to_str()?.parse().ok())
        .filter(|&pid| pid != process::id())
        .collect();
    pids.sort_unstable();
    pids.into_iter()
        .map(|pid| (pid, PathBuf::from(format!("/proc/{pid}"))))
        .filter(|(_, process)| uses(process, mountpoint))
        .map(|(pid, process)| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            format!("{} (pid {pid})", name.trim_end())
        })
        .collect()
}

/// Whether `process`, a directory of `/proc`, has a file under `mountpoint` open or mapped, or
/// runs in there.
fn uses(process: &Path, mountpoint: &Path) -> bool {
    let is_inside = |link: PathBuf| fs::read_link(link).is_ok_and(|to| to.starts_with(mountpoint));
    let descriptors = process.join("fd");
    ["cwd", "root", "exe"].iter().any(|name| is_inside(process.join(name)))
        || names_in(&descriptors).any(|name| is_inside(descriptors.join(name)))
        || maps(process, mountpoint)
}

/// Whether `process` maps a file under `mountpoint`: the mapping outlives the descriptor.
fn maps(process: &Path, mountpoint: &Path) -> bool {
    // Unlike the links in map_files, this can be read without root's rights.
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    maps.split(|&byte| byte == b'\n')
        .filter_map(mapped_file)
        .any(|file| file.starts_with(mountpoint))
}

/// The file in a line `7f00-7f01 r--p 00000000 fd:01 1234       /path with spaces`.
fn mapped_file(line: &[u8]) -> Option<&Path> {
    let start = line.iter().position(|&byte| byte == b'/')?;
    Some(Path::new(OsStr::from_bytes(&line[start..])))
}

/// The loop devices whose files are under `mountpoint`.
pub(super) fn loop_devices(mountpoint: &Path) -> Vec<String> {
    let block = Path::new("/sys/block");
    let mut devices: Vec<_> = names_in(block)
        .filter(|name| {
            let file = fs::read(block.join(name).join("loop/backing_file")).unwrap_or_default();
            Path::new(OsStr::from_bytes(file.trim_ascii_end())).starts_with(mountpoint)
        })
        .map(|name| Path::new("/dev").join(name).display().to_string())
        .collect();
    devices.sort_unstable();
    devices
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
