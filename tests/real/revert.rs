//! `revert`: the chain goes on from an older member, live or at rest.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::support::images::{Images, Untouched, check, paint, snapshot};
use crate::support::loopdev::{FileSystem, LoopDevice};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, holds, info, same};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, run};
use crate::support::{M, index};

/// A chain of three images of different content, the top first, the base of `base_size` bytes and the others of 8 MiB.
fn chain(images: &Images, seed: u64, base_size: u64) -> [PathBuf; 3] {
    let mut random = Random::new(seed);
    let base = images.create("base.qcow2", base_size, "");
    let middle = images.overlay("middle.qcow2", "base.qcow2", "");
    run("qemu-img", &args!["resize", "-q", &middle, "8M"]);
    let top = images.overlay("top.qcow2", "middle.qcow2", "");
    paint(&base, &mut random, base_size, 10);
    paint(&middle, &mut random, 8 * M, 10);
    paint(&top, &mut random, 8 * M, 10);
    [top, middle, base]
}

fn backing_of(image: &Path) -> Option<String> {
    info(image)["backing-filename"].as_str().map(str::to_owned)
}

#[test]
fn a_live_disk_goes_back_to_any_member_and_no_file_is_lost() {
    for (number, base_size) in [(1, 8 * M), (2, 8 * M), (2, 3 * M + 512)] {
        let images = Images::new();
        let files = chain(&images, 501, base_size);
        snapshot(&files[1], "early");
        let before: Vec<Vec<u8>> = files.iter().map(|file| bytes_of(file)).collect();
        let mounted = Mounted::new(&files[0]);
        let mut random = Random::new(502);
        let disk = File::options().write(true).open(mounted.disk()).expect("open");
        let late = random.bytes(100_000);
        disk.write_all_at(&late, M).expect("write");
        let address = format!("{}[{number}]", mounted.root().display());
        let new = images.path("new.qcow2");

        let said = qchainfs(&args!["revert", mounted.root(), &address, &new]).fails(1);
        assert!(said.contains("open for writing"), "{said}");
        assert!(!new.exists());
        drop(disk);
        let said = qchainfs(&args!["revert", "-n", mounted.root(), &address, &new]).ok();
        assert!(said.contains("top.qcow2") && !new.exists(), "{said}");

        let reader = File::open(mounted.disk()).expect("open");
        let old = File::open(mounted.path("chain/1/disk.raw")).expect("open");
        let said = qchainfs(&args!["revert", mounted.root(), &address, &new]).ok();
        for (member, file) in files.iter().enumerate() {
            let left = said.lines().any(|line| line.trim() == file.display().to_string());
            assert_eq!(left, member < number, "{said}");
        }
        let expected = &before[number];
        holds(&mounted.disk(), expected);
        assert_eq!(fs::metadata(mounted.disk()).expect("stat").len(), expected.len() as u64);
        holds(&mounted.path("chain/1/disk.raw"), expected);
        let mut bytes = vec![0; expected.len()];
        reader.read_exact_at(&mut bytes, 0).expect("read");
        same("the disk for one who had it open", expected, &bytes);
        let mut bytes = vec![0; before[1].len()];
        old.read_exact_at(&mut bytes, 0).expect("read");
        same("a view that is open and no longer shown", &before[1], &bytes);
        let has_snapshot = mounted.path("chain/1/snapshots/early").exists();
        assert_eq!(has_snapshot, number == 1);
        drop((reader, old));

        let disk = File::options().write(true).open(mounted.disk()).expect("open");
        disk.write_all_at(&late, M / 2).expect("write after that");
        drop(disk);
        let mut expected = expected.clone();
        expected[index(M / 2)..][..late.len()].copy_from_slice(&late);
        holds(&mounted.disk(), &expected);
        mounted.umount();
        same("the new image", &expected, &bytes_of(&new));
        let name = files[number].file_name().expect("a name").to_str().expect("text");
        assert_eq!(backing_of(&new).as_deref(), Some(name));
        let mut top = before[0].clone();
        top[index(M)..][..late.len()].copy_from_slice(&late);
        same("the image that was on top", &top, &bytes_of(&files[0]));
        same("the one below", &before[1], &bytes_of(&files[1]));
        for file in files.iter().chain([&new]) {
            check(file);
        }
    }
}

#[test]
fn images_at_rest_are_reverted_without_a_change() {
    let images = Images::new();
    let [top, middle, base] = chain(&images, 503, 8 * M);
    let untouched = Untouched::now(&[&top, &middle, &base]);
    let said = qchainfs(&args!["revert", &top, "[1]"]).ok();
    let first = images.path("top.1.qcow2");
    assert!(said.contains("top.1.qcow2"), "{said}");
    qchainfs(&args!["revert", "-q", &top, &base]).ok();
    let second = images.path("top.2.qcow2");
    let by_name = images.path("by-name.qcow2");
    let address = format!("{}[base.qcow2]", top.display());
    qchainfs(&args!["revert", "-q", &top, &address, &by_name]).ok();
    for (new, member) in [(&first, &middle), (&second, &base), (&by_name, &base)] {
        check(new);
        same("the new image", &bytes_of(member), &bytes_of(new));
        assert_eq!(
            images.path(&backing_of(new).expect("a backing file")).canonicalize().expect("there"),
            member.canonicalize().expect("there")
        );
    }
    untouched.verify();
}

#[test]
fn a_raw_base_is_a_place_to_go_back_to() {
    let images = Images::new();
    let bytes = Random::new(504).bytes(index(2 * M));
    let base = images.raw("base.img", &bytes);
    let top = images.path("top.qcow2");
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", &top]);
    paint(&top, &mut Random::new(505), 2 * M, 10);
    let mounted = Mounted::new(&top);
    qchainfs(&args!["revert", &top, &base]).ok();
    holds(&mounted.disk(), &bytes);
    mounted.umount();
    let new = images.path("top.1.qcow2");
    assert_eq!(info(&new)["backing-filename-format"], "raw");
    same("the new image", &bytes, &bytes_of(&new));
}

#[test]
fn what_is_no_older_member_is_refused_and_nothing_happens() {
    let images = Images::new();
    let [top, middle, _] = chain(&images, 506, 8 * M);
    let stranger = images.create("stranger.qcow2", M, "");
    snapshot(&middle, "early");
    let precious = images.raw("precious.img", b"precious");
    let mounted = Mounted::new(&top);
    let before = fs::read(mounted.disk()).expect("read");
    for target in [&top, &mounted.root().to_path_buf()] {
        for (address, code, word) in [
            ("[0]".to_owned(), 2, "active layer"),
            (top.display().to_string(), 2, "active layer"),
            ("[3]".to_owned(), 10, "no member"),
            (stranger.display().to_string(), 10, "no member"),
            ("[nonsense.qcow2]".to_owned(), 10, "no member"),
            (format!("{}[1]@early", top.display()), 2, "internal snapshot"),
        ] {
            let said = qchainfs(&args!["revert", target, &address]).fails(code);
            assert!(said.contains(word), "{address}: {said}");
        }
        let said = qchainfs(&args!["revert", target, "[1]", &precious]).fails(1);
        assert!(said.contains("exists already"), "{said}");
        assert!(said.contains("--force"), "{said}");
        qchainfs(&args!["revert", "-n", target, "[1]", &precious]).fails(1);
        qchainfs(&args!["revert", "-n", "--force", target, "[1]", &middle]).fails(1);
        let said = qchainfs(&args!["revert", "--force", target, "[1]", &middle]).fails(1);
        assert!(said.contains("part of the chain"), "{said}");
    }
    assert_eq!(fs::read(&precious).expect("read"), b"precious");
    assert!(!images.path("top.1.qcow2").exists());
    holds(&mounted.disk(), &before);
    mounted.umount();
    check(&top);
}

#[test]
fn a_disk_whose_file_system_is_mounted_is_not_reverted_under_it() {
    let images = Images::new();
    images.create("base.qcow2", 32 * M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let mounted = Mounted::new(&top);
    let device = LoopDevice::attach(&mounted.disk());
    run("mkfs.ext4", &args!["-q", device.path()]);
    let inner = FileSystem::mount(device.path(), "rw");
    let said = qchainfs(&args!["revert", mounted.root(), "[1]"]).fails(1);
    let number = device.path().display().to_string();
    assert!(said.contains("open for writing") && said.contains(&number), "{said}");
    drop(inner);
    drop(device);
    // One that can't write remembers what it has read all the same.
    let device = LoopDevice::attach_read_only(&mounted.disk());
    let name = device.path().display().to_string();
    qchainfs(&args!["snapshot", "create", mounted.root(), "now"]).ok();
    let revert = qchainfs(&args!["revert", mounted.root(), "[1]"]).fails(1);
    let apply = qchainfs(&args!["snapshot", "apply", mounted.root(), "now"]).fails(1);
    for said in [revert, apply] {
        assert!(said.contains("still in use") && said.contains(&name), "{said}");
    }
    drop(device);
    let elsewhere = LoopDevice::attach_read_only(&mounted.path("chain/1/disk.raw"));
    qchainfs(&args!["revert", mounted.root(), "[1]"]).ok();
    drop(elsewhere);
    assert!(fs::read(mounted.disk()).expect("read").iter().all(|&byte| byte == 0));
    mounted.umount();
}
