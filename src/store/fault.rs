//! A store that fails on purpose and forgets what was not synced, for tests.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::Store;
use super::memory::MemoryStore;
use crate::random::Random;
use crate::units::HostOffset;

/// What a disk writes whole or not at all.
const SECTOR: u64 = 512;

/// What a failed read leaves in the part of its buffer that it has not reached.
const RUBBISH: u8 = 0xbd;

/// Wraps a [`MemoryStore`]: counts the changing operations, or all of them, lets chosen ones fail, and can show what a
/// power cut would leave.
///
/// What fails is done in part: of a write the first half of its sectors, and a read has filled half of its buffer and
/// left rubbish in the rest. A sync that fails has made some of the changes durable, and the others never will be: the
/// kernel forgets that their pages are dirty.
pub struct FaultStore {
    live: MemoryStore,
    /// What was on stable storage at the last sync, and the changes since.
    durable: Mutex<Durable>,
    /// Shared with the stores beside it.
    clock: Arc<Clock>,
    observer: Option<Observer>,
}

/// Counts the operations of stores that fail at the same time.
struct Clock {
    operations: AtomicU64,
    counts_reads: AtomicBool,
    fail_from: AtomicU64,
    fail_until: AtomicU64,
    failed: Mutex<Option<Operation>>,
}

/// Told of each changing operation before it is done and of each read after it, under no lock of the store.
pub type Observer = Box<dyn Fn(&FaultStore, Operation) + Send + Sync>;

/// An operation of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A read.
    Read,
    /// A write, a change of the length, or a punched hole.
    Change,
    /// What was changed becomes durable.
    Sync,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survivors {
    /// None of them.
    Nothing,
    /// All of them.
    All,
    /// Some of them, each whole and in the order in which they were made; the seed says which.
    Some(u64),
    /// Some of their sectors, in any order; the seed says which.
    Torn(u64),
}

impl FaultStore {
    /// A store that holds `bytes`, all of it durable, and does not fail yet.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            live: MemoryStore::new(bytes.clone()),
            durable: Mutex::new(Durable { synced: bytes, pending: Vec::new() }),
            clock: Arc::new(Clock {
                operations: AtomicU64::new(0),
                counts_reads: AtomicBool::new(false),
                fail_from: AtomicU64::new(u64::MAX),
                fail_until: AtomicU64::new(u64::MAX),
                failed: Mutex::new(None),
            }),
            observer: None,
        }
    }

    /// A store that holds `bytes` on the same machine as this one: their operations are counted together.
    pub fn beside(&self, bytes: Vec<u8>) -> Self {
        Self { clock: self.clock.clone(), ..Self::new(bytes) }
    }

    /// As [`Self::new`], with somebody who looks at it before each changing operation.
    pub fn observed(bytes: Vec<u8>, observer: Observer) -> Self {
        Self { observer: Some(observer), ..Self::new(bytes) }
    }

    /// How many operations that count were asked for.
    pub fn operations(&self) -> u64 {
        self.clock.operations.load(Ordering::SeqCst)
    }

    /// From now on reads count and fail like the changing operations.
    pub fn count_reads(&self) {
        self.clock.counts_reads.store(true, Ordering::SeqCst);
    }

    /// The first operation that has failed.
    pub fn failed(&self) -> Option<Operation> {
        *self.lock_failed()
    }

    fn lock_failed(&self) -> MutexGuard<'_, Option<Operation>> {
        self.clock.failed.lock().expect("no test panics with the lock held")
    }

    /// Lets the operations with these numbers, counted from 0, fail with EIO.
    pub fn fail(&self, numbers: Range<u64>) {
        self.clock.fail_from.store(numbers.start, Ordering::SeqCst);
        self.clock.fail_until.store(numbers.end, Ordering::SeqCst);
    }

    /// What the file holds after a power cut now.
    pub fn after_power_cut(&self, survivors: Survivors) -> Vec<u8> {
        let Durable { synced, pending } = self.durable().clone();
        let image = MemoryStore::new(synced);
        let kept = match survivors {
            Survivors::Nothing => Vec::new(),
            Survivors::All => pending,
            Survivors::Some(seed) => some_of(pending, &mut Random::new(seed)),
            Survivors::Torn(seed) => {
                let mut random = Random::new(seed);
                let sectors = pending.iter().flat_map(Change::sectors).collect();
                let mut kept = some_of(sectors, &mut random);
                random.shuffle(&mut kept);
                kept
            }
        };
        kept.iter().for_each(|change| change.apply(&image).expect("memory does not fail"));
        image.bytes()
    }

    fn durable(&self) -> MutexGuard<'_, Durable> {
        self.durable.lock().expect("no test panics with the lock held")
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let begun = self.begin(Operation::Change);
        let change = if begun.is_ok() { Some(change) } else { change.half() };
        if let Some(change) = change {
            let mut durable = self.durable();
            change.apply(&self.live)?;
            durable.pending.push(change);
        }
        begun
    }

    /// Counts and lets fail an operation that reads, if these count.
    fn begin_read(&self) -> io::Result<()> {
        match self.clock.counts_reads.load(Ordering::SeqCst) {
            true => self.count(Operation::Read),
            false => Ok(()),
        }
    }

    fn observe(&self, operation: Operation) {
        if let Some(observer) = &self.observer {
            observer(self, operation);
        }
    }

    fn begin(&self, operation: Operation) -> io::Result<()> {
        self.observe(operation);
        self.count(operation)
    }

    fn count(&self, operation: Operation) -> io::Result<()> {
        let number = self.clock.operations.fetch_add(1, Ordering::SeqCst);
        let failing = self.clock.fail_from.load(Ordering::SeqCst)
            ..self.clock.fail_until.load(Ordering::SeqCst);
        if failing.contains(&number) {
            self.lock_failed().get_or_insert(operation);
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

/// Few, half or most of `changes`: it takes all three to find what goes wrong.
fn some_of(changes: Vec<Change>, random: &mut Random) -> Vec<Change> {
    let eighths = random.pick(&[1, 4, 7]);
    changes.into_iter().filter(|_| random.below(8) < eighths).collect()
}

impl Change {
    fn apply(&self, store: &MemoryStore) -> io::Result<()> {
        match self {
            Self::Write { offset, bytes } => store.write_at(&[bytes], HostOffset::new(*offset)),
            Self::SetLen(len) => store.set_len(*len),
            Self::Punch { offset, len } => store.punch_hole(HostOffset::new(*offset), *len),
        }
    }

    /// What is done of it if it fails: half of a write.
    fn half(&self) -> Option<Self> {
        let Self::Write { offset, bytes } = self else { return None };
        let count = sectors(*offset, bytes.len() as u64).count();
        let done = sectors(*offset, bytes.len() as u64).take(count / 2).last()?;
        let bytes = bytes[..(done.end - offset) as usize].into();
        Some(Self::Write { offset: *offset, bytes })
    }

    /// The parts that reach a disk or don't, each for itself.
    fn sectors(&self) -> Vec<Self> {
        match self {
            Self::SetLen(_) => vec![self.clone()],
            Self::Write { offset, bytes } => {
                let part = |run: Range<u64>| Self::Write {
                    offset: run.start,
                    bytes: bytes[(run.start - offset) as usize..(run.end - offset) as usize].into(),
                };
                sectors(*offset, bytes.len() as u64).map(part).collect()
            }
            Self::Punch { offset, len } => {
                let part = |run: Range<u64>| {
                    let len = run.end - run.start;
                    Self::Punch { offset: run.start, len }
                };
                sectors(*offset, *len).map(part).collect()
            }
        }
    }
}

/// The run of `len` bytes at `offset`, cut at the borders of sectors.
fn sectors(offset: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
    let end = offset + len;
    (offset / SECTOR..end.div_ceil(SECTOR))
        .map(move |sector| (sector * SECTOR).max(offset)..((sector + 1) * SECTOR).min(end))
}

impl Store for FaultStore {
    fn len(&self) -> io::Result<u64> {
        self.begin_read()?;
        self.live.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        self.live.read_at(buf, offset)?;
        if let Err(error) = self.begin_read() {
            let half = buf.len() / 2;
            buf[half..].fill(RUBBISH);
            return Err(error);
        }
        self.observe(Operation::Read);
        Ok(())
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        self.change(Change::Write { offset: offset.get(), bytes: pieces.concat() })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len))
    }

    fn sync(&self) -> io::Result<()> {
        let begun = self.begin(Operation::Sync);
        let mut durable = self.durable();
        let mut kept = std::mem::take(&mut durable.pending);
        if begun.is_err() {
            kept = some_of(kept, &mut Random::new(self.operations()));
        }
        let stable = MemoryStore::new(std::mem::take(&mut durable.synced));
        kept.iter().try_for_each(|change| change.apply(&stable))?;
        durable.synced = stable.into_bytes();
        begun
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        self.change(Change::Punch { offset: offset.get(), len })
    }

    fn reserve(&self, _offset: HostOffset, _len: u64) -> io::Result<()> {
        self.begin(Operation::Change)
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        self.begin_read()?;
        self.live.next_data(from)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.begin_read()?;
        self.live.allocated()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 8 * SECTOR as usize;

    /// Two overlapping writes, which nobody synced.
    fn written() -> FaultStore {
        let store = FaultStore::new(vec![0; SIZE]);
        store.write_at(&[&[1; SIZE]], HostOffset::ZERO).unwrap();
        store.write_at(&[&[2; SIZE - 100]], HostOffset::new(100)).unwrap();
        store
    }

    #[test]
    fn an_unsynced_write_is_torn_and_reordered_at_sectors_only() {
        let mut seen = [[false; 3]; 8];
        for seed in 0..50 {
            let bytes = written().after_power_cut(Survivors::Torn(seed));
            for (number, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                let rest = if number == 0 { &sector[100..] } else { sector };
                assert!(rest.iter().all(|byte| *byte == rest[0]), "torn inside a sector");
                seen[number][usize::from(rest[0])] = true;
            }
        }
        assert_eq!(seen, [[true; 3]; 8], "not every write was dropped, kept and overtaken");
    }

    #[test]
    fn what_fails_is_done_in_part_and_reads_fail_only_where_they_count() {
        let store = FaultStore::new(vec![1; SIZE]);
        store.fail(0..2);
        let mut buf = [0; SIZE];
        store.read_at(&mut buf, HostOffset::ZERO).unwrap();
        assert!(store.write_at(&[&[2; SIZE]], HostOffset::ZERO).is_err());
        store.count_reads();
        assert!(store.read_at(&mut buf, HostOffset::ZERO).is_err());
        assert_eq!((store.operations(), store.failed()), (2, Some(Operation::Change)));
        assert_eq!(buf, [[2; SIZE / 2], [RUBBISH; SIZE / 2]].concat()[..]);
        store.read_at(&mut buf, HostOffset::ZERO).unwrap();
        assert_eq!(buf, [[2; SIZE / 2], [1; SIZE / 2]].concat()[..]);
    }

    #[test]
    fn what_a_failed_sync_has_lost_no_later_one_brings_back() {
        let mut kept = [false; 2];
        for before in 0..20 {
            let store = FaultStore::new(vec![0; 2 * SIZE]);
            (0..before).for_each(|_| store.sync().unwrap());
            store.write_at(&[&[1; SIZE]], HostOffset::ZERO).unwrap();
            let next = store.operations();
            store.fail(next..next + 1);
            assert!(store.sync().is_err());
            store.write_at(&[&[2; SIZE]], HostOffset::new(SIZE as u64)).unwrap();
            store.sync().unwrap();
            let bytes = store.after_power_cut(Survivors::All);
            assert_eq!(bytes[SIZE..], [2; SIZE]);
            kept[usize::from(bytes[0])] = true;
        }
        assert_eq!(kept, [true; 2], "what was not synced was always kept, or never");
    }

    #[test]
    fn what_was_synced_survives_every_cut() {
        let store = written();
        store.sync().unwrap();
        for survivors in [Survivors::Nothing, Survivors::Some(1), Survivors::Torn(1)] {
            assert_eq!(store.after_power_cut(survivors), store.live.bytes());
        }
    }
}
