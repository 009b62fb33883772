//! A file that is not open.

use std::io;
use std::ops::Range;

use super::Store;
use crate::units::HostOffset;

/// Stands for a file that was left closed on purpose: every access is an error.
pub struct Absent;

fn not_open<T>() -> io::Result<T> {
    Err(io::Error::other("the file was not opened"))
}

impl Store for Absent {
    fn len(&self) -> io::Result<u64> {
        not_open()
    }

    fn read_at(&self, _buf: &mut [u8], _offset: HostOffset) -> io::Result<()> {
        not_open()
    }

    fn write_at(&self, _pieces: &[&[u8]], _offset: HostOffset) -> io::Result<()> {
        not_open()
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        not_open()
    }

    fn sync(&self) -> io::Result<()> {
        not_open()
    }

    fn punch_hole(&self, _offset: HostOffset, _len: u64) -> io::Result<()> {
        not_open()
    }

    fn reserve(&self, _offset: HostOffset, _len: u64) -> io::Result<()> {
        not_open()
    }

    fn next_data(&self, _from: HostOffset) -> io::Result<Option<Range<u64>>> {
        not_open()
    }

    fn allocated(&self) -> io::Result<u64> {
        not_open()
    }
}
