//! Files that share the same bytes on the host's disk until one of them is written.
#![allow(unsafe_code, reason = "a request to the kernel that no library has, with its reason")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::units::HostOffset;

/// What FICLONERANGE is told.
#[repr(C)]
struct CloneRange {
    source: i64,
    source_offset: u64,
    len: u64,
    target_offset: u64,
}

mod request {
    nix::ioctl_write_ptr!(clone_range, 0x94, 13, super::CloneRange);
}

/// Lets `target` have the bytes of `range` of `source` from `at` on, without copying them.
pub fn share(source: &File, range: Range<u64>, target: &File, at: HostOffset) -> io::Result<()> {
    let arguments = CloneRange {
        source: source.as_raw_fd().into(),
        source_offset: range.start,
        len: range.end - range.start,
        target_offset: at.get(),
    };
    // SAFETY: both descriptors are open as long as the borrowed files live, and the kernel only reads the structure, which
    // has the fields that it expects.
    unsafe { request::clone_range(target.as_raw_fd(), &raw const arguments) }?;
    Ok(())
}

/// Whether an error says that these files can't share these bytes, rather than that something went wrong.
pub fn cannot_share(errno: i32) -> bool {
    [libc::EXDEV, libc::EOPNOTSUPP, libc::EINVAL, libc::ENOTTY, libc::ENOSYS, libc::EPERM]
        .contains(&errno)
}
