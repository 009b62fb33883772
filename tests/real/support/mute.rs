//! A mount that looks like one of ours, and whose process ends while a request waits for its answer.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::mounted::mount_line;
use super::tools::need_mounting;
use super::watchdog::{LIMIT, Watchdog};

/// What the kernel asks for, by the numbers of its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Attributes,
    Open,
    Sync,
    Init,
    Other,
}

impl Request {
    fn from_number(number: u32) -> Self {
        match number {
            3 => Self::Attributes,
            14 => Self::Open,
            20 => Self::Sync,
            26 => Self::Init,
            _ => Self::Other,
        }
    }

    /// The least of an answer that the kernel takes for one.
    fn answer(self) -> Vec<u8> {
        match self {
            // Version 7.31, and the least that can be written at once.
            Self::Init => numbers(16, &[(0, 7), (1, 31), (5, 4096)]),
            // For no time at all: a regular file, with one name.
            Self::Attributes => numbers(26, &[(4, 1), (19, 0o100_644), (20, 1)]),
            Self::Open => numbers(4, &[]),
            Self::Sync | Self::Other => Vec::new(),
        }
    }
}

/// So many 32-bit numbers, all zero but these.
fn numbers(count: usize, given: &[(usize, u32)]) -> Vec<u8> {
    let mut numbers = vec![0_u32; count];
    given.iter().for_each(|&(at, number)| numbers[at] = number);
    numbers.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// A mount on a file of its own.
pub struct Mute {
    file: PathBuf,
    connection: Option<File>,
    _watchdog: Watchdog,
    _dir: TempDir,
}

impl Mute {
    #[track_caller]
    pub fn mount() -> Self {
        need_mounting();
        let dir = TempDir::with_prefix("qchainfs-mute-").expect("make a directory");
        let file = dir.path().join("disk");
        fs::write(&file, "underneath").expect("make a mountpoint");
        let rescue = file.clone();
        let watchdog = Watchdog::start("a mute mount".into(), LIMIT, move || {
            let _ = umount2(&rescue, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        });
        let connection = File::options().read(true).write(true).open("/dev/fuse").expect("open");
        let data = format!("fd={},rootmode=100000,user_id=0,group_id=0", connection.as_raw_fd());
        let (source, kind) = (Some("mute.qcow2"), Some("fuse.qchainfs"));
        mount(source, &file, kind, MsFlags::MS_NOSUID, Some(data.as_str())).expect("mount");
        Self { file, connection: Some(connection), _watchdog: watchdog, _dir: dir }
    }

    /// The mountpoint.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// Answers until such a request comes, and ends without an answer to that one.
    #[track_caller]
    pub fn end_at(&mut self, last: Request) {
        let mut connection = self.connection.take().expect("it ends once");
        let mut request = vec![0; 1 << 16];
        loop {
            let len = connection.read(&mut request).expect("read a request");
            assert!(len >= 40, "a request has a header");
            let number = u32::from_ne_bytes(request[4..8].try_into().expect("four bytes"));
            let asked = Request::from_number(number);
            if asked == last {
                return;
            }
            let answer = asked.answer();
            // Of what else there may be, nothing is known here.
            let error = if asked == Request::Other { -libc::ENOSYS } else { 0 };
            let len = u32::try_from(16 + answer.len()).expect("a short answer");
            let head = [&len.to_ne_bytes()[..], &error.to_ne_bytes(), &request[8..16]].concat();
            connection.write_all(&[head, answer].concat()).expect("answer");
        }
    }

    pub fn is_mounted(&self) -> bool {
        mount_line(&self.file).is_some()
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        self.connection.take();
        while self.is_mounted() && umount2(&self.file, MntFlags::MNT_DETACH).is_ok() {}
    }
}
