//! Every byte of every view is what QEMU would read there.

use std::fs::File;
use std::thread;

use crate::support::images::{Images, Untouched, io, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{
    bytes_of, bytes_of_snapshot, holds, read_at, reads_as, reads_as_snapshot, same,
};
use crate::support::random::{Random, seeds};
use crate::support::{K, M, index};

fn reads_every_cluster_size(compat: &str) {
    for bits in 9..=21 {
        let images = Images::new();
        let mut random = Random::new(bits);
        let options = format!("compat={compat},cluster_size={}", 1 << bits);
        let base = images.create("base.qcow2", 6 * M, &options);
        paint(&base, &mut random, 6 * M, 20);
        let top = images.overlay("top.qcow2", "base.qcow2", &options);
        paint(&top, &mut random, 6 * M, 12);
        let mounted = Mounted::read_only(&top);
        reads_as(&mounted.disk(), &top);
        reads_as(&mounted.path("chain/1/disk.raw"), &base);
        mounted.umount();
    }
}

#[test]
fn version_2_images_of_every_cluster_size_read_as_qemu_reads_them() {
    reads_every_cluster_size("0.10");
}

#[test]
fn version_3_images_of_every_cluster_size_read_as_qemu_reads_them() {
    reads_every_cluster_size("1.1");
}

#[test]
fn an_empty_image_reads_as_zeros() {
    let images = Images::new();
    let image = images.create("empty.qcow2", 5 * M, "");
    let mounted = Mounted::new(&image);
    holds(&mounted.disk(), &vec![0; index(5 * M)]);
    mounted.umount();
}

#[test]
fn zero_clusters_hide_what_lies_below_them() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 0x77 0 4M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    io(
        &top,
        &["write -P 1 1M 512k", "write -z 1M 128k", "write -z -u 1152k 128k", "write -z 2M 1M"],
    );
    let mounted = Mounted::read_only(&top);
    reads_as(&mounted.disk(), &top);
    mounted.umount();
}

#[test]
fn preallocated_clusters_read_as_zeros() {
    let images = Images::new();
    for mode in ["metadata", "falloc", "full"] {
        let image = images.create("pre.qcow2", 3 * M, &format!("preallocation={mode}"));
        io(&image, &["write -P 9 100k 300k"]);
        let mounted = Mounted::read_only(&image);
        reads_as(&mounted.disk(), &image);
        mounted.umount();
    }
}

#[test]
fn a_raw_member_reads_as_it_is() {
    let images = Images::new();
    let mut random = Random::new(11);
    let base = images.raw("base.raw", &random.bytes(index(3 * M)));
    let top = images.overlay("top.qcow2", "base.raw", "");
    paint(&top, &mut random, 3 * M, 9);
    let mounted = Mounted::read_only(&top);
    reads_as(&mounted.disk(), &top);
    reads_as(&mounted.path("chain/1/disk.raw"), &base);
    mounted.umount();
}

#[test]
fn every_member_and_snapshot_of_a_chain_is_read_with_what_is_below_it() {
    let images = Images::new();
    let mut random = Random::new(12);
    let mut members = vec![images.create("0.qcow2", 4 * M, "cluster_size=4k")];
    for level in 0..4 {
        let member = &members[level];
        paint(member, &mut random, 4 * M, 8);
        snapshot(member, "early");
        paint(member, &mut random, 4 * M, 8);
        snapshot(member, "late");
        paint(member, &mut random, 4 * M, 8);
        let name = format!("{}.qcow2", level + 1);
        members.push(images.overlay(&name, &format!("{level}.qcow2"), "cluster_size=4k"));
    }
    members.reverse();
    let mounted = Mounted::new(&members[0]);
    reads_as(&mounted.disk(), &members[0]);
    for (number, member) in members.iter().enumerate().skip(1) {
        let view = mounted.path(&format!("chain/{number}"));
        reads_as(&view.join("disk.raw"), member);
        for name in ["early", "late"] {
            let snapshot = view.join("snapshots").join(name).join("disk.raw");
            reads_as_snapshot(&snapshot, member, name);
        }
    }
    mounted.umount();
}

#[test]
fn a_chain_of_forty_members_reads_as_qemu_reads_it() {
    let images = Images::new();
    let mut random = Random::new(13);
    let mut top = images.create("0.qcow2", 2 * M, "");
    for level in 1..40 {
        paint(&top, &mut random, 2 * M, 2);
        top = images.overlay(&format!("{level}.qcow2"), &format!("{}.qcow2", level - 1), "");
    }
    let mounted = Mounted::new(&top);
    reads_as(&mounted.disk(), &top);
    reads_as(&mounted.path("chain/20/disk.raw"), &images.path("19.qcow2"));
    mounted.umount();
}

#[test]
fn a_view_reads_the_same_at_any_offset_and_length() {
    let images = Images::new();
    let mut random = Random::new(14);
    let base = images.create("base.qcow2", 4 * M, "cluster_size=1k");
    paint(&base, &mut random, 4 * M, 40);
    let top = images.overlay("top.qcow2", "base.qcow2", "cluster_size=64k");
    paint(&top, &mut random, 4 * M, 10);
    let expected = bytes_of(&top);
    let mounted = Mounted::read_only(&top);
    let view = File::open(mounted.disk()).expect("open");
    for _ in 0..500 {
        let (offset, len) = random.range(4 * M, 300 * K);
        let found = read_at(&view, offset, index(len));
        let part = &expected[index(offset)..index(offset + len)];
        same(&format!("{len} bytes at {offset}"), part, &found);
    }
    assert_eq!(read_at(&view, 4 * M - 10, 100), expected[index(4 * M - 10)..], "at the end");
    assert!(read_at(&view, 4 * M, 100).is_empty(), "past the end");
    drop(view);
    mounted.umount();
}

#[test]
fn many_readers_at_once_get_the_right_bytes() {
    let images = Images::new();
    let mut random = Random::new(15);
    let image = images.create("disk.qcow2", 8 * M, "cluster_size=4k");
    paint(&image, &mut random, 8 * M, 60);
    snapshot(&image, "one");
    paint(&image, &mut random, 8 * M, 20);
    let expected = [bytes_of(&image), bytes_of_snapshot(&image, "one")];
    let mounted = Mounted::new(&image);
    let views = [mounted.disk(), mounted.path("snapshots/one/disk.raw")];
    thread::scope(|scope| {
        for reader in 0..8 {
            let (view, expected) = (&views[reader % 2], &expected[reader % 2]);
            scope.spawn(move || {
                let mut random = Random::new(100 + reader as u64);
                let view = File::open(view).expect("open");
                for _ in 0..150 {
                    let (offset, len) = random.range(8 * M, 128 * K);
                    let found = read_at(&view, offset, index(len));
                    same("a part", &expected[index(offset)..index(offset + len)], &found);
                }
            });
        }
    });
    mounted.umount();
}

#[test]
fn random_chains_read_as_qemu_reads_them() {
    for seed in seeds(6) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let mut name = "0.raw".to_owned();
        let mut members =
            vec![images.raw(&name, &random.bytes(index(512 * (1 + random_size(seed)))))];
        for level in 1..=2 + random.below(4) {
            let size = 512 * (1 + random.below(8 * K));
            let cluster = random.pick(&["512", "4k", "32k", "64k", "1M"]);
            let compat = random.pick(&["0.10", "1.1"]);
            let next = format!("{level}.qcow2");
            let options = format!("compat={compat},cluster_size={cluster}");
            let member = images.overlay_sized(&next, &name, size, &options);
            paint(&member, &mut random, size, 10);
            members.push(member);
            name = next;
        }
        members.reverse();
        let untouched = Untouched::now(&members);
        let mounted = Mounted::new(&members[0]);
        for (number, member) in members.iter().enumerate() {
            reads_as(&mounted.path(&format!("chain/{number}/disk.raw")), member);
        }
        mounted.umount();
        untouched.verify();
    }
}

fn random_size(seed: u64) -> u64 {
    seed.wrapping_mul(977) % (4 * K)
}
