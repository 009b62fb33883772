//! The tools that people point at a disk file, on every kind of view.

use std::fs;
use std::path::PathBuf;

use crate::support::images::{Images, paint, snapshot};
use crate::support::loopdev::LoopDevice;
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, same};
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::{K, M};

/// A chain of three with snapshots, mounted read-write.
struct Scene {
    images: Images,
    mounted: Mounted,
    views: Vec<(PathBuf, Vec<u8>)>,
}

impl Scene {
    fn new() -> Self {
        let images = Images::new();
        let mut random = Random::new(151);
        let size = 6 * M + 37 * 512;
        let base = images.raw("base.raw", &random.bytes(crate::support::index(2 * M)));
        let middle = images.overlay_sized("middle.qcow2", "base.raw", size, "cluster_size=4k");
        paint(&middle, &mut random, size, 8);
        snapshot(&middle, "early");
        paint(&middle, &mut random, size, 8);
        let top = images.overlay_sized("top.qcow2", "middle.qcow2", size, "");
        paint(&top, &mut random, size, 4);
        snapshot(&top, "late");
        paint(&top, &mut random, size, 4);
        let expected = [
            ("disk.raw", bytes_of(&top)),
            ("snapshots/late/disk.raw", bytes_of_snapshot(&top, "late")),
            ("chain/1/disk.raw", bytes_of(&middle)),
            ("chain/1/snapshots/early/disk.raw", bytes_of_snapshot(&middle, "early")),
            ("chain/2/disk.raw", bytes_of(&base)),
        ];
        let mounted = Mounted::new(&top);
        let views = expected.into_iter().map(|(view, bytes)| (mounted.path(view), bytes)).collect();
        Self { images, mounted, views }
    }
}

#[test]
fn cp_copies_every_view() {
    let scene = Scene::new();
    let copy = scene.images.path("copy");
    for (view, bytes) in &scene.views {
        for sparse in ["auto", "always", "never"] {
            run("cp", &args![format!("--sparse={sparse}"), view, copy]);
            holds(&copy, bytes);
        }
    }
    scene.mounted.umount();
}

#[test]
fn dd_copies_every_view_with_any_block_size() {
    let scene = Scene::new();
    let copy = scene.images.path("copy");
    for (view, bytes) in &scene.views {
        let (from, to) = (format!("if={}", view.display()), format!("of={}", copy.display()));
        for how in [&["bs=64k"][..], &["bs=1000003"], &["bs=1M", "iflag=direct"], &["bs=512"]] {
            let mut words = args![from, to, "status=none", "conv=sparse"].to_vec();
            words.extend(how.iter().map(std::ffi::OsString::from));
            run("dd", &words);
            holds(&copy, bytes);
        }
    }
    scene.mounted.umount();
}

#[test]
fn tar_packs_every_view() {
    let scene = Scene::new();
    let archive = scene.images.path("archive.tar");
    for (view, bytes) in &scene.views {
        let directory = view.parent().expect("a directory");
        for sparse in ["--sparse", "--no-check-device"] {
            run("tar", &args![sparse, "-cf", archive, "-C", directory, "disk.raw"]);
            run("tar", &args!["-xf", archive, "-C", scene.images.path("")]);
            let copy = scene.images.path("disk.raw");
            holds(&copy, bytes);
            fs::remove_file(&copy).expect("remove the copy");
        }
    }
    scene.mounted.umount();
}

#[test]
fn cmp_and_qemu_img_find_every_view_equal_to_its_bytes() {
    let scene = Scene::new();
    for (view, bytes) in &scene.views {
        let expected = scene.images.raw("expected.raw", bytes);
        run("cmp", &args![view, expected]);
        run("qemu-img", &args!["compare", "-U", "-f", "raw", "-F", "raw", view, expected]);
    }
    scene.mounted.umount();
}

#[test]
fn a_loop_device_reads_every_view() {
    let scene = Scene::new();
    for (view, bytes) in &scene.views {
        let device = LoopDevice::attach(view);
        same("the loop device", bytes, &fs::read(device.path()).expect("read the device"));
        drop(device);
    }
    scene.mounted.umount();
}

#[test]
fn qemu_runs_on_the_disk_file_as_on_a_raw_disk() {
    let scene = Scene::new();
    let (disk, bytes) = &scene.views[0];
    let mut expected = bytes.clone();
    let offset = crate::support::index(M + 700);
    expected[offset..offset + 5000].fill(0x2d);
    let zeros = crate::support::index(3 * M);
    expected[zeros..zeros + crate::support::index(200 * K)].fill(0);
    let write = format!("write -P 0x2d {offset} 5000");
    let words = args!["-f", "raw", "-c", write, "-c", "write -z -u 3M 200k", "-c", "flush", disk];
    run("qemu-io", &words);
    holds(disk, &expected);
    let overlay = scene.images.path("on-top.qcow2");
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", overlay]);
    same("an overlay on the disk file", &expected, &bytes_of(&overlay));
    scene.mounted.umount();
}
