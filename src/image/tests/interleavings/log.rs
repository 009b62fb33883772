//! Who did what when, and what a reader may see of it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::GuestRange;

pub const SECTOR: u64 = 512;

/// All that was done to a disk. Threads take turns, so that the clock tells who began before whom had ended.
pub struct Log {
    clock: AtomicU64,
    /// What each sector held at the beginning; 0 behind it.
    initial: Vec<u8>,
    writes: Mutex<Vec<Write>>,
    flushes: Mutex<Vec<Span>>,
}

/// A time from its beginning to its end.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub begin: u64,
    pub end: u64,
}

/// Something that gave a byte to each byte of some sectors.
#[derive(Debug, Clone, Copy)]
struct Write {
    range: GuestRange,
    byte: u8,
    span: Span,
}

impl Log {
    /// The log of a disk whose sectors each hold one byte only.
    pub fn new(disk: &[u8]) -> Self {
        let initial = disk.chunks(SECTOR as usize).map(|sector| sector[0]).collect();
        Self {
            clock: AtomicU64::new(1),
            initial,
            writes: Mutex::default(),
            flushes: Mutex::default(),
        }
    }

    /// The next moment.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Does `write`, which gives `byte` to all of `range`.
    pub fn write(&self, range: GuestRange, byte: u8, write: impl FnOnce()) {
        let begin = self.now();
        let number = {
            let mut writes = self.writes.lock().expect("no panic with the log held");
            writes.push(Write { range, byte, span: Span { begin, end: u64::MAX } });
            writes.len() - 1
        };
        write();
        self.writes.lock().expect("no panic with the log held")[number].span.end = self.now();
    }

    /// Does `flush`, after which all is durable that had ended before it.
    pub fn flush(&self, flush: impl FnOnce()) {
        let begin = self.now();
        flush();
        let span = Span { begin, end: self.now() };
        self.flushes.lock().expect("no panic with the log held").push(span);
    }

    /// When somebody looked who sees the disk as a power cut `now` leaves it.
    pub fn cut(&self) -> Span {
        let flushes = self.flushes.lock().expect("no panic with the log held");
        let begin = flushes.iter().map(|flush| flush.begin).max().unwrap_or(0);
        Span { begin, end: self.now() }
    }

    /// Panics unless each sector of `found`, which begins at sector `first`, holds what a look during `span` may see:
    /// the byte of a write that had begun, with no other write wholly between it and the look.
    pub fn assert_allows(&self, first: u64, found: &[u8], span: Span, context: &str) {
        let writes = self.writes.lock().expect("no panic with the log held").clone();
        for (number, sector) in (first..).zip(found.chunks(SECTOR as usize)) {
            let byte = sector[0];
            assert!(sector.iter().all(|one| *one == byte), "{context}: sector {number} is torn");
            let initial = self.initial.get(number as usize).copied().unwrap_or(0);
            let initial = (initial, Span { begin: 0, end: 0 });
            let inside = |write: &&Write| {
                let sectors = write.range.start.get() / SECTOR..write.range.end().get() / SECTOR;
                sectors.contains(&number)
            };
            let here: Vec<(u8, Span)> =
                writes.iter().filter(inside).map(|w| (w.byte, w.span)).collect();
            let overwritten = |by: Span| {
                here.iter().any(|(_, later)| later.begin > by.end && later.end < span.begin)
            };
            let mut possible = here.iter().copied().chain([initial]);
            assert!(
                possible
                    .any(|(b, wrote)| b == byte && wrote.begin < span.end && !overwritten(wrote)),
                "{context}: sector {number} holds {byte:#x} at {span:?}, after {here:?}"
            );
        }
    }
}
