//! fio with verify through file systems on loop devices on the disk, many jobs at once, then the file system's own check.

use std::ffi::OsString;

use crate::support::M;
use crate::support::images::{Images, check, paint};
use crate::support::load::verify_files;
use crate::support::loopdev::{FileSystem, LoopDevice};
use crate::support::mounted::Mounted;
use crate::support::random::Random;
use crate::support::tools::{args, run};

/// XFS takes no less.
const SIZE: u64 = 320 * M;

/// How a file system is made and checked.
struct Kind {
    name: &'static str,
    make: &'static [&'static str],
    check: &'static [&'static str],
}

const EXT4: Kind = Kind { name: "ext4", make: &["mkfs.ext4", "-q"], check: &["e2fsck", "-fn"] };
const XFS: Kind = Kind { name: "xfs", make: &["mkfs.xfs", "-q"], check: &["xfs_repair", "-n"] };
const BTRFS: Kind =
    Kind { name: "btrfs", make: &["mkfs.btrfs", "-q"], check: &["btrfs", "check", "--readonly"] };

impl Kind {
    fn need(&self) {
        let known = std::fs::read_to_string("/proc/filesystems").expect("read /proc/filesystems");
        let here = known.lines().any(|line| line.trim() == self.name);
        assert!(here, "this test needs {} in the kernel: load its module", self.name);
    }

    fn run(words: &[&str], device: &LoopDevice) {
        let mut rest: Vec<OsString> = words[1..].iter().map(OsString::from).collect();
        rest.extend(args![device.path()]);
        run(words[0], &rest);
    }
}

/// Makes the file system on a warm overlay, lets fio work on it past and through the page cache, discards, and checks.
fn withstands_fio(kind: &Kind, cluster: &str) {
    kind.need();
    let images = Images::new();
    let mut random = Random::new(211);
    let base = images.create("base.qcow2", SIZE, "");
    paint(&base, &mut random, 8 * M, 20);
    let image = images.overlay("disk.qcow2", "base.qcow2", &format!("cluster_size={cluster}"));
    paint(&image, &mut random, 8 * M, 20);

    let mounted = Mounted::new(&image);
    let device = LoopDevice::attach(&mounted.disk());
    Kind::run(kind.make, &device);
    let inner = FileSystem::mount(device.path(), "rw");
    verify_files(inner.root(), &[]);
    verify_files(inner.root(), &["--direct=1"]);
    run("fstrim", &args![inner.root()]);
    drop(inner);
    Kind::run(kind.check, &device);
    drop(device);
    mounted.umount();
    check(&image);

    // What a new mount finds is what fio wrote.
    let mounted = Mounted::new(&image);
    let device = LoopDevice::attach(&mounted.disk());
    let inner = FileSystem::mount(device.path(), "rw");
    verify_files(inner.root(), &["--verify_only", "--direct=1"]);
    drop(inner);
    Kind::run(kind.check, &device);
    drop(device);
    mounted.umount();
    check(&image);
}

#[test]
fn fio_finds_what_it_wrote_to_ext4_on_the_disk() {
    withstands_fio(&EXT4, "64k");
}

#[test]
fn fio_finds_what_it_wrote_to_xfs_on_the_disk() {
    withstands_fio(&XFS, "4k");
}

#[test]
#[ignore = "needs btrfs in the kernel: tests/run runs it where that is there"]
fn fio_finds_what_it_wrote_to_btrfs_on_the_disk() {
    withstands_fio(&BTRFS, "64k");
}
