//! `clone`: copies of views that stand alone.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use tempfile::TempDir;

use crate::scratch::{chain, open, scratch};
use crate::support::images::{Images, Untouched, allocated, check, io as qemu_io, snapshot};
use crate::support::loopdev::{FileSystem, LoopDevice};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, info, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs, run};
use crate::support::watchdog::wait_until;
use crate::support::{K, M, index};

/// Clones `address` in both formats, and panics unless QEMU finds `expected` in both.
#[track_caller]
fn clones_to(images: &Images, address: impl AsRef<std::ffi::OsStr>, expected: &[u8]) {
    let place = TempDir::with_prefix("qchainfs-clone-").expect("make a directory");
    let oracle = images.raw("expected.raw", expected);
    for format in ["qcow2", "raw"] {
        let copy = place.path().join(format!("copy.{format}"));
        qchainfs(&args!["clone", "-O", format, address, &copy]).ok();
        let words = args!["compare", "-f", "raw", "-F", format, &oracle, &copy];
        run("qemu-img", &words);
        let said = info(&copy);
        assert_eq!(said["virtual-size"], expected.len());
        assert_eq!(said["backing-filename"], serde_json::Value::Null);
        if format == "qcow2" {
            check(&copy);
        }
    }
}

#[test]
fn every_kind_of_view_becomes_an_image_of_its_own() {
    for seed in seeds(3) {
        let images = Images::new();
        let files = chain(&images, &mut Random::new(seed));
        let untouched = Untouched::now(&files);
        let [top, middle, base] = &files;
        let address = |rest: &str| format!("{}{rest}", top.display());
        clones_to(&images, top, &bytes_of(top));
        clones_to(&images, address("[1]"), &bytes_of(middle));
        clones_to(&images, address("[base.qcow2]"), &bytes_of(base));
        clones_to(&images, address("@one"), &bytes_of_snapshot(top, "one"));
        clones_to(&images, address("@#2"), &bytes_of_snapshot(top, "two"));
        clones_to(&images, address("[1]@mid"), &bytes_of_snapshot(middle, "mid"));
        clones_to(&images, address("[2]@low"), &bytes_of_snapshot(base, "low"));
        // By what the files are told to be rather than by their headers: the middle is left out.
        let composed = images.path("composed.raw");
        let list = format!("{},{}", base.display(), top.display());
        qchainfs(&args!["clone", "-O", "raw", "--chain", &list, top, &composed]).ok();
        let mounted = Mounted::with(&args!["--chain", list], top);
        holds(&mounted.disk(), &fs::read(&composed).expect("read"));
        mounted.umount();
        untouched.verify();
    }
}

#[test]
fn what_a_twin_holds_is_kept_by_cloning_it() {
    let images = Images::new();
    let mut random = Random::new(511);
    let files = chain(&images, &mut random);
    let untouched = Untouched::now(&files);
    let place = TempDir::new().expect("make a directory");
    let mounted = Mounted::with(&scratch(place.path(), ",ro"), &files[0]);
    for (name, original) in [
        ("snapshots/one", bytes_of_snapshot(&files[0], "one")),
        ("chain/1/snapshots/mid", bytes_of_snapshot(&files[1], "mid")),
        ("chain/2", bytes_of(&files[2])),
        (".", bytes_of(&files[0])),
    ] {
        let directory = mounted.path("scratch").join(name);
        clones_to(&images, &directory, &original);
        let disk = open(&directory.join("disk.raw"));
        let mut expected = original;
        for _ in 0..20 {
            let (at, len) = random.range(expected.len() as u64, 100 * K);
            let data = random.bytes(index(len));
            disk.write_all_at(&data, at).expect("write");
            expected[index(at)..index(at + len)].copy_from_slice(&data);
        }
        let copy = images.path("refused.qcow2");
        let said = qchainfs(&args!["clone", &directory, &copy]).fails(1);
        assert!(said.contains("still in use") && !copy.exists(), "{said}");
        drop(disk);
        clones_to(&images, &directory, &expected);
        clones_to(&images, directory.join("disk.raw"), &expected);
    }
    mounted.umount();
    untouched.verify();
}

#[test]
fn nobody_writes_to_a_twin_that_is_kept_still() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    snapshot(&image, "one");
    let place = TempDir::new().expect("make a directory");
    let mounted = Mounted::with(&scratch(place.path(), ""), &image);
    let directory = mounted.path("scratch/snapshots/one");
    let still = File::open(directory.join(".still.raw")).expect("open");
    let writing = || File::options().write(true).open(directory.join("disk.raw"));
    assert_eq!(writing().expect_err("it is kept still").kind(), io::ErrorKind::ResourceBusy);
    File::open(directory.join("disk.raw")).expect("who reads does no harm");
    let refused = File::options().write(true).open(directory.join(".still.raw"));
    assert_eq!(refused.expect_err("it is still").kind(), io::ErrorKind::ReadOnlyFilesystem);
    drop(still);
    wait_until("it can be written again", || writing().is_ok());
    mounted.umount();
}

#[test]
fn views_of_a_live_mount_are_cloned_by_their_directories() {
    let images = Images::new();
    let mut random = Random::new(512);
    let files = chain(&images, &mut random);
    let mounted = Mounted::new(&files[0]);
    open(&mounted.disk()).write_all_at(&random.bytes(300_000), M).expect("write");
    for name in ["snapshots/one", "chain/1", "chain/2/snapshots/low"] {
        let directory = mounted.path(name);
        let expected = fs::read(directory.join("disk.raw")).expect("read");
        clones_to(&images, &directory, &expected);
    }
    let copy = images.path("copy.qcow2");
    for address in [mounted.root().to_path_buf(), mounted.disk()] {
        let said = qchainfs(&args!["clone", address, &copy]).fails(2);
        assert!(said.contains("snapshot") && !copy.exists(), "{said}");
    }
    mounted.umount();
}

#[test]
fn zeroes_take_no_space_in_a_copy() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 512 * M, "");
    // Written zeroes, and data amid zeroes.
    qemu_io(&image, &["write -P 0 0 64M", "write -P 7 100M 4k", "write -z 200M 8M"]);
    let clone = |format: &str| {
        let copy = images.path(&format!("copy.{format}"));
        qchainfs(&args!["clone", "-q", "-O", format, &image, &copy]).ok();
        copy
    };
    assert!(allocated(&clone("qcow2")) < M);
    assert!(allocated(&clone("raw")) < M);
    let words = args!["compare", images.path("copy.qcow2"), images.path("copy.raw")];
    run("qemu-img", &words);
}

#[test]
fn a_copy_never_takes_the_place_of_a_file_and_is_there_whole_or_not_at_all() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 32 * M, "");
    qemu_io(&image, &["write -P 7 0 16M"]);
    let there = images.raw("there.raw", b"mine");
    let said = qchainfs(&args!["clone", &image, &there]).fails(1);
    assert!(said.contains("exists already"), "{said}");
    holds(&there, b"mine");
    std::os::unix::fs::symlink("nowhere", images.path("link")).expect("make a link");
    qchainfs(&args!["clone", &image, images.path("link")]).fails(1);

    let host = FileSystem::with_room_for(4 * M);
    for format in ["qcow2", "raw"] {
        let said = qchainfs(&args!["clone", "-O", format, &image, host.path("copy")]).fails(1);
        assert!(said.contains("copy"), "{said}");
        assert_eq!(fs::read_dir(host.root()).expect("list").count(), 0, "something stayed behind");
    }
    qchainfs(&args!["clone", &image, Path::new("/nowhere/at/all")]).fails(10);

    let copy = images.path("copy.qcow2");
    let said = qchainfs(&args!["clone", "-n", &image, &copy]).ok();
    assert!(said.contains("33554432 bytes") && !copy.exists(), "{said}");
    let outcome = qchainfs(&args!["clone", "--progress", "json", &image, &copy]);
    let last = outcome.stderr.lines().last().expect("a line");
    let last: serde_json::Value = serde_json::from_str(last).expect("it is JSON");
    assert_eq!(last["current-progress"], last["total-progress"]);
    outcome.ok();
    same("the copy", &bytes_of(&image), &bytes_of(&copy));
}

/// Whether the host's file system has some of the bytes of `file` in another one, too.
fn is_shared(file: &Path) -> bool {
    run("filefrag", &args!["-v", "-s", file]).contains("shared")
}

/// Clones views of images on a new file system that `make` makes, where files can share their data, and to it from elsewhere.
fn shares_on(make: &[&str]) {
    let images = Images::new();
    let device = images.path("device");
    File::create(&device).and_then(|file| file.set_len(400 * M)).expect("make a disk");
    let device = LoopDevice::attach(&device);
    let words: Vec<_> = make[1..].iter().map(OsString::from).chain(args![device.path()]).collect();
    run(make[0], &words);
    let inner = FileSystem::mount(device.path(), "rw");
    let mut random = Random::new(517);
    let base = images.create("base.qcow2", 16 * M, "");
    qemu_io(&base, &["write -P 7 0 9M", "write -P 8 11M 1M", "write -z 2M 1M"]);
    let raw = images.raw("plain.raw", &random.bytes(3_000_000));
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    qemu_io(&top, &["write -P 1 1M 2M"]);
    snapshot(&top, "one");
    qemu_io(&top, &["write -P 2 100k 3M", "write -P 3 15M 70000"]);
    let [base, top, raw] = [&base, &top, &raw].map(|image| {
        let there = inner.path(&image.file_name().expect("a name").to_string_lossy());
        fs::copy(image, &there).expect("copy an image");
        there
    });
    run("sync", &args!["-f", base]);
    let untouched = Untouched::now(&[&base, &top, &raw]);
    let with = |rest: &str| OsString::from(format!("{}{rest}", top.display()));
    for (address, expected) in [
        (with(""), bytes_of(&top)),
        (with("@one"), bytes_of_snapshot(&top, "one")),
        (with("[1]"), bytes_of(&base)),
        (raw.clone().into_os_string(), fs::read(&raw).expect("read")),
    ] {
        for (format, when) in [
            ("raw", "always"),
            ("raw", "auto"),
            ("raw", "never"),
            ("qcow2", "always"),
            ("qcow2", "auto"),
            ("qcow2", "never"),
        ] {
            let copy = inner.path(&format!("copy.{format}"));
            let mut words = args!["clone", "-q", "-O", format, "--reflink", when].to_vec();
            if address == raw {
                words.extend(args!["--chain", "raw:".to_owned() + &raw.display().to_string()]);
            }
            words.extend(args![address, copy]);
            qchainfs(&words).ok();
            let mut expected = expected.clone();
            expected.resize(expected.len().next_multiple_of(512), 0);
            same(&format!("{} as {format}", address.display()), &expected, &bytes_of(&copy));
            if format == "qcow2" {
                check(&copy);
            }
            run("sync", &args!["-f", copy]);
            assert_eq!(is_shared(&copy), when != "never", "{} {when}", copy.display());
            fs::remove_file(&copy).expect("remove");
        }
    }
    untouched.verify();
    // To another file system nothing is shared.
    let elsewhere = images.path("elsewhere.raw");
    let always = args!["clone", "-O", "raw", "--reflink", "always", top, elsewhere];
    let said = qchainfs(&always).fails(1);
    assert!(said.contains("can't share the") && said.contains(".qcow2"), "{said}");
    assert!(!elsewhere.exists());
    qchainfs(&args!["clone", "-O", "raw", top, elsewhere]).ok();
    holds(&elsewhere, &bytes_of(&top));
}

#[test]
fn a_copy_on_xfs_shares_the_data_that_it_can() {
    shares_on(&["mkfs.xfs", "-q", "-m", "reflink=1"]);
}

#[test]
#[ignore = "needs btrfs in the kernel: tests/run runs it where that is there"]
fn a_copy_on_btrfs_shares_the_data_that_it_can() {
    shares_on(&["mkfs.btrfs", "-q"]);
}
