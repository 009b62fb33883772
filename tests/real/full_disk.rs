//! A host file system without space: what fails is told, what was there stays, and later writes work again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::support::images::{check, paint, snapshot};
use crate::support::loopdev::FileSystem;
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, read_at, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs, run};
use crate::support::watchdog::wait_until;
use crate::support::{K, M, index};

fn create(image: &Path, size: u64, options: &str) {
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-o", options, image, size.to_string()]);
}

/// Takes all space that is left but `spare` bytes.
fn fill_up(path: &Path, spare: u64) {
    fs::write(path, vec![7; index(spare)]).expect("take what shall be left");
    let rest = path.with_extension("rest");
    let file = File::create(&rest).expect("make a file");
    let block = vec![9; index(64 * K)];
    let full = (0..).find_map(|number| file.write_all_at(&block, number * 64 * K).err());
    assert!(full.is_some_and(|error| error.kind() == io::ErrorKind::StorageFull));
    fs::remove_file(path).expect("leave some space");
}

#[test]
fn a_full_disk_fails_writes_that_need_space_and_nothing_else() {
    for seed in seeds(6) {
        let mut random = Random::new(seed);
        let host = FileSystem::with_room_for(24 * M);
        let image = host.path("disk.qcow2");
        let options = random.pick(&[
            "cluster_size=512",
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=16k,extended_l2=on",
            "cluster_size=512,refcount_bits=64",
        ]);
        let size = 16 * M;
        create(&image, size, options);
        paint(&image, &mut random, size / 8, 6);
        snapshot(&image, "before");
        let before = bytes_of_snapshot(&image, "before");
        let mounted = Mounted::new(&image);
        let disk = File::options().read(true).write(true).open(mounted.disk()).expect("open");
        let mut model = bytes_of(&image);
        fill_up(&host.path("ballast"), random.below(3) * 300 * K);

        let mut failures = 0;
        for _ in 0..150 {
            let (offset, len) = random.range(size, 200 * K);
            let data = random.bytes(index(len));
            let range = index(offset)..index(offset + len);
            match disk.write_all_at(&data, offset) {
                Ok(()) => model[range].copy_from_slice(&data),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{options}: {error}");
                    failures += 1;
                    // Like any disk's: a part may have been written.
                    let found = read_at(&disk, offset, index(len));
                    for (at, byte) in found.into_iter().enumerate() {
                        let old = &mut model[index(offset) + at];
                        assert!(byte == *old || byte == data[at], "{options}: neither old nor new");
                        *old = byte;
                    }
                }
            }
        }
        assert!(failures > 0, "{options}: no write failed");
        same("while the disk is full", &model, &read_at(&disk, 0, index(size)));
        disk.sync_all().expect("what was written can be made durable without space");

        fs::remove_file(host.path("ballast.rest")).expect("make room");
        let data = random.bytes(index(M));
        disk.write_all_at(&data, 5 * M).expect("there is space again");
        model[index(5 * M)..index(6 * M)].copy_from_slice(&data);
        disk.sync_all().expect("sync");
        drop(disk);
        mounted.umount();
        check(&image);
        same(options, &model, &bytes_of(&image));
        same("the snapshot", &before, &bytes_of_snapshot(&image, "before"));
    }
}

#[test]
fn a_full_disk_does_not_keep_anybody_from_discarding() {
    let host = FileSystem::with_room_for(12 * M);
    let image = host.path("disk.qcow2");
    create(&image, 8 * M, "cluster_size=64k");
    let mounted = Mounted::new(&image);
    let disk = File::options().read(true).write(true).open(mounted.disk()).expect("open");
    disk.write_all_at(&vec![5; index(4 * M)], 0).expect("write");
    disk.sync_all().expect("sync");
    fill_up(&host.path("ballast"), 0);
    assert!(disk.write_all_at(&vec![6; index(4 * M)], 4 * M).is_err());
    use nix::fcntl::{FallocateFlags, fallocate};
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&disk, punch, 0, (2 * M).cast_signed()).expect("discard on a full disk");
    disk.sync_all().expect("give the space back");
    disk.write_all_at(&vec![7; index(M)], 4 * M).expect("there is space again");
    drop(disk);
    mounted.umount();
    check(&image);
    assert_eq!(bytes_of(&image)[index(4 * M)..index(5 * M)], vec![7; index(M)]);
}

/// A copy of `image` in which each block of zeroes is a hole, also those of tables.
#[test]
fn an_overlay_that_finds_no_room_leaves_no_file_and_works_when_there_is_some() {
    for spare in [0, 40 * K, 70 * K] {
        let host = FileSystem::with_room_for(24 * M);
        let image = host.path("disk.qcow2");
        create(&image, 8 * M, "cluster_size=64k");
        paint(&image, &mut Random::new(spare + 1), 4 * M, 6);
        let bytes = bytes_of(&image);
        let mounted = Mounted::new(&image);
        fill_up(&host.path("ballast"), spare);
        for number in 0..4 {
            let new = host.path(&format!("{number}.qcow2"));
            let said = qchainfs(&args!["overlay", mounted.root(), &new]).fails(1);
            assert!(said.contains("No space left") && !new.exists(), "{said}");
        }
        same("the disk", &bytes, &fs::read(mounted.disk()).expect("read"));
        fs::remove_file(host.path("ballast.rest")).expect("make room");
        qchainfs(&args!["overlay", mounted.root(), host.path("0.qcow2")]).ok();
        same("the disk", &bytes, &fs::read(mounted.disk()).expect("read"));
        mounted.umount();
        check(&host.path("0.qcow2"));
        check(&image);
    }
}

fn copy_with_holes(image: &Path, to: &Path) {
    run("cp", &args!["--sparse=always", image, to]);
}

#[test]
fn a_full_disk_stays_an_ordinary_error_where_tables_are_in_holes() {
    let host = FileSystem::with_room_for(24 * M);
    let directory = tempfile::tempdir().expect("make a directory");
    let made = directory.path().join("made.qcow2");
    create(&made, 400 * M, "cluster_size=64k");
    // The next cluster is the first that the second page of the refcount block counts.
    let first_free = 2048 * 64 * K - 5 * 64 * K;
    let zeroes = format!("write -q -P 0 0 {first_free}");
    run("qemu-io", &args!["-f", "qcow2", "-c", zeroes, &made]);
    assert_eq!(fs::metadata(&made).expect("look at it").len(), 2048 * 64 * K);
    let image = host.path("disk.qcow2");
    copy_with_holes(&made, &image);

    let mounted = Mounted::new(&image);
    let disk = File::options().read(true).write(true).open(mounted.disk()).expect("open");
    fill_up(&host.path("ballast"), 0);
    let data = vec![5; index(64 * K)];
    let error = disk.write_all_at(&data, first_free).expect_err("there is no space");
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    disk.sync_all().expect("nothing waits for space");
    fs::remove_file(host.path("ballast.rest")).expect("make room");
    // A process that another test is just starting may hold the file that was removed for a moment.
    wait_until("there is space again", || disk.write_all_at(&data, first_free).is_ok());
    disk.sync_all().expect("sync");
    drop(disk);
    mounted.umount();
    check(&image);
}
