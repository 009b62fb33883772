//! Images that no writer makes: each is read as QEMU reads it or refused by the name of what is wrong, in little time and
//! memory, whatever was put into it.

/// A table of cases: what is wrong, the kind of image, what is done to it, and what becomes of it.
macro_rules! cases {
    ($($what:literal : $kind:expr, $changes:expr => $verdict:expr;)*) => {
        pub const CASES: &[super::Case] = &[$(super::Case {
            what: $what,
            kind: $kind,
            changes: &$changes,
            verdict: $verdict,
        }),*];
    };
}

mod bitmaps;
mod header;
mod images;
mod snapshots;
mod tables;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qchainfs::chain::{Chain, OpenOptions, SecretFor, SecretSource, Secrets};
use qchainfs::error::Result;
use qchainfs::image::Writability;
use qchainfs::units::GuestOffset;
use tempfile::TempDir;

use self::images::{Kind, Workshop};
use crate::support::images::allocated;
use crate::support::oracle::same;
use crate::support::tools::{QCHAINFS, args, attempt};
use crate::support::{M, index};

/// An image that something is wrong with.
pub struct Case {
    /// What it is.
    what: &'static str,
    kind: Kind,
    changes: &'static [Change],
    verdict: Verdict,
}

/// What is done to the file.
enum Change {
    /// These bytes are put there.
    Set(At, Bytes),
    /// It is made so long.
    Length(u64),
}

/// A place in an image.
#[derive(Clone, Copy)]
enum At {
    Header(u64),
    /// From the beginning of the header extension of this type.
    Extension(u32, u64),
    /// 64-bit words of the active L1 table.
    L1(u64),
    /// Those of the first L2 table.
    L2(u64),
    /// Those of the refcount table and its first block.
    Reftable(u64),
    Refblock(u64),
    /// Bytes of the snapshot table.
    Snapshots(u64),
    /// 64-bit words of the first snapshot's L1 table and of its first L2 table.
    SnapshotL1(u64),
    SnapshotL2(u64),
    /// Bytes of the bitmap directory.
    Bitmaps(u64),
}

/// What is put there.
#[derive(Clone, Copy)]
enum Bytes {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    Text(&'static [u8]),
    /// A word made less or more.
    Plus(u64),
    /// Bits set in a word.
    Or(u64),
}

/// What becomes of it.
enum Verdict {
    /// QEMU and we read the same.
    Read,
    /// QEMU and we refuse it; we name this.
    Refused(&'static str),
    /// QEMU reads something; we name this, and why it is refused.
    OnlyWeRefuse(&'static str, &'static str),
    /// We read what was meant, and why.
    OnlyQemuRefuses(&'static str),
}

/// What a disk is read to at most.
const READ: u64 = 4 * M;
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// No more address space is needed.
const MEMORY: &str = "--as=1000000000";

#[test]
fn a_malformed_header_is_judged_as_by_qemu() {
    judge_all(header::CASES);
}

#[test]
fn malformed_l1_and_l2_tables_are_judged_as_by_qemu() {
    judge_all(tables::CASES);
}

#[test]
fn a_malformed_snapshot_table_is_judged_as_by_qemu() {
    judge_all(snapshots::CASES);
}

#[test]
fn malformed_bitmaps_are_judged_as_by_qemu() {
    judge_all(bitmaps::CASES);
}

/// Panics with all cases that are not as they should be.
fn judge_all(cases: &[Case]) {
    let mut workshop = Workshop::new();
    let wrong: Vec<_> = cases.iter().filter_map(|case| judge(case, &mut workshop).err()).collect();
    eprintln!("{} malformed images compared with QEMU", cases.len());
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}

fn judge(case: &Case, workshop: &mut Workshop) -> Result<(), String> {
    let image = &workshop.copy(case.kind);
    for change in case.changes {
        change.apply(image);
    }
    behaves(image);
    survives_writing(image, workshop);
    let theirs = read_by_qemu(case.kind, image, workshop);
    let ours = read_by_us(case.kind, image, workshop);
    let found = match (&theirs, &ours) {
        (Ok(theirs), Ok(ours)) => {
            // Of a snapshot QEMU sees what fits into the active disk.
            let common = match case.kind {
                Kind::Snapshot => theirs.len().min(ours.len()),
                _ => READ as usize,
            };
            let first = |bytes: &[u8]| bytes[..common.min(bytes.len())].to_vec();
            same(case.what, &first(theirs), &first(ours));
            "both read it".to_owned()
        }
        (Ok(_), Err(error)) => format!("only we refuse it: {error}"),
        (Err(said), Ok(_)) => format!("only QEMU refuses it: {said}"),
        (Err(said), Err(error)) => format!("both refuse it: {error}; QEMU: {said}"),
    };
    let named = |word: &str| ours.as_ref().is_err_and(|error| error.contains(word));
    let (right, why) = match case.verdict {
        Verdict::Read => (theirs.is_ok() && ours.is_ok(), ""),
        Verdict::Refused(word) => (theirs.is_err() && named(word), word),
        Verdict::OnlyWeRefuse(word, why) => (theirs.is_ok() && named(word), why),
        Verdict::OnlyQemuRefuses(why) => (theirs.is_err() && ours.is_ok(), why),
    };
    if right { Ok(()) } else { Err(format!("{}: {found} ({why})", case.what)) }
}

/// The program neither panics nor hangs nor eats memory, whatever it says.
fn behaves(image: &Path) {
    for verb in [&args!["info"][..], &args!["map", "--output", "json"]] {
        let start = Instant::now();
        let outcome =
            attempt("prlimit", &[&args![MEMORY, QCHAINFS][..], verb, &args![image]].concat());
        assert!(start.elapsed() < PATIENCE, "too slow: {outcome}");
        match outcome.code {
            Some(0) => {}
            Some(code @ (1 | 10 | 12 | 13 | 14)) => drop(outcome.fails(code)),
            _ => panic!("{outcome}"),
        }
    }
}

/// A writer neither panics nor hangs nor makes the file grow without bound, whatever becomes of the image.
fn survives_writing(image: &Path, workshop: &Workshop) {
    let start = Instant::now();
    let copy = &image.with_extension("written");
    fs::copy(image, copy).expect("copy an image");
    let before = allocated(copy);
    let write = || -> Result<()> {
        let options = OpenOptions { writability: Writability::Writable, ..with_key(workshop) };
        let chain = Arc::new(Chain::open(copy, &options)?);
        let view = chain.view(0)?;
        for at in (0..view.size().min(READ)).step_by(100_000) {
            // An error concerns one cluster; the others go on, or say that they don't.
            let _ = view.write(GuestOffset::new(at), &[7; 70_000]);
        }
        chain.close()
    };
    let said = write().err();
    let after = allocated(copy);
    assert!(after <= before + 2 * READ, "it grew from {before} to {after} bytes: {said:?}");
    assert!(start.elapsed() < PATIENCE, "too slow: {}", image.display());
}

/// The first bytes that QEMU reads, or what it says.
fn read_by_qemu(kind: Kind, image: &Path, workshop: &Workshop) -> Result<Vec<u8>, String> {
    let dir = TempDir::with_prefix("qchainfs-oracle-").expect("make a directory");
    let raw = dir.path().join("raw");
    let words: Vec<OsString> = match kind {
        Kind::Snapshot => args!["convert", "-U", "-l", "one", "-O", "raw", image, raw].to_vec(),
        Kind::Luks => {
            let options =
                format!("driver=qcow2,file.filename={},encrypt.key-secret=key", image.display());
            let object = format!("secret,id=key,file={}", workshop.key().display());
            args!["convert", "-U", "--object", object, "--image-opts", "-O", "raw", options, raw]
                .to_vec()
        }
        _ => {
            let (from, to) = (format!("if={}", image.display()), format!("of={}", raw.display()));
            let count = format!("count={}", READ / M);
            args!["dd", "-U", "-f", "qcow2", "-O", "raw", "bs=1M", count, from, to].to_vec()
        }
    };
    let outcome = attempt("qemu-img", &words);
    if outcome.code == Some(0) {
        Ok(fs::read(raw).expect("read what qemu-img wrote"))
    } else {
        Err(outcome.stderr.lines().next().unwrap_or_default().to_owned())
    }
}

/// The first bytes that we read, or what we say.
fn read_by_us(kind: Kind, image: &Path, workshop: &Workshop) -> Result<Vec<u8>, String> {
    let start = Instant::now();
    let options = with_key(workshop);
    let read = || -> Result<Vec<u8>> {
        let chain = Arc::new(Chain::open(image, &options)?);
        let image = chain.active_image().expect("a qcow2 image");
        image.bitmaps()?;
        let view = match kind {
            Kind::Snapshot => {
                let first = image.snapshots().into_iter().next();
                chain.snapshot_view(0, first.expect("a snapshot"))?
            }
            _ => chain.view(0)?,
        };
        let mut bytes = vec![0; index(view.size().min(READ))];
        view.read(GuestOffset::ZERO, &mut bytes)?;
        Ok(bytes)
    };
    let read = read().map_err(|error| error.to_string());
    assert!(start.elapsed() < PATIENCE, "too slow: {}", image.display());
    read
}

fn with_key(workshop: &Workshop) -> OpenOptions {
    let mut secrets = Secrets::default();
    secrets.add(SecretFor::AnyMember, SecretSource::File(workshop.key().to_path_buf()));
    OpenOptions { secrets, ..OpenOptions::default() }
}

impl Change {
    fn apply(&self, image: &Path) {
        let file = fs::File::options().read(true).write(true).open(image).expect("open an image");
        match *self {
            Self::Length(len) => file.set_len(len).expect("set the length of an image"),
            Self::Set(at, bytes) => {
                let at = at.find(&file);
                let word = || word(&file, at);
                let bytes = match bytes {
                    Bytes::U8(number) => vec![number],
                    Bytes::U16(number) => number.to_be_bytes().to_vec(),
                    Bytes::U32(number) => number.to_be_bytes().to_vec(),
                    Bytes::U64(number) => number.to_be_bytes().to_vec(),
                    Bytes::Text(text) => text.to_vec(),
                    Bytes::Plus(number) => word().wrapping_add(number).to_be_bytes().to_vec(),
                    Bytes::Or(bits) => (word() | bits).to_be_bytes().to_vec(),
                };
                file.write_all_at(&bytes, at).expect("poke an image");
            }
        }
    }
}

fn word(file: &fs::File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).expect("read an image");
    u64::from_be_bytes(bytes)
}

impl At {
    fn find(self, file: &fs::File) -> u64 {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        let table = |at: u64| word(file, at) & OFFSET;
        match self {
            Self::Header(at) => at,
            Self::Extension(kind, at) => extension(file, kind) + at,
            Self::L1(index) => word(file, 40) + index * 8,
            Self::L2(index) => table(word(file, 40)) + index * 8,
            Self::Reftable(index) => word(file, 48) + index * 8,
            Self::Refblock(index) => table(word(file, 48)) + index * 8,
            Self::Snapshots(at) => word(file, 64) + at,
            Self::SnapshotL1(index) => table(word(file, 64)) + index * 8,
            Self::SnapshotL2(index) => table(table(word(file, 64))) + index * 8,
            Self::Bitmaps(at) => word(file, extension(file, bitmaps::EXTENSION) + 24) + at,
        }
    }
}

/// Where the header extension of type `wanted` begins.
fn extension(file: &fs::File, wanted: u32) -> u64 {
    let number = |at: u64| word(file, at) >> 32;
    let mut at = if number(4) == 2 { 72 } else { number(100) };
    while number(at) != u64::from(wanted) {
        assert_ne!(number(at), 0, "no extension {wanted:#x}");
        at += 8 + number(at + 4).next_multiple_of(8);
    }
    at
}
