//! Large writes on their way to the disk before somebody waits for them.
//!
//! The kernel keeps what was written in memory for many seconds, so that a sync after a long write finds all of it still to be
//! done. Here a thread asks the kernel to begin at once. It is a wish only: nothing is promised by it, no order and no
//! durability, and where it can't be fulfilled nobody is told.
#![allow(unsafe_code, reason = "a request to the kernel that no library has, with its reason")]

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Writes of fewer bytes are often repeated soon, and are better left to the kernel.
pub const LARGE: u64 = 256 << 10;
/// Ranges that may wait at once, when the disk is slower than whoever writes. What doesn't fit in is forgotten.
const MOST_RANGES: usize = 16;

/// Who begins to write what one file's writers have left in memory.
pub struct WriteBehind {
    wishes: Arc<Wishes>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Wishes {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ranges: Vec<Range<u64>>,
    end: bool,
}

impl WriteBehind {
    /// For `file`, which must be open for writing. `None` where there is no thread to be had.
    pub fn start(file: &Arc<File>) -> Option<Self> {
        let wishes = Arc::new(Wishes::default());
        let (its_wishes, its_file) = (wishes.clone(), file.clone());
        let work = move || its_wishes.fulfill(&its_file);
        let thread = thread::Builder::new().name("write-behind".into()).spawn(work).ok()?;
        Some(Self { wishes, thread: Some(thread) })
    }

    /// What was written at `range` may go to the disk. Doesn't wait for that.
    pub fn wrote(&self, range: Range<u64>) {
        let mut state = self.wishes.state();
        if let Some(last) = state.ranges.last_mut().filter(|last| last.end == range.start) {
            last.end = range.end;
        } else if state.ranges.len() < MOST_RANGES {
            state.ranges.push(range);
        }
        drop(state);
        self.wishes.changed.notify_one();
    }
}

impl Drop for WriteBehind {
    /// Waits for what has begun: the thread must not keep the file open, and its locks with it, when all others have closed it.
    fn drop(&mut self) {
        self.wishes.state().end = true;
        self.wishes.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It only talks to the kernel, and nothing depends on it.
            let _ = thread.join();
        }
    }
}

impl Wishes {
    fn fulfill(&self, file: &File) {
        loop {
            let mut state = self.state();
            while state.ranges.is_empty() && !state.end {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.end {
                return;
            }
            let ranges = std::mem::take(&mut state.ranges);
            drop(state);
            ranges.into_iter().for_each(|range| begin(file, range));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has the kernel begin to write the pages of `range`. It does not wait for them, so that their errors remain for the next sync.
fn begin(file: &File, range: Range<u64>) {
    let (Ok(start), Ok(len)) = (range.start.try_into(), (range.end - range.start).try_into())
    else {
        return;
    };
    // SAFETY: the descriptor is open as long as the borrowed file lives, and no memory is involved.
    unsafe { libc::sync_file_range(file.as_raw_fd(), start, len, libc::SYNC_FILE_RANGE_WRITE) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn neighbours_become_one_range_and_what_is_too_much_is_forgotten() {
        let behind = WriteBehind { wishes: Arc::default(), thread: None };
        behind.wrote(0..10);
        behind.wrote(10..20);
        behind.wrote(30..40);
        assert_eq!(behind.wishes.state().ranges, [0..20, 30..40]);
        (1..100).for_each(|n| behind.wrote(n * 100..n * 100 + 1));
        assert_eq!(behind.wishes.state().ranges.len(), MOST_RANGES);
    }

    #[test]
    fn the_file_is_closed_when_its_writer_closes_it() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let behind = WriteBehind::start(&file).unwrap();
        for n in 0..20 {
            file.write_all_at(&[1; 1 << 20], n << 20).unwrap();
            behind.wrote(n << 20..(n + 1) << 20);
        }
        drop(behind);
        assert_eq!(Arc::strong_count(&file), 1);
    }
}
