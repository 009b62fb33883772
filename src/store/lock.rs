//! QEMU's image locks: one-byte OFD read locks that say what a process does with an image and what it tolerates.
//!
//! Byte 100+i locked means "I use permission i", byte 200+i locked "I do not share permission i". A lock is
//! taken first and conflicts are looked for afterwards, so that of two processes that start at once at least one sees
//! the other. The locks belong to the open file description and go with its last descriptor.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, fcntl};

use super::FileId;
use crate::error::{Error, OtherUse, Problem, Process, Result};

/// The first byte of the permissions in use.
const USED: i64 = 100;
/// The first byte of the permissions that are not shared.
const UNSHARED: i64 = 200;
/// Permission to read what the guest wrote.
const CONSISTENT_READ: i64 = 0;
/// Permission to write.
const WRITE: i64 = 1;
/// Permission to change the size.
const RESIZE: i64 = 3;

/// What an opener of an image does and tolerates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Reads, and wants no writer: a backing member, or an image mounted read-only.
    Read,
    /// Reads and writes, and wants no other writer: the active layer.
    Write,
}

impl LockMode {
    /// The permissions that the opener uses.
    fn used(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    /// The permissions that the opener grants to nobody else.
    fn unshared(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }
}

/// Takes the locks of `mode` on `file`, or none.
///
/// A file system that has no such locks (some network ones) is used without, as QEMU does.
pub(super) fn take(file: &File, id: FileId, mode: LockMode) -> Result<()> {
    let bytes: Vec<i64> = mode
        .used()
        .iter()
        .map(|permission| USED + permission)
        .chain(mode.unshared().iter().map(|permission| UNSHARED + permission))
        .collect();
    for &byte in &bytes {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => return Err(conflict(file, id, &bytes)),
            Err(errno) => {
                log::warn!("the file system has no image locks ({errno}): going on without");
                return Ok(());
            }
        }
    }
    let refused = mode.used().iter().map(|permission| UNSHARED + permission);
    let disturbing = mode.unshared().iter().map(|permission| USED + permission);
    for byte in refused.chain(disturbing) {
        if held_by_another(file, byte) {
            return Err(conflict(file, id, &bytes));
        }
    }
    Ok(())
}

/// Gives back what only [`LockMode::Write`] has.
pub(super) fn stop_writing(file: &File) {
    let kept = LockMode::Read.used();
    for permission in LockMode::Write.used().iter().filter(|permission| !kept.contains(permission))
    {
        // Without the locks that a file system lacks there is nothing to give back.
        let unlocked =
            fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_UNLCK, USED + permission)));
        if let Err(errno) = unlocked {
            log::debug!("could not give back an image lock: {errno}");
        }
    }
}

/// Gives `taken` back and says who is in the way.
fn conflict(file: &File, id: FileId, taken: &[i64]) -> Error {
    for &byte in taken {
        // Failing to unlock changes nothing for the caller: closing the file does it, too.
        let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_UNLCK, byte)));
    }
    let other =
        if held_by_another(file, USED + WRITE) { OtherUse::Writes } else { OtherUse::Reads };
    Error::new(Problem::Locked { other, holders: holders(id) })
}

/// Whether another open file description holds `byte`.
fn held_by_another(file: &File, byte: i64) -> bool {
    let mut probe = byte_lock(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).is_ok()
        && probe.l_type != libc::F_UNLCK as libc::c_short
}

fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// The other processes that hold image locks on the file, as far as `/proc` lets us see.
///
/// The kernel does not name the owner of an OFD lock; the `fdinfo` of each process lists the locks of its files.
pub fn holders(id: FileId) -> Vec<Process> {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut found: Vec<Process> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&pid| pid != own && holds(pid, id))
        .map(|pid| Process { pid, name: process_name(pid) })
        .collect();
    found.sort_by_key(|process| process.pid);
    found
}

/// Whether process `pid` holds an OFD lock on the file.
fn holds(pid: u32, id: FileId) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        let info = format!("/proc/{pid}/fdinfo/{}", descriptor.file_name().display());
        let text = fs::read_to_string(info).unwrap_or_default();
        // Only then: to look at a file asks its file system, and there are some that never answer.
        text.lines().any(|line| is_lock_on(line, id.inode))
            && fs::metadata(descriptor.path()).is_ok_and(|metadata| {
                metadata.is_file() && (metadata.dev(), metadata.ino()) == (id.device, id.inode)
            })
    })
}

/// Whether a line `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 100` is an OFD lock on a file with that inode number. Its
/// device is not always the one that `stat` says.
fn is_lock_on(line: &str, inode: u64) -> bool {
    line.starts_with("lock:")
        && line.contains("OFDLCK")
        && line.split_whitespace().any(|word| word.ends_with(&format!(":{inode}")))
}

fn process_name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "a process".to_owned(), |name| name.trim_end().to_owned())
}
