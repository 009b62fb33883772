//! What is written to the active layer is there afterwards, for us and for QEMU, and nothing else
//! has changed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use crate::support::images::{Images, Untouched, allocated, io, paint, snapshot};
use crate::support::oracle::{bytes_of_snapshot, read_at, same};
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::writer::Writer;
use crate::support::{K, M, index};

#[test]
fn writes_of_any_offset_and_length_are_what_qemu_reads_afterwards() {
    for cluster in ["512", "4k", "64k", "2M"] {
        let images = Images::new();
        let mut random = Random::new(51);
        let image = images.create("disk.qcow2", 6 * M, &format!("cluster_size={cluster}"));
        let mut writer = Writer::open(&image);
        writer.fill(0, 1, 1);
        writer.fill(6 * M - 1, 1, 2);
        writer.scribble(&mut random, 40);
        writer.close();
    }
}

#[test]
fn version_2_images_are_written_too() {
    let images = Images::new();
    let mut random = Random::new(52);
    let base = images.create("base.qcow2", 4 * M, "compat=0.10");
    paint(&base, &mut random, 4 * M, 10);
    let top = images.overlay("top.qcow2", "base.qcow2", "compat=0.10");
    let untouched = Untouched::now(&[base]);
    let mut writer = Writer::open(&top);
    writer.scribble(&mut random, 40);
    writer.close();
    untouched.verify();
    let compat = crate::support::oracle::info(&top);
    assert_eq!(compat["format-specific"]["data"]["compat"], "0.10", "the version has changed");
}

#[test]
fn a_small_write_to_an_overlay_copies_the_rest_of_the_cluster_from_below() {
    let images = Images::new();
    let mut random = Random::new(53);
    let base = images.raw("base.raw", &random.bytes(index(4 * M)));
    let middle = images.overlay("middle.qcow2", "base.raw", "cluster_size=4k");
    paint(&middle, &mut random, 4 * M, 8);
    let top = images.overlay("top.qcow2", "middle.qcow2", "cluster_size=256k");
    let untouched = Untouched::now(&[base, middle]);
    let mut writer = Writer::open(&top);
    writer.fill(256 * K - 1, 2, 0xf0);
    writer.fill(M + 1, 1, 0xf1);
    writer.fill(2 * M, 4096, 0xf2);
    writer.close();
    untouched.verify();
}

#[test]
fn writes_over_zero_clusters_keep_the_zeros_around_them() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 0x99 0 4M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    io(&top, &["write -P 1 0 1M", "write -z 0 1M", "write -z -u 2M 1M"]);
    let mut writer = Writer::open(&top);
    writer.fill(10, 3, 0xa1);
    writer.fill(64 * K - 5, 10, 0xa2);
    writer.fill(128 * K, 64 * K, 0xa3);
    writer.fill(2 * M + 5, 7, 0xa4);
    writer.fill(3 * M - 1, 2, 0xa5);
    writer.close();
}

#[test]
fn writes_into_preallocated_clusters_keep_the_zeros_around_them() {
    for mode in ["metadata", "falloc", "full"] {
        let images = Images::new();
        let mut random = Random::new(54);
        let image = images.create("disk.qcow2", 4 * M, &format!("preallocation={mode}"));
        let mut writer = Writer::open(&image);
        writer.scribble(&mut random, 15);
        writer.close();
    }
}

#[test]
fn tiny_clusters_make_the_refcount_table_grow_without_harm() {
    let images = Images::new();
    let mut random = Random::new(55);
    let image = images.create("disk.qcow2", 24 * M, "cluster_size=512");
    let mut writer = Writer::open(&image);
    for step in 0..20 {
        let data = random.bytes(index(M));
        writer.write(step * M + 300, &data);
    }
    writer.sync();
    writer.scribble(&mut random, 20);
    writer.close();
}

#[test]
fn refcounts_of_every_width_are_kept() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let images = Images::new();
        let mut random = Random::new(bits);
        let options = format!("refcount_bits={bits},cluster_size=512");
        let image = images.create("disk.qcow2", 3 * M, &options);
        let snapshots = if bits > 1 { 1 } else { 0 };
        for _ in 0..snapshots {
            paint(&image, &mut random, 3 * M, 10);
            snapshot(&image, "one");
        }
        let mut writer = Writer::open(&image);
        writer.scribble(&mut random, 25);
        writer.punch(M, M);
        writer.close();
    }
}

#[test]
fn the_last_cluster_of_an_odd_disk_is_written_to_its_end() {
    for size in [512, 65536 + 512, M + 4096 + 1536] {
        let images = Images::new();
        let base = images.create("base.qcow2", 2 * M, "");
        io(&base, &["write -P 0x13 0 2M"]);
        let top = images.overlay_sized("top.qcow2", "base.qcow2", size, "");
        let mut writer = Writer::open(&top);
        writer.fill(size - 1, 1, 0x31);
        writer.fill(0, 10, 0x32);
        writer.close();
        run("qemu-img", &args!["resize", "-q", top, "2M"]);
        let grown = crate::support::oracle::bytes_of(&top);
        same("the grown part", &vec![0; index(2 * M - size)], &grown[index(size)..]);
    }
}

#[test]
fn a_write_past_the_end_fails_and_does_not_grow_the_disk() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mut writer = Writer::open(&image);
    assert!(writer.file().write_at(&[1; 512], M).is_err(), "a write behind the end succeeded");
    let written = writer.file().write_at(&[2; 1024], M - 512).unwrap_or(0);
    assert!(written <= 512, "{written} bytes were written into the last 512");
    writer.bytes_mut()[index(M) - 512..][..written].fill(2);
    assert_eq!(fs::metadata(writer.mounted().disk()).expect("stat").len(), M);
    writer.close();
}

#[test]
fn what_was_synced_is_in_the_image_while_it_is_still_mounted() {
    let images = Images::new();
    let mut random = Random::new(56);
    let base = images.create("base.qcow2", 4 * M, "");
    paint(&base, &mut random, 4 * M, 10);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let mut writer = Writer::open(&top);
    for _ in 0..3 {
        writer.scribble(&mut random, 8);
        writer.sync();
        let found = crate::support::oracle::bytes_of(&top);
        same("the synced image", writer.bytes(), &found);
    }
    writer.close();
}

#[test]
fn a_second_open_file_sees_a_write_at_once() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mut writer = Writer::open(&image);
    let reader = File::open(writer.mounted().disk()).expect("open");
    assert_eq!(read_at(&reader, 1000, 100), vec![0; 100]);
    writer.fill(1000, 100, 0x42);
    assert_eq!(read_at(&reader, 1000, 100), vec![0x42; 100]);
    drop(reader);
    writer.close();
}

#[test]
fn writing_the_same_place_again_does_not_grow_the_image() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 8 * M, "");
    let mut writer = Writer::open(&image);
    writer.fill(0, 4 * M, 1);
    writer.sync();
    let once = allocated(&image);
    for byte in 2..20 {
        writer.fill(0, 4 * M, byte);
        writer.sync();
    }
    assert!(allocated(&image) <= once + 256 * K, "from {once} to {}", allocated(&image));
    writer.close();
}

#[test]
fn an_image_that_nobody_wrote_to_is_not_changed_by_a_writable_mount() {
    let images = Images::new();
    let mut random = Random::new(57);
    let image = images.create("disk.qcow2", 4 * M, "");
    paint(&image, &mut random, 4 * M, 10);
    snapshot(&image, "one");
    let before = bytes_of_snapshot(&image, "one");
    let untouched = Untouched::now(&[&image]);
    Writer::open(&image).close();
    untouched.verify();
    same("the snapshot", &before, &bytes_of_snapshot(&image, "one"));
}
