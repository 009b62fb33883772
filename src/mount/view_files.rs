//! What a view is as files: its disk, its partitions, how much of it is allocated.

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::partitions::{self, Partition};
use crate::chain::View;
use crate::error::Result;
use crate::units::{GuestOffset, GuestRange};

/// A view with what has been found out about it.
pub struct ViewFiles {
    /// The view.
    pub view: View,
    /// Its address below the mountpoint's image: "", "[1]", "[1]@one".
    pub address: String,
    partitions: Mutex<Option<Found<Vec<Partition>>>>,
    allocated: Mutex<HashMap<(u64, u64), Found<u64>>>,
}

/// Something found out by looking through a view.
struct Found<T> {
    value: T,
    /// The changes that the view had seen.
    changes: u64,
    at: Instant,
    took: Duration,
}

impl ViewFiles {
    pub fn new(view: View, address: String) -> Self {
        Self { view, address, partitions: Mutex::new(None), allocated: Mutex::new(HashMap::new()) }
    }

    /// The partitions, as the view's table has them now.
    ///
    /// `writes` grows with every write to the view.
    pub fn partitions(&self, writes: u64) -> Vec<Partition> {
        let mut slot = self.partitions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = slot.as_ref().filter(|found| found.changes == writes) {
            return found.value.clone();
        }
        let disk = Reader { view: &self.view, at: 0 };
        let found = slot.insert(Found::find(writes, || partitions::find(disk, self.view.size())));
        found.value.clone()
    }

    /// Bytes of `range` that are allocated and not known to be zero.
    ///
    /// On a view that is being written the answer may be a moment old where finding it out takes long.
    ///
    /// # Errors
    /// As [`View::allocated`].
    pub fn allocated(&self, range: GuestRange) -> Result<u64> {
        let key = (range.start.get(), range.len);
        let changes = self.view.generation();
        let mut known = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.get(&key).filter(|found| found.is_good_enough(changes)) {
            return Ok(found.value);
        }
        let Found { value, at, took, .. } = Found::find(changes, || self.view.allocated(range));
        let value = value?;
        known.insert(key, Found { value, changes, at, took });
        Ok(value)
    }
}

impl<T> Found<T> {
    fn find(changes: u64, find: impl FnOnce() -> T) -> Self {
        let started = Instant::now();
        let value = find();
        let at = Instant::now();
        Self { value, changes, at, took: at - started }
    }

    /// Looking again costs at most a tenth of the time, however often somebody asks.
    fn is_good_enough(&self, changes: u64) -> bool {
        self.changes == changes || self.at.elapsed() < self.took * 10
    }
}

/// A view as a file with a cursor.
struct Reader<'a> {
    view: &'a View,
    at: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.view.size().saturating_sub(self.at).min(buf.len() as u64) as usize;
        let read = self.view.read(GuestOffset::new(self.at), &mut buf[..len]);
        read.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.view.size().checked_add_signed(by),
        };
        self.at = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
