//! Real use: file systems and partitions through loop devices on the views.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::support::images::{Images, Untouched, allocated, check, snapshot};
use crate::support::loopdev::{FileSystem, LoopDevice};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, same};
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::{M, index};

const FILES: [(&str, usize); 4] = [("empty", 0), ("small", 100), ("odd", 70_001), ("big", 5 << 20)];

/// The bytes that every test gives to the file `name`.
fn content(name: &str, len: usize) -> Vec<u8> {
    Random::new(name.len() as u64).bytes(len)
}

fn write_files(root: &Path) {
    for (name, len) in FILES {
        fs::write(root.join(name), content(name, len)).expect("write a file");
    }
}

fn verify_files(root: &Path) {
    for (name, len) in FILES {
        same(name, &content(name, len), &fs::read(root.join(name)).expect("read a file"));
    }
}

/// A qcow2 image that holds an ext4 with the files.
fn image_with_files(images: &Images) -> PathBuf {
    let source = images.path("source");
    fs::create_dir(&source).expect("make a directory");
    write_files(&source);
    let raw = images.raw("ext4.raw", &[]);
    run("truncate", &args!["-s", "32M", raw]);
    run("mkfs.ext4", &args!["-q", "-d", source, raw]);
    let image = images.path("disk.qcow2");
    run("qemu-img", &args!["convert", "-f", "raw", "-O", "qcow2", raw, image]);
    image
}

#[test]
fn an_ext4_made_and_filled_on_the_active_layer_is_whole_afterwards() {
    for options in ["compat=1.1", "compat=0.10,cluster_size=4k"] {
        let images = Images::new();
        images.create("base.qcow2", 48 * M, options);
        let image = images.overlay("disk.qcow2", "base.qcow2", options);
        let mounted = Mounted::new(&image);
        let device = LoopDevice::attach(&mounted.disk());
        run("mkfs.ext4", &args!["-q", device.path()]);
        let inner = FileSystem::mount(device.path(), "rw");
        write_files(inner.root());
        run("fstrim", &args![inner.root()]);
        verify_files(inner.root());
        drop(inner);
        run("e2fsck", &args!["-fn", device.path()]);
        drop(device);
        mounted.umount();

        check(&image);
        let raw = images.raw("flat.raw", &bytes_of(&image));
        run("e2fsck", &args!["-fn", raw]);
        verify_files(FileSystem::mount(&raw, "loop,ro").root());
    }
}

#[test]
fn a_file_system_trimmed_after_a_deletion_gives_space_back_to_the_host() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 48 * M, "");
    let mounted = Mounted::new(&image);
    let device = LoopDevice::attach(&mounted.disk());
    run("mkfs.ext4", &args!["-q", device.path()]);
    let inner = FileSystem::mount(device.path(), "rw");
    fs::write(inner.path("big"), content("big", index(24 * M))).expect("write a file");
    run("sync", &args!["-f", inner.root()]);
    let full = allocated(&image);
    fs::remove_file(inner.path("big")).expect("remove a file");
    run("sync", &args!["-f", inner.root()]);
    run("fstrim", &args![inner.root()]);
    drop(inner);
    drop(device);
    mounted.umount();
    check(&image);
    let left = allocated(&image);
    assert!(left + 20 * M < full, "{full} bytes before the deletion, {left} after it");
}

#[test]
fn a_file_system_in_a_snapshot_is_mounted_as_it_was() {
    let images = Images::new();
    let image = image_with_files(&images);
    snapshot(&image, "good");
    let top = images.overlay("top.qcow2", "disk.qcow2", "");
    let untouched = Untouched::now(&[&image]);
    let mounted = Mounted::new(&top);
    let disk = File::options().write(true).open(mounted.disk()).expect("open");
    disk.write_all_at(&vec![0xff; index(16 * M)], 0).expect("destroy the file system");
    drop(disk);
    for view in ["chain/1/disk.raw", "chain/1/snapshots/good/disk.raw"] {
        verify_files(FileSystem::mount(&mounted.path(view), "loop,ro").root());
    }
    mounted.umount();
    untouched.verify();
}

#[test]
fn a_read_only_mount_of_the_chain_holds_a_mountable_file_system() {
    let images = Images::new();
    let image = image_with_files(&images);
    let untouched = Untouched::now(&[&image]);
    let mounted = Mounted::read_only(&image);
    verify_files(FileSystem::mount(&mounted.disk(), "loop,ro").root());
    mounted.umount();
    untouched.verify();
}

#[test]
fn a_partition_file_is_mounted_without_a_partition_scan() {
    let images = Images::new();
    let inner_image = image_with_files(&images);
    let mut disk = vec![0; index(40 * M)];
    disk[index(M)..index(33 * M)].copy_from_slice(&bytes_of(&inner_image));
    // An MBR with one Linux partition of 32 MiB at 1 MiB.
    disk[446 + 4] = 0x83;
    disk[446 + 8..446 + 12].copy_from_slice(&2048_u32.to_le_bytes());
    disk[446 + 12..446 + 16].copy_from_slice(&65536_u32.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let raw = images.raw("whole.raw", &disk);
    let image = images.path("whole.qcow2");
    run("qemu-img", &args!["convert", "-f", "raw", "-O", "qcow2", raw, image]);

    let mounted = Mounted::new(&image);
    verify_files(FileSystem::mount(&mounted.path("p1"), "loop,ro").root());
    let inner = FileSystem::mount(&mounted.path("p1"), "loop");
    fs::write(inner.path("new"), "by way of p1").expect("write a file");
    drop(inner);

    let device = LoopDevice::attach(&mounted.disk());
    let partitions = device.partitions();
    assert_eq!(partitions.len(), 1, "{partitions:?}");
    let inner = FileSystem::mount(&partitions[0], "ro");
    verify_files(inner.root());
    assert_eq!(fs::read_to_string(inner.path("new")).expect("read a file"), "by way of p1");
    drop(inner);
    drop(device);
    mounted.umount();
    check(&image);
}

#[test]
fn a_loop_device_with_direct_io_reads_and_writes_the_disk() {
    let images = Images::new();
    let mut random = Random::new(141);
    let image = images.create("disk.qcow2", 16 * M, "");
    let source = images.raw("source.raw", &random.bytes(index(16 * M)));
    let mounted = Mounted::new(&image);
    let device = LoopDevice::attach(&mounted.disk());
    run("losetup", &args!["--direct-io=on", device.path()]);
    let (from, to) = (format!("if={}", source.display()), device.path().display());
    let to = format!("of={to}");
    run("dd", &args![from, to, "bs=1M", "oflag=direct", "conv=fsync", "status=none"]);
    run("cmp", &args![source, device.path()]);
    drop(device);
    mounted.umount();
    check(&image);
    same("the disk", &bytes_of(&source), &bytes_of(&image));
}
