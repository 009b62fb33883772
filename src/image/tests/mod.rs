//! The image floor on stores in memory: against a model, with failing stores, with power cuts.

mod checker;
mod concurrent;
mod failures;
mod kinds;
mod model;
mod power_cuts;
mod regressions;
mod resizing;

use std::sync::Arc;

use super::{Below, CreateOptions, Image, NewImage, Nothing, Writability, ZeroMode};
use crate::error::Result;
use crate::qcow2::{Geometry, Version};
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

/// A linear congruential generator: tests print their seed and can be replayed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// One kind of image.
#[derive(Debug, Clone, Copy)]
struct Shape {
    version: Version,
    cluster_bits: u32,
    refcount_order: u32,
    size: u64,
    backing_len: u64,
}

impl Shape {
    fn create(self) -> Vec<u8> {
        let store = MemoryStore::default();
        let options = CreateOptions {
            size: self.size,
            version: self.version,
            geometry: Geometry::new(self.cluster_bits, self.refcount_order),
            backing: None,
        };
        NewImage::plan(&options).unwrap().write(&store).unwrap();
        store.bytes()
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

/// Panics with the first difference, not with two disks.
fn assert_same(found: &[u8], expected: &[u8], context: &str) {
    assert_eq!(found.len(), expected.len(), "{context}: sizes differ");
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        panic!("{context}: byte {at} is {:#x}, not {:#x}", found[at], expected[at]);
    }
}
