//! `qchainfs resize`, compared with `qemu-img resize`.

use std::fs;
use std::path::Path;

use crate::support::images::{Images, Untouched, allocated, check, io, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, same, virtual_size};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs, run};
use crate::support::{K, M, index};

fn resize(image: &Path, size: &str) {
    let said = qchainfs(&args!["resize", "--shrink", image, size]).ok();
    assert_eq!(said, "Image resized.\n");
    check(image);
}

/// The options of `qemu-img create` for an image named `name`.
const KINDS: [&str; 6] = [
    "cluster_size=512",
    "cluster_size=64k",
    "cluster_size=64k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,data_file=",
    "cluster_size=64k,data_file_raw=on,data_file=",
];

#[test]
fn random_sizes_leave_what_qemu_leaves_and_nothing_comes_back() {
    for seed in seeds(10) {
        let mut random = Random::new(seed);
        let images = Images::new();
        let kind = random.pick(&KINDS);
        let options = match kind.ends_with("data_file=") {
            true => format!("{kind}{}", images.path("data").display()),
            false => kind.to_owned(),
        };
        let with_base = !kind.contains("raw") && random.below(2) == 0;
        let size = 512 * (1 + random.below(4 * K));
        let image = if with_base {
            let base = images.create("base.qcow2", 3 * M, "");
            paint(&base, &mut random, 3 * M, 10);
            images.overlay_sized("disk.qcow2", "base.qcow2", size, &options)
        } else {
            images.create("disk.qcow2", size, &options)
        };
        let mut expected = bytes_of(&image);
        for _ in 0..6 {
            paint(&image, &mut random, expected.len() as u64, 4);
            expected = bytes_of(&image);
            let size = 512 * (1 + random.below(6 * K));
            eprintln!("{options}, base: {with_base}, from {} to {size}", expected.len());
            resize(&image, &size.to_string());
            expected.resize(index(size), 0);
            same("after resizing", &expected, &bytes_of(&image));
        }
        if kind.contains("raw") {
            let raw = fs::read(images.path("data")).expect("read the data file");
            same("the data file by itself", &expected, &raw[..expected.len()]);
        }
    }
}

#[test]
fn snapshots_keep_what_the_disk_gives_up() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 3 * M, "cluster_size=4k");
    let mut random = Random::new(71);
    paint(&image, &mut random, 3 * M, 20);
    let before = bytes_of(&image);
    snapshot(&image, "before");
    resize(&image, "700k");
    resize(&image, "3M");
    same("the snapshot", &before, &bytes_of_snapshot(&image, "before"));
    let mounted = Mounted::read_only(&image);
    let found = fs::read(mounted.path("snapshots/before/disk.raw")).expect("read a snapshot");
    same("the snapshot's view", &before, &found);
    mounted.umount();
    let mut now = before[..index(700 * K)].to_vec();
    now.resize(index(3 * M), 0);
    same("the disk", &now, &bytes_of(&image));
}

#[test]
fn sizes_are_absolute_or_differences_and_end_on_sectors() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for (size, expected) in
        [("+1M", 2 * M), ("-512k", 3 * M / 2), ("1000", 1024), ("+1", 1536), ("5G", 5 << 30)]
    {
        resize(&image, size);
        assert_eq!(virtual_size(&image), expected, "after {size}");
    }
}

#[test]
fn a_smaller_disk_needs_the_option_that_says_so() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 5 0 1M"]);
    let untouched = Untouched::now(&[&image]);
    let said = qchainfs(&args!["resize", image, "512k"]).fails(2);
    assert!(said.contains("--shrink") && said.contains("disk.qcow2"), "{said}");
    for nonsense in ["", "-2M", "+", "much", "9E", "-9E"] {
        qchainfs(&args!["resize", "--shrink", image, nonsense]).fails(2);
    }
    let said = qchainfs(&args!["resize", "-n", "--shrink", image, "512k"]).ok();
    assert!(said.contains("1048576") && said.contains("524288"), "{said}");
    untouched.verify();
}

#[test]
fn what_a_disk_gives_up_is_given_back_to_the_host() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 64 * M, "");
    io(&image, &["write -P 5 0 64M"]);
    let before = allocated(&image);
    resize(&image, "1M");
    let after = allocated(&image);
    assert!(before > 64 * M && after < 2 * M, "{before} bytes became {after}");
}

#[test]
fn an_image_that_is_mounted_read_only_is_not_resized() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::read_only(&image);
    qchainfs(&args!["resize", &image, "2M"]).fails(11);
    qchainfs(&args!["resize", mounted.root(), "2M"]).fails(1);
    mounted.umount();
    assert_eq!(virtual_size(&image), M);
}

#[test]
fn qemu_resizes_what_we_resized() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "cluster_size=4k");
    io(&image, &["write -P 5 0 1M"]);
    resize(&image, "300k");
    run("qemu-img", &args!["resize", "-q", image, "900k"]);
    check(&image);
    let mut expected = vec![5; index(300 * K)];
    expected.resize(index(900 * K), 0);
    same("after QEMU grew it", &expected, &bytes_of(&image));
}

#[test]
fn the_disk_of_a_live_mount_becomes_larger_and_never_smaller() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    qchainfs(&args!["resize", "-n", mounted.root(), "+1M"]).ok();
    assert_eq!(fs::metadata(mounted.disk()).expect("stat").len(), M);
    qchainfs(&args!["resize", mounted.root(), "+1M"]).ok();
    assert_eq!(fs::metadata(mounted.disk()).expect("stat").len(), 2 * M);
    qchainfs(&args!["resize", &image, "3M"]).ok();
    assert_eq!(fs::metadata(mounted.disk()).expect("stat").len(), 3 * M);
    qchainfs(&args!["resize", "--shrink", mounted.root(), "1M"]).fails(2);
    mounted.umount();
    assert_eq!(virtual_size(&image), 3 * M);
    check(&image);
}
