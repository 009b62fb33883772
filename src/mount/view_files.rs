//! What a view is as files: its disk, its partitions, how much of it is allocated.

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::partitions::{self, Partition};
use super::twin::Twin;
use crate::chain::View;
use crate::units::{GuestOffset, GuestRange};

/// A view with what has been found out about it.
pub struct ViewFiles {
    /// The view, or what the twin is a twin of.
    original: View,
    twin: Option<Arc<Twin>>,
    /// The view's address below the mountpoint's image: "", "[1]", "[1]@one".
    pub address: String,
    partitions: Mutex<Option<Found<Vec<Partition>>>>,
    allocated: Mutex<HashMap<GuestRange, Found<Option<u64>>>>,
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
        Self {
            original: view,
            twin: None,
            address,
            partitions: Mutex::new(None),
            allocated: Mutex::new(HashMap::new()),
        }
    }

    /// The files of a writable twin of a view.
    pub fn of_twin(original: View, address: String, twin: Arc<Twin>) -> Self {
        Self { twin: Some(twin), ..Self::new(original, address) }
    }

    /// The view as the files show it now.
    pub fn view(&self) -> &View {
        self.twin().and_then(|twin| twin.view()).unwrap_or(&self.original)
    }

    /// The view that the twin is one of; the view itself, where it is none.
    pub fn original(&self) -> &View {
        &self.original
    }

    /// What makes it a twin, if it is one.
    pub fn twin(&self) -> Option<&Arc<Twin>> {
        self.twin.as_ref()
    }

    /// Whether the files can be written.
    pub fn is_writable(&self) -> bool {
        self.twin.is_some() || self.original.is_writable()
    }

    /// The partitions, as the view's table has them now.
    ///
    /// `writes` grows with every write to the view.
    pub fn partitions(&self, writes: u64) -> Vec<Partition> {
        if let Some(found) = &*lock(&self.partitions)
            && found.changes == writes
        {
            return found.value.clone();
        }
        let disk = Reader { view: self.view(), at: 0 };
        let found = Found::find(writes, || partitions::find(disk, self.original.size()));
        let value = found.value.clone();
        let mut known = lock(&self.partitions);
        if found.is_newer_than(known.as_ref()) {
            *known = Some(found);
        }
        value
    }

    /// Bytes of `range` that are allocated and not known to be zero; `None` where a broken table hides it.
    ///
    /// On a view that is being written the answer may be a moment old where finding it out takes long.
    pub fn allocated(&self, range: GuestRange) -> Option<u64> {
        let view = self.view();
        let changes = view.generation();
        if let Some(found) = lock(&self.allocated).get(&range)
            && found.is_good_enough(changes)
        {
            return found.value;
        }
        let found = Found::find(changes, || {
            let counted = view.allocated(range);
            counted.inspect_err(|error| log::error!("count what is allocated: {error}")).ok()
        });
        let value = found.value;
        let mut known = lock(&self.allocated);
        if found.is_newer_than(known.get(&range)) {
            known.insert(range, found);
        }
        value
    }
}

/// Held for a look, never over the reads that find something out: two may well find out the same at once.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Found<T> {
    fn find(changes: u64, find: impl FnOnce() -> T) -> Self {
        let started = Instant::now();
        let value = find();
        let at = Instant::now();
        Self { value, changes, at, took: at - started }
    }

    fn is_newer_than(&self, known: Option<&Self>) -> bool {
        known.is_none_or(|known| known.changes <= self.changes)
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
