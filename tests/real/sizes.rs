//! Members and snapshots of different sizes.

use std::fs;

use crate::support::images::{Images, io, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, holds, read_at, reads_as, same};
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::{M, index};

#[test]
fn past_the_end_of_a_short_member_the_disk_is_zero_and_nothing_deeper_shows_through() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 0x44 0 4M"]);
    let middle = images.overlay_sized("middle.qcow2", "base.qcow2", 2 * M, "");
    io(&middle, &["write -P 0x22 1M 64k"]);
    let top = images.overlay_sized("top.qcow2", "middle.qcow2", 6 * M, "");
    io(&top, &["write -P 0x66 3M 64k"]);
    let mounted = Mounted::read_only(&top);
    reads_as(&mounted.disk(), &top);
    reads_as(&mounted.path("chain/1/disk.raw"), &middle);
    reads_as(&mounted.path("chain/2/disk.raw"), &base);
    mounted.umount();
}

#[test]
fn a_long_base_is_cut_at_the_size_of_its_overlay() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 0x44 0 4M"]);
    let top = images.overlay_sized("top.qcow2", "base.qcow2", M + 1536, "");
    let mounted = Mounted::read_only(&top);
    assert_eq!(fs::metadata(mounted.disk()).expect("stat").len(), M + 1536);
    reads_as(&mounted.disk(), &top);
    reads_as(&mounted.path("chain/1/disk.raw"), &base);
    mounted.umount();
}

#[test]
fn a_short_base_that_ends_inside_a_cluster_is_zero_from_there_on() {
    let images = Images::new();
    let mut random = Random::new(21);
    for cluster in ["4k", "64k", "2M"] {
        let size = index(M) + 512 * 7;
        images.raw("base.raw", &random.bytes(size));
        let options = format!("cluster_size={cluster}");
        let top = images.overlay_sized("top.qcow2", "base.raw", 3 * M, &options);
        io(&top, &["write -P 5 1000k 512"]);
        let mounted = Mounted::read_only(&top);
        reads_as(&mounted.disk(), &top);
        mounted.umount();
    }
}

#[test]
fn a_raw_member_is_rounded_up_to_whole_sectors() {
    let images = Images::new();
    let base = images.raw("base.raw", &[0x55; 1000]);
    let top = images.overlay("top.qcow2", "base.raw", "");
    let mounted = Mounted::read_only(&top);
    assert_eq!(fs::metadata(mounted.path("chain/1/disk.raw")).expect("stat").len(), 1024);
    reads_as(&mounted.path("chain/1/disk.raw"), &base);
    reads_as(&mounted.disk(), &top);
    mounted.umount();
}

#[test]
fn a_disk_that_ends_inside_a_cluster_ends_there() {
    let images = Images::new();
    for size in [512, 1024, 65536 - 512, 65536 + 512, M + 4096 + 512] {
        let image = images.create("odd.qcow2", size, "");
        io(&image, &[format!("write -P 3 0 {size}")]);
        let mounted = Mounted::new(&image);
        holds(&mounted.disk(), &vec![3; index(size)]);
        mounted.umount();
    }
}

#[test]
fn a_snapshot_taken_before_the_disk_grew_keeps_its_own_size() {
    let images = Images::new();
    let base = images.create("base.qcow2", 8 * M, "");
    io(&base, &["write -P 0x77 0 8M"]);
    let image = images.overlay_sized("top.qcow2", "base.qcow2", 4 * M, "");
    io(&image, &["write -P 1 3M 512k"]);
    let before = bytes_of(&image);
    snapshot(&image, "small");
    run("qemu-img", &args!["resize", "-q", image, "8M"]);
    io(&image, &["write -P 2 3M 3M"]);
    let mounted = Mounted::new(&image);
    holds(&mounted.path("snapshots/small/disk.raw"), &before);
    reads_as(&mounted.disk(), &image);
    mounted.umount();
}

#[test]
fn a_snapshot_taken_before_the_disk_shrank_keeps_its_own_size() {
    let images = Images::new();
    let mut random = Random::new(22);
    let image = images.create("disk.qcow2", 8 * M, "");
    paint(&image, &mut random, 8 * M, 20);
    let before = bytes_of(&image);
    snapshot(&image, "large");
    run("qemu-img", &args!["resize", "-q", "--shrink", image, "4M"]);
    let mounted = Mounted::new(&image);
    holds(&mounted.path("snapshots/large/disk.raw"), &before);
    reads_as(&mounted.disk(), &image);
    mounted.umount();
}

#[test]
fn a_disk_of_64_terabytes_is_mounted_and_read_at_its_end() {
    let images = Images::new();
    let image = images.create("vast.qcow2", 1 << 46, "cluster_size=2M");
    let offset = (1 << 46) - M;
    io(&image, &[format!("write -P 0x6b {offset} 512")]);
    let mounted = Mounted::new(&image);
    let disk = fs::File::open(mounted.disk()).expect("open");
    assert_eq!(disk.metadata().expect("stat").len(), 1 << 46);
    let expected = [vec![0; 512], vec![0x6b; 512], vec![0; 512]].concat();
    same("the end", &expected, &read_at(&disk, offset - 512, 1536));
    drop(disk);
    mounted.umount();
}
