//! Attributes and refusals: what backup programs rely on, and what keeps a disk from being
//! destroyed by accident.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::sys::statvfs::statvfs;
use nix::unistd::{Whence, lseek, mkfifo};

use crate::support::M;
use crate::support::images::{Images, Untouched, check, io, paint, poke, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, holds, info, read_at, same, virtual_size};
use crate::support::random::Random;
use crate::support::tools::{args, attempt};
use crate::support::writer::Writer;

fn stat(path: &Path) -> Metadata {
    fs::metadata(path).unwrap_or_else(|error| panic!("stat {}: {error}", path.display()))
}

/// Panics unless `result` failed with the errno `expected`.
#[track_caller]
fn fails_with<T>(result: io::Result<T>, expected: i32) {
    let error = result.err().expect("it succeeded");
    assert_eq!(error.raw_os_error(), Some(expected), "{error}");
}

#[test]
fn inode_and_times_of_a_view_are_the_same_at_every_mount() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    snapshot(&base, "one");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    snapshot(&top, "two");
    let look = || {
        let mounted = Mounted::read_only(&top);
        let views = ["", "chain/1", "chain/1/snapshots/one", "snapshots/two"];
        let seen = views.map(|view| {
            let data = stat(&mounted.path(view).join("disk.raw"));
            (data.ino(), data.mtime(), data.mtime_nsec(), data.ctime(), data.ctime_nsec())
        });
        mounted.umount();
        seen
    };
    let first = look();
    assert_eq!(first, look());
    for (number, view) in first.iter().enumerate() {
        assert!(first[..number].iter().all(|other| other.0 != view.0), "one inode for two views");
    }
}

#[test]
fn an_older_view_keeps_its_inode_when_a_snapshot_is_added() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    snapshot(&image, "one");
    let inode = || {
        let mounted = Mounted::new(&image);
        let data = stat(&mounted.path("snapshots/one/disk.raw"));
        mounted.umount();
        (data.ino(), data.mtime())
    };
    let before = inode();
    snapshot(&image, "two");
    assert_eq!(before, inode());
}

#[test]
fn the_time_of_a_view_is_that_of_its_snapshot_or_file() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    snapshot(&base, "one");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let mounted = Mounted::read_only(&top);
    let one = stat(&mounted.path("chain/1/snapshots/one/disk.raw"));
    let made = &info(&base)["snapshots"][0];
    assert_eq!(Some(one.mtime()), made["date-sec"].as_i64());
    assert_eq!(Some(one.mtime_nsec()), made["date-nsec"].as_i64());
    let member = stat(&mounted.path("chain/1/disk.raw"));
    let file = stat(&base);
    assert_eq!((member.mtime(), member.mtime_nsec()), (file.mtime(), file.mtime_nsec()));
    mounted.umount();
}

#[test]
fn only_the_active_layer_can_be_opened_for_writing() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    snapshot(&base, "one");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    snapshot(&top, "two");
    let mounted = Mounted::new(&top);
    assert_eq!(stat(&mounted.disk()).permissions().mode() & 0o200, 0o200);
    for view in ["chain/1", "chain/1/snapshots/one", "snapshots/two"] {
        for name in ["disk.raw", "info.json"] {
            let file = mounted.path(view).join(name);
            assert_eq!(stat(&file).permissions().mode() & 0o7777, 0o440, "{}", file.display());
            fails_with(File::options().write(true).open(&file), libc::EROFS);
        }
    }
    mounted.umount();
    let mounted = Mounted::read_only(&top);
    fails_with(File::options().write(true).open(mounted.disk()), libc::EROFS);
    mounted.umount();
}

#[test]
fn the_disk_can_not_be_truncated_by_accident() {
    let images = Images::new();
    let mut random = Random::new(111);
    let image = images.create("disk.qcow2", 2 * M, "");
    paint(&image, &mut random, 2 * M, 10);
    let source = images.raw("source.raw", &[1; 1000]);
    let writer = Writer::open(&image);
    for size in [0, M, 3 * M] {
        fails_with(writer.file().set_len(size), libc::EPERM);
    }
    let disk = writer.mounted().disk();
    fails_with(File::create(&disk), libc::EPERM);
    let redirect = attempt("sh", &args!["-c", "exec > \"$0\"", disk]);
    assert_ne!(redirect.code, Some(0), "{redirect}");
    let copy = attempt("cp", &args![source, disk]);
    assert_ne!(copy.code, Some(0), "{copy}");
    assert_eq!(stat(&disk).len(), 2 * M);
    writer.close();
}

#[test]
fn dd_without_truncation_is_the_way_to_write_a_disk() {
    let images = Images::new();
    let mut random = Random::new(112);
    let image = images.create("disk.qcow2", 2 * M, "");
    let source = images.raw("source.raw", &random.bytes(crate::support::index(2 * M)));
    let mut writer = Writer::open(&image);
    let (from, to) = (format!("if={}", source.display()), writer.mounted().disk());
    let to = format!("of={}", to.display());
    attempt("dd", &args![from, to, "bs=64k", "conv=notrunc,fsync", "status=none"]).ok();
    writer.bytes_mut().copy_from_slice(&fs::read(&source).expect("read"));
    writer.close();
}

#[test]
fn a_growable_disk_grows_and_does_not_shrink() {
    let images = Images::new();
    let base = images.create("base.qcow2", 8 * M, "");
    io(&base, &["write -P 0x88 0 8M"]);
    let top = images.overlay_sized("top.qcow2", "base.qcow2", 2 * M, "");
    let mut expected = bytes_of(&top);
    expected.resize(crate::support::index(6 * M), 0);
    let mounted = Mounted::with(&args!["-o", "growable"], &top);
    let disk = File::options().read(true).write(true).open(mounted.disk()).expect("open");
    disk.set_len(6 * M).expect("grow");
    fails_with(disk.set_len(M), libc::EPERM);
    drop(disk);
    assert_eq!(stat(&mounted.disk()).len(), 6 * M);
    holds(&mounted.disk(), &expected);
    mounted.umount();
    check(&top);
    assert_eq!(virtual_size(&top), 6 * M);
    assert_eq!(bytes_of(&top), expected);
}

#[test]
fn nothing_can_be_made_renamed_or_removed_in_the_tree() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    snapshot(&image, "one");
    let untouched = Untouched::now(&[&image]);
    let mounted = Mounted::new(&image);
    let disk = mounted.disk();
    fs::remove_file(&disk).expect_err("the disk was removed");
    fs::remove_dir_all(mounted.path("snapshots/one")).expect_err("the snapshot was removed");
    fs::rename(&disk, mounted.path("other.raw")).expect_err("the disk was renamed");
    fs::write(mounted.path("new"), "x").expect_err("a file was made");
    fs::create_dir(mounted.path("snapshots/two")).expect_err("a directory was made");
    fs::hard_link(&disk, mounted.path("link")).expect_err("a link was made");
    assert!(disk.exists() && mounted.path("snapshots/one/disk.raw").exists());
    mounted.umount();
    untouched.verify();
}

#[test]
fn block_sizes_are_those_of_a_page() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    assert_eq!(stat(&mounted.disk()).blksize(), 4096);
    assert_eq!(statvfs(&mounted.disk()).expect("statvfs").block_size(), 4096);
    mounted.umount();
}

#[test]
fn allocated_blocks_are_told_honestly() {
    let images = Images::new();
    let base = images.create("base.qcow2", 64 * M, "");
    io(&base, &["write -P 1 0 2M"]);
    snapshot(&base, "one");
    io(&base, &["write -P 2 10M 4M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    io(&top, &["write -P 3 30M 1M"]);
    let mounted = Mounted::new(&top);
    let views = [("", 7), ("chain/1", 6), ("chain/1/snapshots/one", 2)];
    for (view, mebibytes) in views {
        let allocated = stat(&mounted.path(view).join("disk.raw")).blocks() * 512;
        let expected = mebibytes * M..(mebibytes + 1) * M;
        assert!(expected.contains(&allocated), "view \"{view}\": {allocated} bytes");
    }
    mounted.umount();
}

#[test]
fn a_broken_table_hides_its_own_part_of_the_disk_and_no_more() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 1024 * M, "");
    io(&image, &["write -P 5 0 1M", "write -P 6 600M 1M"]);
    let header = fs::read(&image).expect("read");
    let l1 = u64::from_be_bytes(header[40..48].try_into().expect("eight bytes"));
    // No cluster begins there.
    poke(&image, l1 + 8, &((1 << 63) | 0x5_0200_u64).to_be_bytes());
    let untouched = Untouched::now(&[&image]);
    let mounted = Mounted::read_only(&image);
    let data = stat(&mounted.disk());
    assert_eq!((data.len(), data.blocks() * 512), (1024 * M, 1024 * M));
    let disk = File::open(mounted.disk()).expect("open");
    same("what the table leaves alone", &[5; 4096], &read_at(&disk, 0, 4096));
    fails_with(disk.read_at(&mut [0; 4096], 600 * M), libc::EIO);
    drop(disk);
    let about = fs::read(mounted.path("info.json")).expect("read");
    let about: serde_json::Value = serde_json::from_slice(&about).expect("JSON");
    assert!(about["allocated"].is_null(), "{about}");
    mounted.umount();
    untouched.verify();
}

/// What each way to change the names of a mount answers.
fn changes_of_names(mounted: &Mounted) -> Vec<io::Result<()>> {
    let (disk, new) = (mounted.disk(), mounted.path("new"));
    let fifo = mkfifo(&new, Mode::S_IRUSR).map_err(io::Error::from);
    vec![
        File::options().write(true).create_new(true).open(&new).map(drop),
        fs::create_dir(&new),
        fifo,
        symlink("disk.raw", &new),
        fs::hard_link(&disk, &new),
        fs::rename(&disk, &new),
        fs::remove_file(&disk),
        fs::remove_dir(mounted.path("snapshots/one")),
    ]
}

#[test]
fn a_change_of_names_is_not_permitted_or_the_file_system_is_read_only() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    snapshot(&image, "one");
    let untouched = Untouched::now(&[&image]);
    for (options, errno) in [(args!["-o", "rw"], libc::EPERM), (args!["-o", "ro"], libc::EROFS)] {
        let mounted = Mounted::with(&options, &image);
        for result in changes_of_names(&mounted) {
            fails_with(result, errno);
        }
        mounted.umount();
    }
    untouched.verify();
}

#[test]
fn a_document_is_data_up_to_its_end() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let file = File::open(mounted.path("info.json")).expect("open");
    let len = file.metadata().expect("stat").len().cast_signed();
    assert_eq!(lseek(&file, 3, Whence::SeekData), Ok(3));
    assert_eq!(lseek(&file, 3, Whence::SeekHole), Ok(len));
    assert_eq!(lseek(&file, len, Whence::SeekData), Err(Errno::ENXIO));
    drop(file);
    mounted.umount();
}
