//! Compressed clusters, read and written over.

use std::os::unix::fs::FileExt as _;

use crate::support::images::{Images, Untouched, io, poke, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of_snapshot, reads_as, same};
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::writer::Writer;
use crate::support::{K, M, index};

/// A raw disk that compresses in part: text-like runs, noise and zeros.
fn mixed_disk(random: &mut Random, size: u64) -> Vec<u8> {
    let mut disk = Vec::with_capacity(index(size));
    while disk.len() < index(size) {
        match random.below(3) {
            0 => disk.extend(random.bytes(5000)),
            1 => disk.extend(b"all work and no play ".repeat(700)),
            _ => disk.extend([0; 70_000]),
        }
    }
    disk.truncate(index(size));
    disk
}

#[test]
fn a_converted_image_of_any_cluster_size_reads_as_its_source() {
    let images = Images::new();
    let mut random = Random::new(31);
    let source = images.raw("source.raw", &mixed_disk(&mut random, 5 * M));
    for cluster in ["512", "4k", "64k", "512k", "2M"] {
        for compat in ["0.10", "1.1"] {
            let packed = images.path("packed.qcow2");
            let options = format!("compat={compat},cluster_size={cluster}");
            let words = args!["convert", "-c", "-O", "qcow2", "-o", options, source, packed];
            run("qemu-img", &words);
            let mounted = Mounted::read_only(&packed);
            reads_as(&mounted.disk(), &source);
            mounted.umount();
        }
    }
}

#[test]
fn compressed_clusters_among_others_and_over_a_base_are_read() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 1 0 1M", "write -c -P 2 1M 64k", "write -c -P 3 1088k 64k"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    io(&top, &["write -c -P 4 64k 64k", "write -P 5 130k 1k", "write -z 1M 64k"]);
    let mounted = Mounted::read_only(&top);
    reads_as(&mounted.disk(), &top);
    reads_as(&mounted.path("chain/1/disk.raw"), &base);
    mounted.umount();
}

#[test]
fn a_large_read_meets_a_damaged_cluster_and_small_ones_beside_it_are_right() {
    let images = Images::new();
    let noise = Random::new(36).bytes(index(M)).into_iter();
    // Each cluster shrinks to about a half.
    let source: Vec<u8> = noise.map(|byte| b'a' + byte % 16).collect();
    let raw = images.raw("source.raw", &source);
    let packed = images.path("packed.qcow2");
    run("qemu-img", &args!["convert", "-c", "-O", "qcow2", &raw, &packed]);
    // In the midst of the data, over the beginning of a cluster, which then is of no kind that there is.
    let len = std::fs::metadata(&packed).expect("look at it").len();
    poke(&packed, len - 200 * K, &vec![0xff; index(50 * K)]);
    let mounted = Mounted::read_only(&packed);
    let disk = std::fs::File::open(mounted.disk()).expect("open");
    let mut whole = vec![0; index(M)];
    let error = disk.read_exact_at(&mut whole, 0).expect_err("a cluster of it is damaged");
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    let (mut refused, mut others) = (0, 0);
    for (number, expected) in source.chunks(index(64 * K)).enumerate() {
        let mut cluster = vec![0; expected.len()];
        match disk.read_exact_at(&mut cluster, number as u64 * 64 * K) {
            Err(_) => refused += 1,
            // The format has no checksum: one that is damaged behind its beginning may be taken for another.
            Ok(()) => others += u32::from(cluster != expected),
        }
    }
    assert!(refused > 0 && refused + others <= 3, "{refused} refused, {others} damaged");
    drop(disk);
    mounted.umount();
}

#[test]
fn a_write_into_a_compressed_cluster_keeps_the_rest_of_it() {
    for cluster in ["4k", "64k", "1M"] {
        let images = Images::new();
        let mut random = Random::new(32);
        let source = images.raw("source.raw", &mixed_disk(&mut random, 4 * M));
        let image = images.path("packed.qcow2");
        let options = format!("cluster_size={cluster}");
        run("qemu-img", &args!["convert", "-c", "-O", "qcow2", "-o", options, source, image]);
        let mut writer = Writer::open(&image);
        writer.scribble(&mut random, 25);
        writer.fill(M - 1, 2, 0xaa);
        writer.close();
    }
}

#[test]
fn a_write_into_a_compressed_cluster_of_a_snapshot_leaves_the_snapshot_alone() {
    let images = Images::new();
    let mut random = Random::new(33);
    let source = images.raw("source.raw", &mixed_disk(&mut random, 4 * M));
    let image = images.path("packed.qcow2");
    run("qemu-img", &args!["convert", "-c", "-O", "qcow2", source, image]);
    snapshot(&image, "one");
    let before = bytes_of_snapshot(&image, "one");
    let mut writer = Writer::open(&image);
    writer.scribble(&mut random, 25);
    writer.punch(M, 300 * K);
    writer.zero(2 * M + 100, 200 * K);
    writer.close();
    same("the snapshot", &before, &bytes_of_snapshot(&image, "one"));
}

#[test]
fn a_compressed_base_is_copied_from_and_not_changed() {
    let images = Images::new();
    let mut random = Random::new(34);
    let source = images.raw("source.raw", &mixed_disk(&mut random, 4 * M));
    let base = images.path("base.qcow2");
    run("qemu-img", &args!["convert", "-c", "-O", "qcow2", source, base]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let untouched = Untouched::now(&[base]);
    let mut writer = Writer::open(&top);
    writer.scribble(&mut random, 25);
    writer.close();
    untouched.verify();
}
