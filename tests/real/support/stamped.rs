//! fio writes blocks that say which write they are of, and its log says in which order it wrote them: by both, what is found
//! on a disk is one moment of it, or it is not.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::index;
use super::random::Random;
use super::tools::start;
use super::watchdog::wait_until;

/// Bytes of a block: each has a header of fio's.
pub const BLOCK: u64 = 4096;
/// Bytes of that header, and of the checksum of the rest behind it.
const HEADER: usize = 40;
const CHECKSUM: usize = 4;
/// What every header begins with.
const MAGIC: u16 = 0xacca;

/// The write that a block is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Which run of fio.
    pub run: u32,
    /// Which of its writes.
    pub number: usize,
}

/// The stamps of all blocks of a disk; panics for a block that is not one of fio's, for another place, or of two halves.
#[track_caller]
pub fn stamps(what: &str, bytes: &[u8]) -> Vec<Stamp> {
    let (blocks, []) = bytes.as_chunks::<{ BLOCK as usize }>() else {
        panic!("{what} has {} bytes", bytes.len());
    };
    let mut at = 0;
    let stamp = |block: &[u8; BLOCK as usize]| {
        let header: &[u8; HEADER] = block.first_chunk().expect("a header");
        let number = |place: Range<usize>| {
            header[place].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
        };
        assert_eq!(number(0..2), u64::from(MAGIC), "{what}: the block at {at} is not fio's");
        assert_eq!(number(4..8), BLOCK, "{what}: the block at {at}");
        assert_eq!(number(16..24), at, "{what}: the block at {at} is another one");
        let checksum = u64::from(crc32c(&header[..HEADER - 4]));
        assert_eq!(number(36..40), checksum, "{what}: the header at {at}");
        let data = &block[HEADER + CHECKSUM..];
        let checksum = u32::from_le_bytes(*block[HEADER..].first_chunk().expect("a checksum"));
        assert_eq!(checksum, crc32c(data), "{what}: the data at {at}");
        at += BLOCK;
        let run = u32::from_be_bytes(*data.first_chunk().expect("a pattern"));
        Stamp { run, number: index(number(34..36)) }
    };
    blocks.iter().map(stamp).collect()
}

/// CRC-32C as fio stores it, without the last inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    static TABLE: std::sync::LazyLock<[u32; 256]> = std::sync::LazyLock::new(|| {
        let step = |sum: u32| if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 };
        std::array::from_fn(|byte| (0..8).fold(byte as u32, |sum, _| step(sum)))
    });
    bytes.iter().fold(u32::MAX, |sum, &byte| sum >> 8 ^ TABLE[(sum as u8 ^ byte) as usize])
}

/// How a run of fio goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Every block once, in their order.
    EachOnce,
    /// So many writes at random, and then a sync.
    Writes(u64),
    /// Writes at random until the disk is gone, with a sync after so many.
    UntilTheEnd { sync_after: u64 },
}

/// A fio that writes.
pub struct Fio {
    child: Child,
    log: PathBuf,
    run: u32,
    blocks: Range<usize>,
}

impl Fio {
    /// Starts one that writes `blocks` of `disk`. Its log goes into `dir`, and no other one has the same number.
    #[track_caller]
    pub fn start(
        disk: &Path,
        dir: &Path,
        number: u32,
        blocks: Range<usize>,
        extent: Extent,
        random: &mut Random,
    ) -> Self {
        let run = 0x5100_0000 | number;
        let log = dir.join(format!("fio-{number}.log"));
        let mut fio = Command::new("fio");
        fio.args(["--name=stamped", "--ioengine=psync", "--thread", "--allow_file_create=0"]);
        fio.args(["--verify=crc32c", "--do_verify=0", "--verify_state_save=0", "--randrepeat=0"]);
        fio.args([format!("--verify_interval={BLOCK}"), format!("--verify_pattern={run:#x}")]);
        let (from, len) = (blocks.start as u64 * BLOCK, blocks.len() as u64 * BLOCK);
        fio.args([format!("--offset={from}"), format!("--size={len}")]);
        fio.args([format!("--randseed={}", random.below(1 << 30))]);
        if extent == Extent::EachOnce {
            fio.args(["--rw=write", "--bs=64k", "--end_fsync=1"]);
        } else {
            fio.args(["--rw=randwrite", "--norandommap", "--bsrange=4k-128k", "--blockalign=4k"]);
            fio.arg(format!("--direct={}", random.below(2)));
        }
        match extent {
            Extent::EachOnce => {}
            Extent::Writes(count) => {
                fio.args([format!("--number_ios={count}"), "--end_fsync=1".to_owned()]);
            }
            Extent::UntilTheEnd { sync_after } => {
                fio.args(["--time_based", "--runtime=100"]).arg(format!("--fsync={sync_after}"));
            }
        }
        fio.arg("--write_iolog").arg(&log).arg("--filename").arg(disk);
        let child = start(fio.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()));
        Self { child, log, run, blocks }
    }

    /// Waits until it has written something.
    #[track_caller]
    pub fn writes(&self) {
        let counts = format!("/proc/{}/io", self.child.id());
        wait_until("fio writes", || {
            let counts = fs::read_to_string(&counts).unwrap_or_default();
            let written = counts.lines().find_map(|line| line.strip_prefix("wchar: "));
            written.is_some_and(|bytes| bytes.parse().unwrap_or(0) > 1 << 20)
        });
    }

    /// Waits for its end, and tells what it has written.
    #[track_caller]
    pub fn end(mut self) -> Written {
        let completed = self.child.wait().expect("wait for fio").success();
        // It writes none if the disk is gone before it begins.
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        assert!(!completed || !log.is_empty(), "fio wrote no log");
        let mut written = Written {
            completed,
            run: self.run,
            all: self.blocks.clone(),
            writes: Vec::new(),
            synced: 0,
        };
        let mut synced = 0;
        for line in log.lines() {
            let words: Vec<_> = line.split(' ').collect();
            match words[..] {
                [_, _, "write", offset, len] => {
                    // A write that follows a sync says that the sync was done.
                    written.synced = synced;
                    let number = |word: &str| index(word.parse::<u64>().expect("a number") / BLOCK);
                    let first = number(offset);
                    written.writes.push(first..first + number(len));
                }
                [_, _, "sync" | "datasync", ..] => synced = written.writes.len(),
                _ => {}
            }
        }
        if completed {
            written.synced = written.writes.len();
        }
        assert!(written.writes.len() < 1 << 16, "the numbers of its writes begin anew");
        written
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a run of fio has written.
#[derive(Debug)]
pub struct Written {
    /// It came to its end, and all of it is synced.
    pub completed: bool,
    run: u32,
    all: Range<usize>,
    /// The blocks of each write.
    writes: Vec<Range<usize>>,
    /// So many of them were synced.
    synced: usize,
}

impl Written {
    /// The last of the first `count` writes that wrote `block`.
    fn last(&self, count: usize, block: usize) -> Option<Stamp> {
        let number = self.writes[..count].iter().rposition(|write| write.contains(&block))?;
        Some(Stamp { run: self.run, number })
    }

    /// The number of writes that `found` knows of.
    fn count_in(&self, found: &[Stamp]) -> usize {
        let ours = self.all.clone().map(|block| found[block]).filter(|found| found.run == self.run);
        ours.map(|found| found.number + 1).max().unwrap_or(0)
    }

    /// Panics unless `found` is what `before` became by the first so many writes, of which the last may have been under way.
    /// Gives their number.
    #[track_caller]
    pub fn is_one_moment(&self, what: &str, before: &[Stamp], found: &[Stamp]) -> usize {
        let count = self.count_in(found);
        for block in self.all.clone() {
            let newest = self.last(count, block);
            let older = self.last(count.saturating_sub(1), block).unwrap_or(before[block]);
            assert!(
                found[block] == older || Some(found[block]) == newest,
                "{what}: of {count} writes, block {block} has {:?} rather than {older:?} or {newest:?}",
                found[block]
            );
        }
        count
    }

    /// Panics unless `found` has all that was synced, or what was written there later.
    #[track_caller]
    pub fn kept_what_was_synced(&self, what: &str, before: &[Stamp], found: &[Stamp]) {
        for block in self.all.clone() {
            let synced = self.last(self.synced, block);
            let stamp = found[block];
            let is_old = stamp == synced.unwrap_or(before[block]);
            let is_newer = stamp.run == self.run
                && synced.is_none_or(|synced| stamp.number > synced.number)
                && self.writes.get(stamp.number).is_some_and(|write| write.contains(&block));
            assert!(
                is_old || is_newer,
                "{what}: block {block} has {stamp:?}, {synced:?} was synced"
            );
        }
    }

    /// Does to `disk` what all the writes did.
    pub fn apply_to(&self, disk: &mut [Stamp]) {
        for (number, write) in self.writes.iter().enumerate() {
            disk[write.clone()].fill(Stamp { run: self.run, number });
        }
    }
}
