//! The image floor on stores in memory: against a model, with failing stores, with power cuts.

mod checker;
mod checking;
mod concurrent;
mod failing;
mod failing_repairs;
mod failing_upkeep;
mod failing_writes;
mod failures;
mod history;
mod huge;
#[cfg(feature = "interleavings")]
mod interleavings;
mod kind_cuts;
mod kinds;
mod long_cuts;
mod model;
mod overlay_cuts;
mod power_cuts;
mod qemu;
mod regressions;
mod repairing;
mod resizing;
mod snapshot_beside_writers;
mod snapshot_cuts;
mod snapshots;
mod stale_pages;
mod upkeep;
pub(crate) mod waiting;

use std::sync::Arc;

use self::checker::Findings;
use super::check::{self, Finding, Report, Stage};
use super::{
    Below, Content, CreateOptions, Image, NewImage, Nothing, SnapshotTree, Tree, Writability,
    ZeroMode,
};
use crate::error::Result;
use crate::qcow2::{Geometry, L2Form, Version};
use crate::random::Random;
use crate::store::Store;
use crate::store::memory::MemoryStore;
use crate::units::{GuestOffset, GuestRange};

/// A backing file that holds a pattern with holes.
struct Pattern {
    len: u64,
}

/// Bytes of the pattern from one hole to the next.
const PATTERN_STRIPE: u64 = 3000;

impl Pattern {
    fn byte(&self, at: u64) -> u8 {
        let in_hole = at / PATTERN_STRIPE % 2 == 1;
        if at >= self.len || in_hole { 0 } else { (at % 251) as u8 | 1 }
    }
}

impl Below for Pattern {
    fn read(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        for (at, byte) in (offset.get()..).zip(buf) {
            *byte = self.byte(at);
        }
        Ok(())
    }

    fn is_zero(&self, range: GuestRange) -> Result<bool> {
        Ok((range.start.get()..range.end().get()).all(|at| self.byte(at) == 0))
    }
}

/// One kind of image.
#[derive(Debug, Clone, Copy)]
struct Shape {
    version: Version,
    cluster_bits: u32,
    refcount_order: u32,
    l2_form: L2Form,
    size: u64,
    backing_len: u64,
}

impl Shape {
    /// Any kind, but small.
    fn random(random: &mut Random) -> Self {
        let cluster_bits = random.pick(&[9, 9, 10, 12, 14, 16]);
        let (version, refcount_order) = match random.below(3) {
            0 => (Version::V2, 4),
            _ => (Version::V3, random.below(7) as u32),
        };
        let most = if cluster_bits < 13 { 300 } else { 2000 };
        let size = 512 * (1 + random.below(most));
        let backing_len = random.pick(&[0, 1, 2]) * random.below(size);
        let extended = version == Version::V3 && cluster_bits >= 14 && random.below(2) == 0;
        let l2_form = if extended { L2Form::Extended } else { L2Form::Standard };
        Self { version, cluster_bits, refcount_order, l2_form, size, backing_len }
    }

    fn create(self) -> Vec<u8> {
        let store = MemoryStore::default();
        let options = CreateOptions {
            size: self.size,
            version: self.version,
            geometry: Geometry::new(self.cluster_bits, self.refcount_order)
                .with_l2_form(self.l2_form),
            backing: None,
        };
        NewImage::plan(&options).unwrap().write(&store).unwrap();
        store.bytes()
    }

    /// The same in the words of `qemu-img`.
    fn qemu_options(self) -> String {
        let compat = if self.version == Version::V2 { "0.10" } else { "1.1" };
        let (cluster, bits) = (1 << self.cluster_bits, 1 << self.refcount_order);
        let extended = if self.l2_form == L2Form::Extended { ",extended_l2=on" } else { "" };
        format!("compat={compat},cluster_size={cluster},refcount_bits={bits}{extended}")
    }

    fn below(self) -> Box<dyn Below> {
        match self.backing_len {
            0 => Box::new(Nothing),
            len => Box::new(Pattern { len }),
        }
    }

    fn empty_disk(self) -> Vec<u8> {
        let mut disk = vec![0; self.size as usize];
        self.below().read(GuestOffset::ZERO, &mut disk).unwrap();
        disk
    }
}

fn open(store: Arc<dyn Store>) -> Result<Image> {
    Image::open(store, Writability::Writable)
}

/// A random change of a disk.
#[derive(Debug, Clone, Copy)]
enum Change {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64, mode: ZeroMode },
    Flush,
}

impl Change {
    fn random(random: &mut Random, size: u64) -> Self {
        let at = random.below(size);
        let most = [600, 5000, 40000][random.below(3) as usize];
        let len = (1 + random.below(most)).min(size - at);
        match random.below(10) {
            0..=5 => Self::Write { at, len, byte: random.below(255) as u8 + 1 },
            6 | 7 => Self::Zero { at, len, mode: ZeroMode::Unmap },
            8 => Self::Zero { at, len, mode: ZeroMode::Keep },
            _ => Self::Flush,
        }
    }

    /// As [`Self::random`], but on the borders of sectors, as a guest writes.
    fn of_sectors(random: &mut Random, size: u64) -> Self {
        let widen = |at: u64, len: u64| (at / 512 * 512, (at % 512 + len).next_multiple_of(512));
        match Self::random(random, size) {
            Self::Write { at, len, byte } => {
                let (at, len) = widen(at, len);
                Self::Write { at, len, byte }
            }
            Self::Zero { at, len, mode } => {
                let (at, len) = widen(at, len);
                Self::Zero { at, len, mode }
            }
            Self::Flush => Self::Flush,
        }
    }

    fn apply_to_image(self, image: &Image, below: &dyn Below) -> Result<()> {
        match self {
            Self::Write { at, len, byte } => {
                image.write(below, GuestOffset::new(at), &vec![byte; len as usize])
            }
            Self::Zero { at, len, mode } => {
                image.zero(below, GuestRange::new(GuestOffset::new(at), len), mode)
            }
            Self::Flush => image.flush(),
        }
    }

    fn apply_to_model(self, disk: &mut [u8]) {
        match self {
            Self::Write { at, len, byte } => disk[at as usize..(at + len) as usize].fill(byte),
            Self::Zero { at, len, .. } => disk[at as usize..(at + len) as usize].fill(0),
            Self::Flush => {}
        }
    }
}

fn read_all(image: &Image, below: &dyn Below) -> Vec<u8> {
    let mut disk = vec![0; image.size() as usize];
    image.read_active(below, GuestOffset::ZERO, &mut disk).unwrap();
    disk
}

fn read_snapshot(image: &Image, tree: &SnapshotTree, below: &dyn Below) -> Vec<u8> {
    let mut disk = vec![0; tree.size() as usize];
    let mut at = 0;
    while at < disk.len() {
        let range = GuestRange::new(GuestOffset::new(at as u64), (disk.len() - at) as u64);
        let run = image.map(Tree::Snapshot(tree), range).unwrap();
        let now = &mut disk[at..at + run.len as usize];
        match run.content {
            Content::Unallocated { .. } => below.read(range.start, now).unwrap(),
            content => image.read_content(range.start, content, now).unwrap(),
        }
        at += run.len as usize;
    }
    disk
}

/// Panics with the first difference, not with two disks.
fn assert_same(found: &[u8], expected: &[u8], context: &str) {
    assert_eq!(found.len(), expected.len(), "{context}: sizes differ");
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        panic!("{context}: byte {at} is {:#x}, not {:#x}", found[at], expected[at]);
    }
}

/// What both checkers find in an image, which must be the same.
fn judge(bytes: &[u8]) -> Findings {
    let findings = checker::check(bytes);
    let (report, found) = own_check(bytes);
    assert_eq!(report.leaks, findings.leaks.len() as u64, "{found:?}, {findings:?}");
    assert_eq!(report.is_sound(), findings.corruptions.is_empty(), "{found:?}, {findings:?}");
    findings
}

/// What is in the file between two operations, flushed or not, leaks clusters at worst.
fn assert_sound(store: &MemoryStore, context: &str) {
    let (report, found) = own_check(&store.bytes());
    assert!(report.is_sound(), "{context}: {found:?}");
}

/// What the program's own checker says of an image.
fn own_check(bytes: &[u8]) -> (Report, Vec<Finding>) {
    let mut found = Found::default();
    let report = check::check(&MemoryStore::new(bytes.to_vec()), &mut found).unwrap();
    (report, found.0)
}

/// Findings of a check, or of the first check of a repair.
#[derive(Default)]
struct Found(Vec<Finding>);

impl check::Watch for Found {
    fn found(&mut self, stage: Stage, finding: &Finding) {
        if stage == Stage::Check {
            self.0.push(finding.clone());
        }
    }

    fn progress(&mut self, _stage: Stage, done: u64, total: u64) {
        assert!(done <= total, "{done} of {total}");
    }
}
