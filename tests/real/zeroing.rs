//! Holes and zeros: they read as zeros, whatever lies below, and give space back.

use crate::support::images::{Images, Untouched, allocated, check, io, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, same};
use crate::support::random::Random;
use crate::support::tools::args;
use crate::support::writer::Writer;
use crate::support::{K, M, index};

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// An overlay half full of data over a base full of it.
fn overlay(images: &Images, options: &str) -> (PathBuf, PathBuf) {
    let base = images.create("base.qcow2", 4 * M, options);
    io(&base, &["write -P 0xb5 0 4M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", options);
    io(&top, &["write -P 0x5b 0 2M"]);
    (base, top)
}

fn zero_everywhere(image: &Path, zero: impl Fn(&mut Writer, u64, u64)) {
    let mut random = Random::new(61);
    let mut writer = Writer::open(image);
    let ranges = [(64 * K, 64 * K), (3, 1), (128 * K - 1, 2), (300 * K + 5, 400 * K), (M, M)];
    for (offset, len) in ranges {
        zero(&mut writer, offset, len);
        zero(&mut writer, 2 * M + offset, len);
    }
    writer.reads_back();
    for _ in 0..20 {
        let (offset, len) = random.range(4 * M, 200 * K);
        zero(&mut writer, offset, len);
        writer.scribble(&mut random, 1);
    }
    writer.close();
}

#[test]
fn a_punched_hole_reads_as_zeros_and_the_base_does_not_show_through() {
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=1M"] {
        let images = Images::new();
        let (base, top) = overlay(&images, options);
        let untouched = Untouched::now(&[base]);
        zero_everywhere(&top, Writer::punch);
        untouched.verify();
    }
}

#[test]
fn a_zeroed_range_reads_as_zeros_and_the_base_does_not_show_through() {
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=1M"] {
        let images = Images::new();
        let (base, top) = overlay(&images, options);
        let untouched = Untouched::now(&[base]);
        zero_everywhere(&top, Writer::zero);
        untouched.verify();
    }
}

#[test]
fn a_hole_in_an_image_without_a_base_reads_as_zeros() {
    for options in ["compat=1.1", "compat=0.10", "cluster_size=4k,refcount_bits=1"] {
        let images = Images::new();
        let mut random = Random::new(62);
        let image = images.create("disk.qcow2", 4 * M, options);
        paint(&image, &mut random, 4 * M, 20);
        zero_everywhere(&image, Writer::punch);
    }
}

#[test]
fn a_hole_over_a_short_base_stays_zero() {
    let images = Images::new();
    images.raw("base.raw", &[0x77; 1_000_000]);
    let top = images.overlay_sized("top.qcow2", "base.raw", 4 * M, "");
    zero_everywhere(&top, Writer::punch);
}

#[test]
fn holes_and_zeros_beside_a_snapshot_leave_it_alone() {
    for compat in ["0.10", "1.1"] {
        let images = Images::new();
        let mut random = Random::new(63);
        let image = images.create("disk.qcow2", 4 * M, &format!("compat={compat}"));
        paint(&image, &mut random, 4 * M, 20);
        snapshot(&image, "one");
        let before = bytes_of_snapshot(&image, "one");
        zero_everywhere(&image, Writer::punch);
        zero_everywhere(&image, Writer::zero);
        same("the snapshot", &before, &bytes_of_snapshot(&image, "one"));
    }
}

#[test]
fn a_hole_gives_space_back_to_the_host() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 16 * M, "");
    io(&image, &["write -P 1 0 16M"]);
    let full = allocated(&image);
    let mut writer = Writer::open(&image);
    writer.punch(M, 14 * M);
    writer.close();
    let left = allocated(&image);
    assert!(left + 13 * M < full, "{full} bytes before, {left} after a hole of {} bytes", 14 * M);
}

#[test]
fn space_that_a_hole_freed_is_used_again() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 16 * M, "");
    let mut writer = Writer::open(&image);
    for byte in 1..12 {
        writer.fill(4 * M, 8 * M, byte);
        writer.sync();
        writer.punch(4 * M, 8 * M);
        writer.sync();
    }
    writer.close();
    let length = image.metadata().expect("stat").len();
    assert!(length < 40 * M, "the image has grown to {length} bytes");
}

#[test]
fn with_discard_ignore_a_hole_is_zero_or_refused_but_never_something_else() {
    let images = Images::new();
    let (_, top) = overlay(&images, "compat=1.1");
    let mut expected = crate::support::oracle::bytes_of(&top);
    let mounted = Mounted::with(&args!["-o", "discard=ignore"], &top);
    let disk = File::options().read(true).write(true).open(mounted.disk()).expect("open");
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(&disk, mode, 100, 300_000) {
        Ok(()) => expected[100..300_100].fill(0),
        Err(errno) => assert_eq!(errno, Errno::EOPNOTSUPP),
    }
    drop(disk);
    holds(&mounted.disk(), &expected);
    mounted.umount();
    crate::support::images::check(&top);
}

#[test]
fn a_hole_in_a_read_only_view_is_refused() {
    let images = Images::new();
    let (base, top) = overlay(&images, "compat=1.1");
    let untouched = Untouched::now(&[base, top.clone()]);
    let mounted = Mounted::read_only(&top);
    let disk = File::open(mounted.disk()).expect("open");
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert!(fallocate(&disk, mode, 0, 4096).is_err(), "a hole in a read-only view");
    drop(disk);
    mounted.umount();
    untouched.verify();
}

#[test]
fn of_a_range_beyond_the_end_only_the_inside_becomes_zero_and_no_file_grows() {
    let images = Images::new();
    let (_, top) = overlay(&images, "compat=1.1");
    let mut expected = bytes_of(&top);
    let mounted = Mounted::new(&top);
    let disk = File::options().read(true).write(true).open(mounted.disk()).expect("open");
    let end = 4 * M;
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (punch, zero) =
        (FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE);
    let call =
        |mode, from: u64, len: u64| fallocate(&disk, mode, from.cast_signed(), len.cast_signed());
    assert_eq!(call(zero, end - K, 2 * K), Err(Errno::EPERM));
    assert_eq!(call(zero, end, K), Err(Errno::EPERM));
    for (mode, inside) in [(punch | keep, 3000), (zero | keep, 5000)] {
        assert_eq!(call(mode, end, M), Ok(()));
        holds(&mounted.disk(), &expected);
        assert_eq!(call(mode, end - inside, M), Ok(()));
        expected[index(end - inside)..].fill(0);
        holds(&mounted.disk(), &expected);
    }
    assert_eq!(call(zero, end - 9000, 9000), Ok(()));
    expected[index(end - 9000)..].fill(0);
    holds(&mounted.disk(), &expected);
    assert_eq!(disk.metadata().expect("stat").len(), end);
    drop(disk);
    mounted.umount();
    check(&top);
}
