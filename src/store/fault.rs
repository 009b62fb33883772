//! A store that fails on purpose and forgets what was not synced, for tests.

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Store;
use super::memory::MemoryStore;
use crate::units::HostOffset;

/// Wraps a [`MemoryStore`]: counts the changing operations, fails from a chosen one on, and can show what a power
/// cut would leave.
pub struct FaultStore {
    live: MemoryStore,
    /// What was on stable storage at the last sync, and the changes since.
    durable: Mutex<Durable>,
    changes: AtomicU64,
    fail_from: AtomicU64,
    fail_until: AtomicU64,
}

#[derive(Clone)]
struct Durable {
    synced: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    SetLen(u64),
    Punch { offset: u64, len: u64 },
}

/// Which of the changes since the last sync a power cut keeps.
#[derive(Debug, Clone, Copy)]
pub enum Survivors {
    /// None of them.
    Nothing,
    /// All of them.
    All,
    /// Those whose bit in a pseudo-random sequence from this seed is set.
    Some(u64),
}

impl FaultStore {
    /// A store that holds `bytes`, all of it durable, and does not fail yet.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            live: MemoryStore::new(bytes.clone()),
            durable: Mutex::new(Durable { synced: bytes, pending: Vec::new() }),
            changes: AtomicU64::new(0),
            fail_from: AtomicU64::new(u64::MAX),
            fail_until: AtomicU64::new(u64::MAX),
        }
    }

    /// How many changing operations (writes, syncs, length changes, punched holes) were asked for.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    /// Lets the changing operations with these numbers, counted from 0, fail with EIO.
    pub fn fail(&self, numbers: Range<u64>) {
        self.fail_from.store(numbers.start, Ordering::SeqCst);
        self.fail_until.store(numbers.end, Ordering::SeqCst);
    }

    /// What the file holds after a power cut now.
    pub fn after_power_cut(&self, survivors: Survivors) -> Vec<u8> {
        let durable = self.durable.lock().expect("no test panics with the lock held").clone();
        let image = MemoryStore::new(durable.synced);
        let mut state = match survivors {
            Survivors::Some(seed) => seed | 1,
            _ => 1,
        };
        for change in durable.pending {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let keep = match survivors {
                Survivors::Nothing => false,
                Survivors::All => true,
                Survivors::Some(_) => state >> 63 == 1,
            };
            if keep {
                change.apply(&image).expect("memory does not fail");
            }
        }
        image.bytes()
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let number = self.changes.fetch_add(1, Ordering::SeqCst);
        let failing = self.fail_from.load(Ordering::SeqCst)..self.fail_until.load(Ordering::SeqCst);
        if failing.contains(&number) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut durable = self.durable.lock().expect("no test panics with the lock held");
        change.apply(&self.live)?;
        durable.pending.push(change);
        Ok(())
    }
}

impl Change {
    fn apply(&self, store: &MemoryStore) -> io::Result<()> {
        match self {
            Self::Write { offset, bytes } => store.write_at(&[bytes], HostOffset::new(*offset)),
            Self::SetLen(len) => store.set_len(*len),
            Self::Punch { offset, len } => store.punch_hole(HostOffset::new(*offset), *len),
        }
    }
}

impl Store for FaultStore {
    fn len(&self) -> io::Result<u64> {
        self.live.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        self.live.read_at(buf, offset)
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        self.change(Change::Write { offset: offset.get(), bytes: pieces.concat() })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len))
    }

    fn sync(&self) -> io::Result<()> {
        let number = self.changes.fetch_add(1, Ordering::SeqCst);
        let failing = self.fail_from.load(Ordering::SeqCst)..self.fail_until.load(Ordering::SeqCst);
        if failing.contains(&number) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut durable = self.durable.lock().expect("no test panics with the lock held");
        durable.synced = self.live.bytes();
        durable.pending.clear();
        Ok(())
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        self.change(Change::Punch { offset: offset.get(), len })
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        self.live.next_data(from)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.live.allocated()
    }
}
