//! `-o scratch`: writable throwaway twins of views.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::thread;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use crate::support::images::{Images, Untouched, check, paint, snapshot};
use crate::support::loopdev::{FileSystem, LoopDevice};
use crate::support::mounted::{Mounted, is_running};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, read_at, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs, run};
use crate::support::watchdog::wait_until;
use crate::support::{K, M, index};
use crate::tree::names_in;

/// The options of a mount whose twins write to `directory`.
pub fn scratch(directory: &Path, others: &str) -> [OsString; 2] {
    let option = format!("scratch={}{others}", directory.display());
    args!["-o", option]
}

pub fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).expect("open for writing")
}

/// A chain of three with a snapshot in each qcow2 image and sizes that differ; the top first.
pub fn chain(images: &Images, random: &mut Random) -> [std::path::PathBuf; 3] {
    let base = images.create("base.qcow2", 5 * M, "cluster_size=4k");
    paint(&base, random, 5 * M, 12);
    snapshot(&base, "low");
    paint(&base, random, 5 * M, 6);
    let middle = images.overlay_sized("middle.qcow2", "base.qcow2", 8 * M, "");
    paint(&middle, random, 8 * M, 8);
    snapshot(&middle, "mid");
    paint(&middle, random, 8 * M, 4);
    let top = images.overlay_sized("top.qcow2", "middle.qcow2", 7 * M, "extended_l2=on");
    paint(&top, random, 7 * M, 6);
    snapshot(&top, "one");
    paint(&top, random, 7 * M, 6);
    snapshot(&top, "two");
    [top, middle, base]
}

/// The directories of all views that have a twin in a read-only mount of [`chain`].
const VIEWS: [&str; 7] = [
    ".",
    "snapshots/one",
    "snapshots/two",
    "chain/1",
    "chain/1/snapshots/mid",
    "chain/2",
    "chain/2/snapshots/low",
];

/// A twin and what it has to hold.
struct Model {
    disk: File,
    bytes: Vec<u8>,
}

impl Model {
    fn step(&mut self, random: &mut Random) {
        let (at, len) = random.range(self.bytes.len() as u64, 200 * K);
        let range = index(at)..index(at + len);
        match random.below(5) {
            0 => {
                let punch =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&self.disk, punch, at.cast_signed(), len.cast_signed()).expect("discard");
                self.bytes[range].fill(0);
            }
            1 => self.disk.sync_all().expect("sync"),
            2 => {
                let found = read_at(&self.disk, at, index(len));
                same("a part of a twin", &self.bytes[range], &found);
            }
            _ => {
                let data = random.bytes(index(len));
                self.disk.write_all_at(&data, at).expect("write to a twin");
                self.bytes[range].copy_from_slice(&data);
            }
        }
    }
}

#[test]
fn a_twin_is_its_view_and_what_is_written_to_it_shows_nowhere_else() {
    for seed in seeds(3) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let files = chain(&images, &mut random);
        let untouched = Untouched::now(&files);
        let place = TempDir::new().expect("make a directory");
        let mounted = Mounted::with(&scratch(place.path(), ",ro"), &files[0]);
        let view = |name: &str| mounted.path(name).join("disk.raw");
        let twin = |name: &str| mounted.path("scratch").join(name).join("disk.raw");
        let originals: BTreeMap<&str, Vec<u8>> =
            VIEWS.into_iter().map(|name| (name, fs::read(view(name)).expect("read"))).collect();
        for name in VIEWS {
            holds(&twin(name), &originals[name]);
        }
        thread::scope(|scope| {
            for name in VIEWS.into_iter().filter(|name| *name != "snapshots/two") {
                let mut random = Random::new(random.any());
                let mut model = Model { disk: open(&twin(name)), bytes: originals[name].clone() };
                let twin = &twin;
                scope.spawn(move || {
                    (0..60).for_each(|_| model.step(&mut random));
                    holds(&twin(name), &model.bytes);
                });
            }
        });
        holds(&twin("snapshots/two"), &originals["snapshots/two"]);
        for name in VIEWS {
            holds(&view(name), &originals[name]);
        }
        same("the base's snapshot", &bytes_of_snapshot(&files[2], "low"), &originals[VIEWS[6]]);
        assert!(names_in(place.path()).is_empty());
        mounted.umount();
        assert!(names_in(place.path()).is_empty());
        untouched.verify();
        same("the disk", &bytes_of(&files[0]), &originals["."]);
    }
}

#[test]
fn writers_of_one_twin_side_by_side_lose_nothing() {
    const WRITERS: u64 = 6;
    const BLOCK: u64 = 3000;
    let images = Images::new();
    let image = images.create("disk.qcow2", 8 * M, "");
    paint(&image, &mut Random::new(501), 8 * M, 20);
    snapshot(&image, "one");
    let mut expected = bytes_of_snapshot(&image, "one");
    let place = TempDir::new().expect("make a directory");
    let mounted = Mounted::with(&scratch(place.path(), ""), &image);
    let path = mounted.path("scratch/snapshots/one/disk.raw");
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let disk = open(&path);
            scope.spawn(move || {
                // Neighbours share clusters and subclusters.
                for block in (writer..8 * M / BLOCK).step_by(index(WRITERS)) {
                    let data = [1 + writer as u8; BLOCK as usize];
                    disk.write_all_at(&data, block * BLOCK).expect("write");
                }
            });
        }
    });
    for block in 0..8 * M / BLOCK {
        let start = index(block * BLOCK);
        expected[start..start + index(BLOCK)].fill(1 + (block % WRITERS) as u8);
    }
    holds(&path, &expected);
    mounted.umount();
    check(&image);
}

#[test]
fn a_snapshot_with_a_dirty_journal_is_mounted_and_repaired_in_its_twin() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 64 * M, "");
    let place = TempDir::new().expect("make a directory");
    let mounted = Mounted::with(&scratch(place.path(), ""), &image);
    let device = LoopDevice::attach(&mounted.disk());
    run("mkfs.ext4", &args!["-q", device.path()]);
    let inner = FileSystem::mount(device.path(), "rw");
    for number in 0..40 {
        let file = File::create(inner.path(&format!("file-{number}"))).expect("make a file");
        file.write_all_at(&vec![number; 9000], 0).expect("write");
        file.sync_all().expect("sync");
    }
    // Neither frozen nor unmounted: what was synced is in the journal.
    qchainfs(&args!["snapshot", "create", mounted.root(), "live"]).ok();
    fs::write(inner.path("later"), "not in the snapshot").expect("write");
    let repaired = |mounted: &Mounted| {
        let view = mounted.path("snapshots/live/disk.raw");
        let before = fs::read(&view).expect("read the view");
        let header = run("dumpe2fs", &args!["-h", view]);
        assert!(header.contains("needs_recovery"), "the journal is clean: {header}");
        let twin = mounted.path("scratch/snapshots/live/disk.raw");
        let device = LoopDevice::attach(&twin);
        let inner = FileSystem::mount(device.path(), "rw");
        for number in 0..40 {
            let found = fs::read(inner.path(&format!("file-{number}"))).expect("read a file");
            same("a file", &vec![number; 9000], &found);
        }
        assert!(!inner.path("later").exists());
        fs::write(inner.path("repaired"), vec![7; 100_000]).expect("write to the twin");
        drop(inner);
        drop(device);
        run("e2fsck", &args!["-fn", twin]);
        let device = LoopDevice::attach(&twin);
        let inner = FileSystem::mount(device.path(), "ro");
        assert_eq!(fs::read(inner.path("repaired")).expect("read"), vec![7; 100_000]);
        drop(inner);
        drop(device);
        holds(&view, &before);
    };
    repaired(&mounted);
    assert!(inner.path("later").exists() && !inner.path("repaired").exists());
    drop(inner);
    drop(device);
    mounted.umount();
    check(&image);

    // Once more where the image is not written at all.
    let untouched = Untouched::now(&[&image]);
    let mounted = Mounted::with(&scratch(place.path(), ",ro"), &image);
    repaired(&mounted);
    mounted.umount();
    untouched.verify();
    assert!(names_in(place.path()).is_empty());
}

#[test]
fn twins_are_listed_like_views_and_look_like_writable_disks() {
    let images = Images::new();
    let files = chain(&images, &mut Random::new(502));
    let place = TempDir::new().expect("make a directory");
    let look = |mounted: &Mounted| {
        let mut inodes = BTreeMap::new();
        let mut places = vec![mounted.root().to_path_buf()];
        while let Some(directory) = places.pop() {
            for entry in fs::read_dir(&directory).expect("list") {
                let entry = entry.expect("an entry");
                let path = entry.path();
                let inside = path.strip_prefix(mounted.root()).expect("inside").to_path_buf();
                let inode = fs::symlink_metadata(&path).expect("stat").ino();
                assert_eq!(inodes.insert(inside, inode), None);
                if entry.file_type().expect("its type").is_dir() {
                    places.push(path);
                }
            }
        }
        let distinct: BTreeSet<_> = inodes.values().collect();
        assert_eq!(distinct.len(), inodes.len(), "two files have one inode number");
        inodes
    };
    let mounted = Mounted::with(&scratch(place.path(), ",ro"), &files[0]);
    let inodes = look(&mounted);
    assert_eq!(names_in(&mounted.path("scratch")), ["chain", "disk.raw", "info.json", "snapshots"]);
    assert_eq!(names_in(&mounted.path("scratch/chain")), ["1", "2"]);
    let member = ["disk.raw", "info.json", "snapshots"];
    assert_eq!(names_in(&mounted.path("scratch/chain/1")), member);
    for name in VIEWS {
        let twin = mounted.path("scratch").join(name).join("disk.raw");
        let view = mounted.path(name).join("disk.raw");
        let (twin_data, view_data) =
            (fs::metadata(&twin).expect("stat"), fs::metadata(&view).expect("stat"));
        assert_eq!(twin_data.permissions().mode() & 0o777, 0o640, "{name}");
        assert_eq!(twin_data.len(), view_data.len(), "{name}");
        assert_eq!(twin_data.blocks(), view_data.blocks(), "{name}");
        assert_eq!(twin_data.mtime(), view_data.mtime(), "{name}");
        let disk = open(&twin);
        let error = disk.set_len(M).expect_err("it keeps its size");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let refused = File::options().write(true).open(&view).expect_err("a view is read-only");
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
    let said = fs::read_to_string(mounted.path("scratch/snapshots/one/info.json")).expect("read");
    let said: serde_json::Value = serde_json::from_str(&said).expect("it is JSON");
    assert_eq!(said["read-only"], false);
    assert_eq!(said["scratch"]["changed"], false);
    open(&mounted.path("scratch/snapshots/one/disk.raw")).write_all_at(b"x", 9).expect("write");
    let said = fs::read_to_string(mounted.path("scratch/snapshots/one/info.json")).expect("read");
    assert!(said.contains("\"changed\": true"), "{said}");
    mounted.umount();

    let again = Mounted::with(&scratch(place.path(), ",ro"), &files[0]);
    assert_eq!(look(&again), inodes, "inode numbers are another at the second mount");
    again.umount();
    // The disk that is written itself has no twin.
    let mounted = Mounted::with(&scratch(place.path(), ""), &files[0]);
    assert_eq!(names_in(&mounted.path("scratch")), ["chain", "snapshots"]);
    mounted.umount();
    let mounted = Mounted::new(&files[0]);
    assert!(!mounted.path("scratch").exists());
    mounted.umount();
    // A snapshot at the root has its twin at the root of all twins.
    let address = format!("{}[1]@mid", files[0].display());
    let mounted = Mounted::with(&scratch(place.path(), ""), address);
    open(&mounted.path("scratch/disk.raw")).write_all_at(b"y", 9).expect("write");
    mounted.umount();
}

#[test]
fn partitions_of_a_twin_are_files_that_follow_what_is_written_to_it() {
    let images = Images::new();
    let raw = images.raw("raw.raw", &vec![5; index(4 * M)]);
    let partition = |disk: &Path, size: &str| {
        let script = images.path("script");
        fs::write(&script, format!("label: dos\nstart=2048,size={size}\n")).expect("a script");
        let command = "sfdisk -q --no-reread --no-tell-kernel \"$0\" <\"$1\"";
        run("sh", &args!["-c", command, disk, script]);
    };
    partition(&raw, "1024");
    let image = images.path("disk.qcow2");
    run("qemu-img", &args!["convert", "-f", "raw", "-O", "qcow2", raw, image]);
    snapshot(&image, "one");
    let untouched = Untouched::now(&[&image]);
    let place = TempDir::new().expect("make a directory");
    let mounted = Mounted::with(&scratch(place.path(), ",ro"), &image);
    let twin = mounted.path("scratch/snapshots/one");
    let part = open(&twin.join("p1"));
    part.write_all_at(&[8; 700], 300).expect("write to a partition");
    let disk = File::open(twin.join("disk.raw")).expect("open");
    assert_eq!(read_at(&disk, M + 300, 700), [8; 700]);
    drop(part);
    partition(&twin.join("disk.raw"), "4096");
    assert_eq!(fs::metadata(twin.join("p1")).expect("stat").len(), 4096 * 512);
    for view in ["p1", "snapshots/one/p1"] {
        holds(&mounted.path(view), &vec![5; 1024 * 512]);
    }
    drop(disk);
    mounted.umount();
    untouched.verify();
}

#[test]
fn a_killed_daemon_leaves_nothing_of_its_twins() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 64 * M, "");
    paint(&image, &mut Random::new(503), 64 * M, 10);
    snapshot(&image, "one");
    let untouched = Untouched::now(&[&image]);
    let host = FileSystem::with_room_for(32 * M);
    let free = || statvfs(host.root()).expect("statvfs").blocks_free();
    let before = free();
    let mounted = Mounted::with(&scratch(host.root(), ",ro"), &image);
    let disk = open(&mounted.path("scratch/snapshots/one/disk.raw"));
    disk.write_all_at(&vec![3; index(8 * M)], M).expect("write");
    disk.sync_all().expect("sync");
    assert!(free() < before);
    assert!(names_in(host.root()).is_empty());
    let daemon = mounted.daemon();
    kill(daemon, Signal::SIGKILL).expect("kill the daemon");
    wait_until("the daemon dies", || !is_running(daemon));
    assert!(names_in(host.root()).is_empty());
    wait_until("the space is given back", || free() == before);
    drop(disk);
    drop(mounted);
    untouched.verify();
}

#[test]
fn a_full_directory_fails_writes_to_twins_and_nothing_else() {
    let images = Images::new();
    let mut random = Random::new(504);
    let image = images.create("disk.qcow2", 32 * M, "");
    paint(&image, &mut random, 32 * M, 12);
    snapshot(&image, "one");
    let untouched = Untouched::now(&[&image]);
    let mut model = bytes_of_snapshot(&image, "one");
    let host = FileSystem::with_room_for(6 * M);
    let mounted = Mounted::with(&scratch(host.root(), ",ro"), &image);
    let path = mounted.path("scratch/snapshots/one/disk.raw");
    let disk = open(&path);
    let mut failures = 0;
    for _ in 0..200 {
        let (at, len) = random.range(32 * M, 300 * K);
        let data = random.bytes(index(len));
        match disk.write_all_at(&data, at) {
            Ok(()) => model[index(at)..index(at + len)].copy_from_slice(&data),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
                failures += 1;
                let found = read_at(&disk, at, index(len));
                for (offset, byte) in found.into_iter().enumerate() {
                    let old = &mut model[index(at) + offset];
                    assert!(byte == *old || byte == data[offset], "neither old nor new");
                    *old = byte;
                }
            }
        }
    }
    assert!(failures > 0, "no write failed");
    disk.sync_all().expect("sync a twin in a full directory");
    holds(&path, &model);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&disk, punch, 0, (32 * M).cast_signed()).expect("discard all");
    disk.sync_all().expect("give the space back");
    disk.write_all_at(&vec![9; index(2 * M)], M).expect("there is space again");
    model.fill(0);
    model[index(M)..index(3 * M)].fill(9);
    holds(&path, &model);
    drop(disk);
    mounted.umount();
    untouched.verify();
}

#[test]
fn a_twin_with_changes_or_users_keeps_its_snapshot_from_being_deleted() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    paint(&image, &mut Random::new(505), 4 * M, 10);
    for name in ["read", "open", "changed"] {
        snapshot(&image, name);
    }
    let place = TempDir::new().expect("make a directory");
    let mounted = Mounted::with(&scratch(place.path(), ""), &image);
    let twin = |name: &str| mounted.path("scratch/snapshots").join(name).join("disk.raw");
    let delete = |name: &str| qchainfs(&args!["snapshot", "delete", mounted.root(), name]);
    fs::read(twin("read")).expect("read");
    drop(open(&twin("read")));
    // Closing a file is told to the daemon a moment later.
    wait_until("an unchanged twin lets its snapshot go", || delete("read").code == Some(0));
    assert!(!mounted.path("scratch/snapshots/read").exists());

    let reader = File::open(twin("open")).expect("open");
    let said = delete("open").fails(1);
    assert!(said.contains("still in use"), "{said}");
    drop(reader);
    wait_until("a closed twin lets its snapshot go", || delete("open").code == Some(0));

    let disk = open(&twin("changed"));
    disk.write_all_at(&[1; 5000], M).expect("write");
    let expected = fs::read(twin("changed")).expect("read");
    drop(disk);
    let said = delete("changed").fails(1);
    assert!(said.contains("scratch twin"), "{said}");
    // Going back to it changes the disk and not the snapshot.
    qchainfs(&args!["snapshot", "apply", mounted.root(), "changed"]).ok();
    holds(&twin("changed"), &expected);
    mounted.umount();
    qchainfs(&args!["snapshot", "delete", &image, "changed"]).ok();
    check(&image);
}

#[test]
fn a_twin_goes_along_when_an_overlay_is_put_on_top() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    paint(&image, &mut Random::new(506), 4 * M, 10);
    snapshot(&image, "one");
    let place = TempDir::new().expect("make a directory");
    let mounted = Mounted::with(&scratch(place.path(), ""), &image);
    let reader = File::open(mounted.path("scratch/snapshots/one/disk.raw")).expect("open");
    let disk = open(&mounted.path("scratch/snapshots/one/disk.raw"));
    let inode = disk.metadata().expect("stat").ino();
    disk.write_all_at(&[1; 5000], M).expect("write");
    let below = fs::read(mounted.disk()).expect("read");
    qchainfs(&args!["overlay", mounted.root(), images.path("new.qcow2")]).ok();
    assert!(!mounted.path("scratch/snapshots/one").exists());
    let moved = mounted.path("scratch/chain/1/snapshots/one/disk.raw");
    assert_eq!(fs::metadata(&moved).expect("stat").ino(), inode);
    disk.write_all_at(&[2; 5000], 2 * M).expect("write to a file that was open before");
    open(&moved).write_all_at(&[3; 5000], 3 * M).expect("write");
    let mut expected = bytes_of_snapshot(&image, "one");
    for (byte, at) in [(1, M), (2, 2 * M), (3, 3 * M)] {
        expected[index(at)..index(at) + 5000].fill(byte);
    }
    holds(&moved, &expected);
    same("an old reader's twin", &expected, &read_at(&reader, 0, index(4 * M)));
    // What was the disk can't change any more and has a twin now.
    let twin = mounted.path("scratch/chain/1/disk.raw");
    open(&twin).write_all_at(&[4; 5000], 0).expect("write");
    holds(&mounted.path("chain/1/disk.raw"), &below);
    holds(&mounted.disk(), &below);
    assert_eq!(read_at(&File::open(&twin).expect("open"), 0, 5000), [4; 5000]);
    drop((reader, disk));
    mounted.umount();
    check(&image);
    check(&images.path("new.qcow2"));
}

#[test]
fn a_revert_does_not_take_a_changed_twin_away() {
    let images = Images::new();
    let mut random = Random::new(507);
    let base = images.create("base.qcow2", 4 * M, "");
    paint(&base, &mut random, 4 * M, 10);
    let image = images.overlay("disk.qcow2", "base.qcow2", "");
    paint(&image, &mut random, 4 * M, 4);
    snapshot(&image, "one");
    let place = TempDir::new().expect("make a directory");
    let mounted = Mounted::with(&scratch(place.path(), ""), &image);
    let new = images.path("new.qcow2");
    let kept = mounted.path("scratch/chain/1/disk.raw");
    open(&kept).write_all_at(&[1; 5000], M).expect("write");
    let expected = fs::read(&kept).expect("read");
    let lost = |mounted: &Mounted| mounted.path("scratch/snapshots/one/disk.raw");
    let disk = open(&lost(&mounted));
    let revert = || qchainfs(&args!["revert", mounted.root(), "[1]", &new]);
    let said = revert().fails(1);
    assert!(said.contains("scratch twin"), "{said}");
    drop(disk);
    wait_until("a twin without changes does not matter", || revert().code == Some(0));
    holds(&kept, &expected);
    mounted.umount();
    check(&new);

    let mounted = Mounted::with(&scratch(place.path(), ""), &image);
    open(&lost(&mounted)).write_all_at(&[1; 5000], M).expect("write");
    let said =
        qchainfs(&args!["revert", mounted.root(), "[1]", images.path("newer.qcow2")]).fails(1);
    assert!(said.contains("scratch twin"), "{said}");
    assert!(!images.path("newer.qcow2").exists());
    mounted.umount();
}

#[test]
fn where_twins_are_not_possible_that_is_said() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    let nowhere = images.path("nowhere");
    let said = Mounted::refused(&scratch(&nowhere, ""), &image, 10);
    assert!(said.contains("nowhere"), "{said}");
    Mounted::refused(&scratch(&image, ""), &image, 1);
    let file = images.raw("mountpoint", b"");
    let options = scratch(images.path("").as_path(), "");
    let said = qchainfs(&[&args!["mount"], &options[..], &args![image, file]].concat()).fails(2);
    assert!(said.contains("scratch"), "{said}");
}
