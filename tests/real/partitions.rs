//! Partitions as files of their own.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::images::{Images, Untouched, io, snapshot};
use crate::support::loopdev::FileSystem;
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, holds, read_at, same};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, run, start};
use crate::support::writer::Writer;
use crate::support::{M, index};
use crate::tree::names_in;

const GPT: &str = "label: gpt\nstart=2048,size=8192\nstart=12288,size=4096\n";
const MBR: &str = "label: dos\nstart=2048,size=4096\nstart=8192,size=16384,type=5\n\
                   start=10240,size=2048,type=83\nstart=14336,size=4096,type=83\n";

/// Writes a partition table into a raw disk.
fn partition(disk: &Path, table: &str) {
    let mut command = Command::new("sfdisk");
    command.args(["-q", "--no-reread", "--no-tell-kernel"]).arg(disk).stdin(Stdio::piped());
    let mut sfdisk = start(&mut command);
    let mut input = sfdisk.stdin.take().expect("a pipe");
    input.write_all(table.as_bytes()).expect("write to sfdisk");
    drop(input);
    assert!(sfdisk.wait().expect("wait for sfdisk").success());
}

/// A qcow2 image of 16 MiB of noise with a partition table.
fn partitioned(images: &Images, table: &str) -> (PathBuf, Vec<u8>) {
    let raw = images.raw("raw.raw", &Random::new(121).bytes(index(16 * M)));
    File::options()
        .write(true)
        .open(&raw)
        .expect("open")
        .write_all_at(&[0; 65536], 0)
        .expect("wipe");
    partition(&raw, table);
    let image = images.path("disk.qcow2");
    run("qemu-img", &args!["convert", "-f", "raw", "-O", "qcow2", raw, image]);
    (image, fs::read(&raw).expect("read"))
}

fn part(disk: &[u8], start: usize, sectors: usize) -> &[u8] {
    &disk[start * 512..(start + sectors) * 512]
}

#[test]
fn the_partitions_of_a_gpt_are_files() {
    let images = Images::new();
    let (image, disk) = partitioned(&images, GPT);
    let mounted = Mounted::new(&image);
    let names = ["chain", "disk.raw", "info.json", "p1", "p2", "snapshots"];
    assert_eq!(names_in(mounted.root()), names);
    holds(&mounted.path("p1"), part(&disk, 2048, 8192));
    holds(&mounted.path("p2"), part(&disk, 12288, 4096));
    holds(&mounted.path("chain/0/p2"), part(&disk, 12288, 4096));
    mounted.umount();
}

#[test]
fn logical_partitions_of_an_mbr_are_files_from_number_5_on() {
    let images = Images::new();
    let (image, disk) = partitioned(&images, MBR);
    let mounted = Mounted::new(&image);
    let names = names_in(mounted.root());
    for name in ["p1", "p5", "p6"] {
        assert!(names.iter().any(|found| found == name), "{name} is not among {names:?}");
    }
    holds(&mounted.path("p1"), part(&disk, 2048, 4096));
    holds(&mounted.path("p5"), part(&disk, 10240, 2048));
    holds(&mounted.path("p6"), part(&disk, 14336, 4096));
    mounted.umount();
}

#[test]
fn snapshots_and_members_have_the_partitions_of_their_moment() {
    let images = Images::new();
    let (base, disk) = partitioned(&images, GPT);
    snapshot(&base, "two partitions");
    let top = images.overlay("top.qcow2", "disk.qcow2", "");
    let mounted = Mounted::new(&top);
    partition(&mounted.disk(), "label: gpt\nstart=2048,size=2048\n");
    mounted.umount();
    let mounted = Mounted::read_only(&top);
    assert_eq!(fs::metadata(mounted.path("p1")).expect("stat").len(), M);
    assert!(!mounted.path("p2").exists(), "a partition of the base shows through");
    for view in ["chain/1", "chain/1/snapshots/two partitions"] {
        holds(&mounted.path(view).join("p2"), part(&disk, 12288, 4096));
    }
    mounted.umount();
}

#[test]
fn a_write_to_a_partition_and_one_to_the_disk_are_the_same_bytes() {
    let images = Images::new();
    let (image, _) = partitioned(&images, GPT);
    let mut writer = Writer::open(&image);
    let p1 =
        File::options().read(true).write(true).open(writer.mounted().path("p1")).expect("open");
    let start = 2048 * 512;
    // Both page caches are warm when the other name is written to.
    let _ = (read_at(&p1, 0, 65536), read_at(writer.file(), start, 65536));
    for round in 0..20_u8 {
        let offset = u64::from(round) * 3000;
        p1.write_all_at(&[round; 1000], offset).expect("write to the partition");
        let found = read_at(writer.file(), start + offset, 1000);
        same("the disk after a write to the partition", &[round; 1000], &found);
        writer.bytes_mut()[index(start + offset)..][..1000].fill(round);
        writer.fill(start + offset + 1000, 1000, round + 100);
        let found = read_at(&p1, offset + 1000, 1000);
        same("the partition after a write to the disk", &[round + 100; 1000], &found);
    }
    drop(p1);
    writer.close();
}

#[test]
fn a_partition_keeps_its_size_and_its_neighbours() {
    let images = Images::new();
    let (image, _) = partitioned(&images, GPT);
    let writer = Writer::open(&image);
    let p1 = File::options().write(true).open(writer.mounted().path("p1")).expect("open");
    let size = 8192 * 512;
    for wrong in [0, size - 512, size + 512] {
        assert!(p1.set_len(wrong).is_err(), "the partition has now {wrong} bytes");
    }
    assert!(p1.write_at(&[1; 512], size).is_err(), "a write behind the partition");
    drop(p1);
    writer.close();
}

#[test]
fn a_broken_partition_table_does_not_keep_a_disk_from_being_mounted() {
    let images = Images::new();
    let (image, mut disk) = partitioned(&images, GPT);
    let noise = Random::new(122).bytes(4096);
    let raw = images.path("raw.raw");
    disk[600..600 + noise.len()].copy_from_slice(&noise);
    fs::write(&raw, &disk).expect("write");
    run("qemu-img", &args!["convert", "-f", "raw", "-O", "qcow2", raw, image]);
    let mounted = Mounted::new(&image);
    holds(&mounted.disk(), &disk);
    mounted.umount();
}

#[test]
fn partitions_of_members_that_look_alike_on_two_file_systems_are_two_files() {
    let images = Images::new();
    let (image, disk) = partitioned(&images, GPT);
    let (above, below) = (FileSystem::in_memory(), FileSystem::in_memory());
    let (top, base) = (above.path("disk.qcow2"), below.path("disk.qcow2"));
    fs::copy(&image, &base).expect("copy an image");
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top]);
    let inode = |file: &Path| fs::metadata(file).expect("stat").ino();
    assert_eq!(inode(&top), inode(&base), "the members do not look alike");
    io(&top, &["write -P 7 1M 4M"]);
    let untouched = Untouched::now(&[&base]);
    let mounted = Mounted::with(&args!["-o", "backing_policy=any"], &top);
    let (ours, theirs) = (mounted.path("p1"), mounted.path("chain/1/p1"));
    assert_ne!(inode(&ours), inode(&theirs));
    for _ in 0..2 {
        holds(&ours, &vec![7; index(4 * M)]);
        holds(&theirs, part(&disk, 2048, 8192));
    }
    assert!(File::options().write(true).open(&theirs).is_err(), "a base can be written");
    mounted.umount();
    untouched.verify();
}

#[test]
fn members_that_look_alike_are_told_apart_when_the_chain_changes() {
    let images = Images::new();
    let (image, disk) = partitioned(&images, GPT);
    let (above, below) = (FileSystem::in_memory(), FileSystem::in_memory());
    let (top, base) = (above.path("disk.qcow2"), below.path("disk.qcow2"));
    fs::copy(&image, &base).expect("copy an image");
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top]);
    io(&top, &["write -P 7 1M 4M"]);
    let inode = |file: &Path| fs::metadata(file).expect("stat").ino();
    assert_eq!(inode(&top), inode(&base), "the members do not look alike");
    let mounted = Mounted::with(&args!["-o", "backing_policy=any"], &top);
    let path = |inside: &str| mounted.path(inside);
    let (of_top, of_base) = (bytes_of(&top), disk.clone());
    let sevens = vec![7; index(4 * M)];
    // Read, so that the kernel remembers all of it.
    holds(&path("chain/1/disk.raw"), &of_base);
    holds(&path("chain/1/p1"), part(&disk, 2048, 8192));
    let number = inode(&path("chain/1/disk.raw"));

    qchainfs(&args!["overlay", mounted.root(), images.path("new.qcow2")]).ok();
    holds(&path("chain/1/disk.raw"), &of_top);
    holds(&path("chain/1/p1"), &sevens);
    holds(&path("chain/2/disk.raw"), &of_base);
    holds(&path("chain/2/p1"), part(&disk, 2048, 8192));
    assert_eq!(inode(&path("chain/2/disk.raw")), number, "an old file has another number");

    qchainfs(&args!["revert", mounted.root(), "[2]", images.path("back.qcow2")]).ok();
    holds(&path("chain/1/disk.raw"), &of_base);
    holds(&path("chain/1/p1"), part(&disk, 2048, 8192));
    holds(&path("disk.raw"), &of_base);
    assert_eq!(inode(&path("chain/1/disk.raw")), number, "an old file has another number");
    mounted.umount();
}

#[test]
fn partitions_are_looked_at_anew_when_the_disk_has_grown() {
    let images = Images::new();
    let (image, _) = partitioned(&images, "label: dos\nstart=16384,size=16384\n");
    run("qemu-img", &args!["resize", "-q", "--shrink", image, "12M"]);
    let mounted = Mounted::with(&args!["-o", "growable"], &image);
    let length = || fs::metadata(mounted.path("p1")).expect("stat").len();
    assert_eq!(length(), 4 * M);
    File::options().write(true).open(mounted.disk()).expect("open").set_len(16 * M).expect("grow");
    assert_eq!(length(), 8 * M);
    mounted.umount();
}
