//! What the program's own checker finds, and that it comes to an end.

use super::*;
use crate::error::Error;
use crate::image::check::{Class, Limits, Target, Use, check_within};
use crate::image::open::read_header;
use crate::qcow2::Header;
use crate::store::{Access, FileStore};
use crate::units::HostOffset;

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 9,
    refcount_order: 4,
    size: 200 << 10,
    backing_len: 0,
    l2_form: L2Form::Standard,
};

const CLUSTER: u64 = 512;

/// An image with some writes, and with a snapshot between them.
pub(super) fn used_image(shape: Shape, random: &mut Random) -> Vec<u8> {
    let below = shape.below();
    let store = Arc::new(MemoryStore::new(shape.create()));
    let image = open(store.clone()).unwrap();
    for round in 0..2 {
        for _ in 0..12 {
            Change::random(random, shape.size).apply_to_image(&image, &*below).unwrap();
        }
        if round == 0 && shape.refcount_order > 0 {
            image.create_snapshot("s").unwrap();
        }
    }
    image.flush_all().unwrap();
    drop(image);
    store.bytes()
}

pub(super) fn header_of(bytes: &[u8]) -> Header {
    read_header(&MemoryStore::new(bytes.to_vec())).unwrap()
}

pub(super) fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

pub(super) fn put(bytes: &mut [u8], at: u64, new: &[u8]) {
    bytes[at as usize..at as usize + new.len()].copy_from_slice(new);
}

fn put_word(bytes: &mut [u8], at: u64, word: u64) {
    put(bytes, at, &word.to_be_bytes());
}

/// A disk of which the first 64 KiB are written, and where the entry of its first cluster is.
fn written() -> (Vec<u8>, u64) {
    let store = Arc::new(MemoryStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[7; 64 << 10]).unwrap();
    image.flush_all().unwrap();
    let l1 = image.header().l1_offset.get();
    drop(image);
    let bytes = store.bytes();
    let l2 = word(&bytes, l1) & !(1 << 63);
    (bytes, l2)
}

#[test]
fn the_numbers_of_a_sound_image_are_counted() {
    let (bytes, _) = written();
    let (report, found) = own_check(&bytes);
    assert_eq!(found, []);
    let expected = Report {
        image_end: bytes.len() as u64,
        total_clusters: 400,
        allocated_clusters: 128,
        ..Report::default()
    };
    assert_eq!(report, expected);
}

/// Changes `entry` and demands findings that match `expected`, each once.
fn finds(change: impl FnOnce(&mut Vec<u8>, u64), expected: &[fn(&Finding) -> bool]) {
    let (mut bytes, l2) = written();
    change(&mut bytes, l2);
    let (report, found) = own_check(&bytes);
    for matches in expected {
        assert_eq!(found.iter().filter(|one| matches(one)).count(), 1, "{found:?}");
    }
    assert_eq!(found.len(), expected.len(), "{found:?}");
    let of = |class| found.iter().filter(|finding| finding.class() == class).count() as u64;
    assert_eq!((report.leaks, report.corruptions), (of(Class::Leak), of(Class::Corruption)));
}

#[test]
fn a_data_cluster_of_two_guest_clusters_is_found_even_if_its_refcount_agrees() {
    finds(
        |bytes, l2| {
            let second = word(bytes, l2 + 8) & !(1 << 63);
            put_word(bytes, l2, second);
            put_word(bytes, l2 + 8, second);
            let header = header_of(bytes);
            let block = word(bytes, header.reftable_offset.get());
            put(bytes, block + second / CLUSTER * 2, &2_u16.to_be_bytes());
        },
        &[
            |one| matches!(one, Finding::TwoOwners { first: Use::Data, second: Use::Data, .. }),
            |one| matches!(one, Finding::Leak { references: 0, .. }),
        ],
    );
}

#[test]
fn a_table_that_is_guest_data_too_is_found() {
    finds(
        |bytes, l2| {
            let l1 = header_of(bytes).l1_offset.get();
            put_word(bytes, l2, l1 | 1 << 63);
        },
        &[
            |one| matches!(one, Finding::TwoOwners { first: Use::ActiveL1, second: Use::Data, .. }),
            |one| matches!(one, Finding::TooLow { refcount: 1, references: 2, .. }),
            |one| matches!(one, Finding::Leak { .. }),
        ],
    );
}

#[test]
fn a_flag_that_does_not_agree_with_the_refcount_is_found() {
    finds(
        |bytes, l2| {
            let entry = word(bytes, l2) & !(1 << 63);
            put_word(bytes, l2, entry);
        },
        &[|one| matches!(one, Finding::Copied { refcount: 1, target: Target::Data, .. })],
    );
    finds(
        |bytes, _| {
            let l1 = header_of(bytes).l1_offset.get();
            let entry = word(bytes, l1) & !(1 << 63);
            put_word(bytes, l1, entry);
        },
        &[|one| matches!(one, Finding::Copied { refcount: 1, target: Target::Table(0), .. })],
    );
}

#[test]
fn a_refcount_of_a_cluster_behind_the_end_of_the_file_is_a_leak() {
    finds(
        |bytes, _| {
            let header = header_of(bytes);
            let block = word(bytes, header.reftable_offset.get());
            let behind = bytes.len() as u64 / CLUSTER + 3;
            put(bytes, block + behind * 2, &1_u16.to_be_bytes());
        },
        &[|one| matches!(one, Finding::Leak { refcount: 1, references: 0, .. })],
    );
}

#[test]
fn entries_that_the_format_does_not_allow_are_found() {
    let broken: fn(&Finding) -> bool = |one| matches!(one, Finding::Broken { .. });
    for raw in [2, 1 << 57, 4] {
        let change = |bytes: &mut Vec<u8>, l2| {
            let entry = word(bytes, l2);
            put_word(bytes, l2, entry | raw);
        };
        finds(change, &[broken]);
    }
    finds(
        |bytes, l2| put_word(bytes, l2, 1 << 40),
        &[
            |one| matches!(one, Finding::BehindTheEnd { what: Use::Data, .. }),
            |one| matches!(one, Finding::Leak { .. }),
        ],
    );
}

#[test]
fn a_header_that_can_not_be_read_is_an_error_and_not_a_finding() {
    let (mut bytes, _) = written();
    bytes[20..24].copy_from_slice(&77_u32.to_be_bytes());
    let checked = check::check(&MemoryStore::new(bytes), &mut Found::default());
    assert!(checked.is_err());
}

/// What a check with these limits finds, in an order that does not depend on them.
fn within(bytes: &[u8], clusters: u64, tables: usize) -> (Report, Vec<String>) {
    let mut found = Found::default();
    let store = MemoryStore::new(bytes.to_vec());
    let report = check_within(&store, &mut found, Limits { clusters, tables }).unwrap();
    let mut lines: Vec<_> = found.0.iter().map(Finding::to_string).collect();
    lines.sort();
    (report, lines)
}

/// Overwrites some words of tables with pointers that may lead anywhere.
fn vandalize(bytes: &mut [u8], random: &mut Random) {
    let header = header_of(bytes);
    let l1 = header.l1_offset.get();
    let reftable = header.reftable_offset.get();
    let snapshots = header.snapshots_offset.get();
    let l2 = word(bytes, l1) & !(1 << 63);
    for _ in 0..1 + random.below(6) {
        let table = [l1, l2, reftable, word(bytes, reftable), snapshots][random.below(5) as usize];
        let at = (table & !511) + random.below(12) * 8;
        if table == 0 || at + 8 > bytes.len() as u64 {
            continue;
        }
        let somewhere = random.below(bytes.len() as u64 + 2000);
        let new = match random.below(6) {
            0 => 0,
            1 => somewhere,
            2 => somewhere & !511 | 1 << 63,
            3 => somewhere & !511,
            4 => 1 << 62 | somewhere | random.below(4) << 61,
            _ => random.below(u64::MAX) << 31 ^ random.below(u64::MAX),
        };
        put_word(bytes, at, new);
    }
}

#[test]
fn what_is_found_does_not_depend_on_the_memory_there_is() {
    for seed in 0..150 {
        let mut random = Random::new(seed);
        let order = [4, 0, 6, 2][seed as usize % 4];
        let mut bytes = used_image(Shape { refcount_order: order, ..SHAPE }, &mut random);
        vandalize(&mut bytes, &mut random);
        let Ok(whole) = std::panic::catch_unwind(|| within(&bytes, 1 << 20, 1 << 20)) else {
            panic!("seed {seed}");
        };
        for (clusters, tables) in [(1 << 20, 1), (64, 2), (101, 1 << 20)] {
            let found = within(&bytes, clusters, tables);
            assert_eq!(found, whole, "seed {seed}, {clusters} clusters, {tables} tables");
        }
    }
}

#[test]
fn snapshots_that_name_the_same_huge_table_cost_one_look_at_it() {
    let (mut bytes, _) = written();
    // Of 65536 snapshots each names the active L1 table as its own.
    let l1 = header_of(&bytes).l1_offset.get();
    let table = bytes.len() as u64;
    let mut entry = vec![0; 56];
    put_word(&mut entry, 0, l1);
    put(&mut entry, 8, &7_u32.to_be_bytes());
    put(&mut entry, 36, &16_u32.to_be_bytes());
    bytes.extend(entry.repeat(65536));
    put(&mut bytes, 60, &65536_u32.to_be_bytes());
    put_word(&mut bytes, 64, table);
    let (report, found) = own_check(&bytes);
    assert!(report.corruptions > 0);
    let contested = |one: &&Finding| matches!(one, Finding::TwoOwners { .. });
    assert_eq!(found.iter().filter(contested).count(), 1);
}

#[test]
fn a_file_of_terabytes_of_nothing_is_checked_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.qcow2");
    let (mut bytes, l2) = written();
    let far = 3_u64 << 40;
    put_word(&mut bytes, l2, far);
    std::fs::write(&path, &bytes).unwrap();
    let store = FileStore::open(&path, Access::ReadWrite).unwrap();
    store.set_len(far + (1 << 30)).unwrap();
    let mut found = Found::default();
    let report = check::check(&store, &mut found).unwrap();
    assert_eq!((report.leaks, report.corruptions), (1, 1), "{:?}", found.0);
    assert_eq!(report.image_end, far + CLUSTER);
}

/// A store of which some bytes can't be read.
struct Unreadable {
    inner: MemoryStore,
    bad: std::ops::Range<u64>,
}

impl Store for Unreadable {
    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> std::io::Result<()> {
        let end = offset.get() + buf.len() as u64;
        if offset.get() < self.bad.end && self.bad.start < end {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> std::io::Result<()> {
        self.inner.write_at(pieces, offset)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.inner.sync()
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> std::io::Result<()> {
        self.inner.punch_hole(offset, len)
    }

    fn reserve(&self, offset: HostOffset, len: u64) -> std::io::Result<()> {
        self.inner.reserve(offset, len)
    }

    fn next_data(&self, from: HostOffset) -> std::io::Result<Option<std::ops::Range<u64>>> {
        self.inner.next_data(from)
    }

    fn allocated(&self) -> std::io::Result<u64> {
        self.inner.allocated()
    }
}

#[test]
fn a_table_that_can_not_be_read_is_an_error_of_the_check_and_what_it_names_is_kept() {
    let (bytes, l2) = written();
    let store = Unreadable { inner: MemoryStore::new(bytes.clone()), bad: l2..l2 + CLUSTER };
    let mut found = Found::default();
    let done: std::result::Result<_, Error> = check::repair(&store, check::Extent::All, &mut found);
    let (report, fixed) = done.unwrap();
    assert_eq!((report.errors, report.leaks, fixed.leaks), (1, 64, 0), "{:?}", found.0);
    assert!(store.inner.bytes() == bytes, "something was written");
}

/// A store that finds out where data begins by the byte.
struct ByByte(MemoryStore);

impl Store for ByByte {
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> std::io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> std::io::Result<()> {
        self.0.write_at(pieces, offset)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.0.sync()
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> std::io::Result<()> {
        self.0.punch_hole(offset, len)
    }

    fn reserve(&self, offset: HostOffset, len: u64) -> std::io::Result<()> {
        self.0.reserve(offset, len)
    }

    fn next_data(&self, from: HostOffset) -> std::io::Result<Option<std::ops::Range<u64>>> {
        let bytes = self.0.bytes();
        let rest = bytes.get(from.get() as usize..).unwrap_or_default();
        let first = rest.iter().position(|&byte| byte != 0);
        Ok(first.map(|first| from.get() + first as u64..bytes.len() as u64))
    }

    fn allocated(&self) -> std::io::Result<u64> {
        self.0.allocated()
    }
}

#[test]
fn a_check_goes_on_where_data_begins_in_the_middle_of_a_word() {
    let (bytes, _) = written();
    let report = check::check(&ByByte(MemoryStore::new(bytes.clone())), &mut Found::default());
    assert_eq!(report.unwrap(), own_check(&bytes).0);
}

#[test]
fn a_refcount_block_where_no_file_reaches_is_an_error() {
    let (mut bytes, _) = written();
    let table = header_of(&bytes).reftable_offset.get();
    for host in [!511, 1 << 63, u64::MAX] {
        put_word(&mut bytes, table + 8, host);
        let (report, _) = own_check(&bytes);
        assert!(report.corruptions > 0, "{host:#x}");
    }
}
