//! What a live mount leaves where other processes find it, whatever the mount itself shows: who serves it.
//!
//! The file is named by the mount's device number, which nobody has to ask the mount for. Since such numbers are used
//! again, and a process that was killed leaves its file behind, the process is known by its start, too.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open, test_kill_process};
use serde_json::{Value, json};

use super::mount_table::MountEntry;

/// The state of a mount that this process serves; it goes when this is dropped.
pub struct State {
    directory: PathBuf,
    file: PathBuf,
}

impl State {
    /// Says that this process serves `mount`.
    ///
    /// # Errors
    /// No directory for it, as where a user is not logged in.
    pub fn publish(mount: &MountEntry) -> io::Result<Self> {
        let mut problem = io::Error::from(ErrorKind::NotFound);
        for directory in directories(geteuid().as_raw()) {
            match Self::publish_in(directory, mount) {
                Err(error) => problem = error,
                done => return done,
            }
        }
        Err(problem)
    }

    fn publish_in(directory: PathBuf, mount: &MountEntry) -> io::Result<Self> {
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            done => done?,
        }
        let metadata = directory.symlink_metadata()?;
        if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() {
            return Err(ErrorKind::PermissionDenied.into());
        }
        let _lock = lock(&directory)?;
        let state = json!({
            "pid": std::process::id(),
            "start-time": start_time(std::process::id()),
            "mountpoint": mount.mountpoint.display().to_string(),
            "image": mount.source.display().to_string(),
            "version": env!("CARGO_PKG_VERSION"),
        });
        let file = directory.join(file_name(mount));
        // Nobody may read a half of it.
        let unfinished = directory.join(format!("{}.new", std::process::id()));
        let mut new = File::create(&unfinished)?;
        new.set_permissions(Permissions::from_mode(0o600))?;
        new.write_all(format!("{state:#}\n").as_bytes())?;
        fs::rename(&unfinished, &file)?;
        // The mount that had the number before us is gone, however its process ended.
        for left_behind in sockets(&file) {
            fs::remove_file(left_behind)?;
        }
        // Nobody needs this to be done now.
        if let Err(error) = sweep(&directory) {
            log::debug!("{}: {error}", directory.display());
        }
        Ok(Self { directory, file })
    }

    /// Where its control socket belongs: beside the file.
    pub fn socket(&self) -> PathBuf {
        socket(&self.file, std::process::id())
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // The number is free again once the mount is gone, and the file may be another's by now.
        let removed = lock(&self.directory).and_then(|_lock| {
            let ours = read(&self.file).is_some_and(|state| state["pid"] == std::process::id());
            if ours { fs::remove_file(&self.file) } else { Ok(()) }
        });
        if let Err(error) = removed {
            log::debug!("{}: {error}", self.file.display());
        }
    }
}

/// The process that serves `mount`, if its state is known and it is still there.
pub fn server(mount: &MountEntry) -> Option<OwnedFd> {
    live_state(mount).map(|(_, process)| process)
}

/// The control socket of `mount`, if the process that serves it is still there.
pub fn control_socket(mount: &MountEntry) -> Option<PathBuf> {
    live_state(mount).map(|(socket, _)| socket)
}

/// The control socket of `mount`, and the process that serves it.
fn live_state(mount: &MountEntry) -> Option<(PathBuf, OwnedFd)> {
    let owner = mount.owner().unwrap_or_else(|| geteuid().as_raw());
    let own = directories(geteuid().as_raw());
    let places = own.into_iter().chain(directories(owner));
    places.map(|directory| directory.join(file_name(mount))).find_map(|file| {
        // What somebody else says about a mount is worth nothing.
        let writer = file.symlink_metadata().ok().filter(fs::Metadata::is_file)?.uid();
        if writer != owner && writer != geteuid().as_raw() {
            return None;
        }
        let state = read(&file)?;
        let pid = pid(&state)?;
        // Once it is held, its number can't become another's.
        let process = open_process(pid)?;
        (start_time(pid)? == state["start-time"].as_u64()?).then(|| (socket(&file, pid), process))
    })
}

/// The number of the process that wrote `state`.
fn pid(state: &Value) -> Option<u32> {
    u32::try_from(state["pid"].as_u64()?).ok()
}

/// Whether it is certain that there is no process of that number, or that it is another than the one that started then.
fn has_ended(pid: u32, start: Option<u64>) -> bool {
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return false;
    };
    // One whose parent has not asked for its end yet keeps its number, and all that it had is given back.
    test_kill_process(number) == Err(Errno::SRCH)
        || stat(pid).is_some_and(|stat| stat.starts_with(['Z', 'X']))
        || start.is_some_and(|start| start_time(pid).is_some_and(|now| now != start))
}

/// Whether there is certainly no server at `socket`. A process in another container has no number here, and lives.
fn nobody_listens(socket: &Path) -> bool {
    let connected = UnixStream::connect(socket);
    connected.is_err_and(|error| {
        matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
    })
}

/// Takes away what processes that were killed have left in `directory`, whatever numbers their mounts had. Whoever is
/// about to write something there waits for the lock, which the caller holds; what he then writes is of a live process.
fn sweep(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let left_behind = match name.rsplit_once('.') {
            // What nobody could have written here is nothing of ours.
            Some((_, "json")) => read(&path).is_some_and(|state| {
                pid(&state).is_some_and(|pid| has_ended(pid, state["start-time"].as_u64()))
                    && sockets(&path).iter().all(|socket| nobody_listens(socket))
            }),
            Some((stem, "sock")) => stem
                .rsplit_once('-')
                .and_then(|(_, pid)| pid.parse().ok())
                .is_some_and(|pid| has_ended(pid, None) && nobody_listens(&path)),
            // Its writer would hold the lock.
            Some((pid, "new")) => pid.parse::<u32>().is_ok(),
            _ => false,
        };
        if left_behind {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// The process of that number, to wait for.
pub fn open_process(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Where user `uid` keeps such files, the best place first.
fn directories(uid: u32) -> Vec<PathBuf> {
    let mut parents = Vec::new();
    if uid == 0 {
        parents.push(PathBuf::from("/run"));
    }
    if uid == geteuid().as_raw() {
        let named = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        parents.extend(named.filter(|directory| directory.is_absolute()));
    }
    parents.push(Path::new("/run/user").join(uid.to_string()));
    parents.into_iter().map(|parent| parent.join("qchainfs")).collect()
}

/// `0-41.json` for the device 0:41.
fn file_name(mount: &MountEntry) -> String {
    format!("{}.json", mount.device.replace(':', "-"))
}

/// The socket of process `pid` beside the state `file`. A process that is about to end, its mount gone, must not take away that of
/// another, which has got the same number.
fn socket(file: &Path, pid: u32) -> PathBuf {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    file.with_file_name(format!("{stem}-{pid}.sock"))
}

/// All sockets beside the state `file` that belong to its mount or to one that had its number before.
fn sockets(file: &Path) -> Vec<PathBuf> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let of_ours = |name: &str| {
        let pid =
            name.strip_prefix(&format!("{stem}-")).and_then(|rest| rest.strip_suffix(".sock"));
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok())
    };
    let entries = file.parent().and_then(|directory| fs::read_dir(directory).ok());
    let entries = entries.into_iter().flatten().flatten();
    let sockets = entries.filter(|entry| entry.file_name().to_str().is_some_and(of_ours));
    sockets.map(|entry| entry.path()).collect()
}

fn read(file: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

/// Keeps other processes from changing what is in `directory` until the result is dropped.
fn lock(directory: &Path) -> io::Result<File> {
    let opened = File::open(directory)?;
    opened.lock()?;
    Ok(opened)
}

/// When the process started, in the kernel's ticks since boot.
fn start_time(pid: u32) -> Option<u64> {
    // Field 22.
    stat(pid)?.split_whitespace().nth(19)?.parse().ok()
}

/// What the kernel says of the process, from field 3 on: its state.
fn stat(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, may hold anything, parentheses and spaces included.
    let (_, behind_name) = stat.rsplit_once(')')?;
    Some(behind_name.trim_start().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn mount(device: &str) -> MountEntry {
        MountEntry {
            device: device.into(),
            source: "/a.qcow2".into(),
            mountpoint: "/mnt".into(),
            kind: "fuse.qchainfs".into(),
            options: format!("rw,user_id={},group_id=0", geteuid()),
        }
    }

    #[test]
    fn the_state_of_a_mount_goes_with_it() {
        let temp = tempfile::tempdir().unwrap();
        let state = State::publish_in(temp.path().join("new"), &mount("0:41")).unwrap();
        let file = temp.path().join("new/0-41.json");
        assert_eq!(read(&file).unwrap()["pid"], std::process::id());
        drop(state);
        assert!(!file.exists());
        assert_eq!(fs::read_dir(temp.path().join("new")).unwrap().count(), 0);
    }

    #[test]
    fn the_state_that_another_process_has_written_meanwhile_stays() {
        let temp = tempfile::tempdir().unwrap();
        let state = State::publish_in(temp.path().into(), &mount("0:41")).unwrap();
        let file = temp.path().join("0-41.json");
        fs::write(&file, "{\"pid\": 1}").unwrap();
        drop(state);
        assert!(file.exists());
    }

    #[test]
    fn sockets_of_mounts_that_had_the_number_before_are_taken_away_and_no_others() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["0-41-7.sock", "0-4-7.sock", "0-41-x.sock", "0-41.json.sock"] {
            fs::write(temp.path().join(name), "").unwrap();
        }
        let state = State::publish_in(temp.path().into(), &mount("0:41")).unwrap();
        assert!(!temp.path().join("0-41-7.sock").exists());
        assert_ne!(state.socket(), temp.path().join("0-41-7.sock"));
        drop(state);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 3);
    }

    #[test]
    fn what_killed_processes_have_left_is_taken_away_by_the_next_mount_whatever_its_number() {
        let temp = tempfile::tempdir().unwrap();
        let gone = {
            let mut child = std::process::Command::new("true").spawn().unwrap();
            child.wait().unwrap();
            child.id()
        };
        // Killed, and nobody has asked for its end.
        let mut unasked = std::process::Command::new("true").spawn().unwrap();
        let zombie = unasked.id();
        let started_then = start_time(zombie).unwrap();
        while !stat(zombie).unwrap().starts_with('Z') {
            std::thread::yield_now();
        }
        let own = std::process::id();
        let state = |pid: u32, start: u64| json!({"pid": pid, "start-time": start}).to_string();
        let started = start_time(own).unwrap();
        let left_behind = [
            ("0-42.json".to_owned(), state(gone, 1)),
            // Its number has become another process's.
            ("0-43.json".to_owned(), state(own, started + 1)),
            ("0-47.json".to_owned(), state(zombie, started_then)),
            (format!("0-47-{zombie}.sock"), String::new()),
            (format!("0-42-{gone}.sock"), String::new()),
            (format!("0-50-{gone}.sock"), String::new()),
            (format!("{gone}.new"), "{".to_owned()),
        ];
        let kept = [
            ("0-44.json".to_owned(), state(own, started)),
            (format!("0-44-{own}.sock"), String::new()),
            ("0-48.json".to_owned(), state(gone, 1)),
            ("0-45.json".to_owned(), "{".to_owned()),
            ("0-46.json".to_owned(), "{}".to_owned()),
            ("x.sock".to_owned(), String::new()),
            ("somebody.new".to_owned(), String::new()),
        ];
        for (name, text) in left_behind.iter().chain(&kept) {
            fs::write(temp.path().join(name), text).unwrap();
        }
        // A process that is only not seen from here has one.
        let name = format!("0-48-{gone}.sock");
        let _listener = UnixListener::bind(temp.path().join(&name)).unwrap();
        let _state = State::publish_in(temp.path().into(), &mount("0:41")).unwrap();
        assert!(temp.path().join(name).exists());
        for (name, _) in &left_behind {
            assert!(!temp.path().join(name).exists(), "{name} is still there");
        }
        for (name, _) in &kept {
            assert!(temp.path().join(name).exists(), "{name} was taken away");
        }
        unasked.wait().unwrap();
    }

    #[test]
    fn a_process_has_a_start_time() {
        assert!(start_time(std::process::id()).is_some_and(|time| time > 0));
        assert_eq!(start_time(u32::MAX), None);
    }
}
