//! A single view mounted on a regular file, which then is its disk.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Whence, lseek};

use crate::support::images::{Images, Untouched, check, io, paint, snapshot};
use crate::support::loopdev::{FileSystem, LoopDevice};
use crate::support::mounted::{Mounted, is_running, mount_line};
use crate::support::mounted_file::{MountedFile, names, state_of};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, same};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, run};
use crate::support::watchdog::wait_until;
use crate::support::{M, index};

#[test]
fn any_view_can_be_mounted_on_a_file() {
    let images = Images::new();
    let mut random = Random::new(181);
    let base = images.create("base.qcow2", 2 * M, "");
    paint(&base, &mut random, 2 * M, 8);
    let top = images.overlay_sized("top.qcow2", "base.qcow2", 3 * M, "");
    paint(&top, &mut random, 3 * M, 8);
    snapshot(&top, "one");
    paint(&top, &mut random, 3 * M, 4);
    let untouched = Untouched::now(&[&base, &top]);
    let one = bytes_of_snapshot(&top, "one");
    for (suffix, expected) in [("", bytes_of(&top)), ("[1]", bytes_of(&base)), ("@one", one)] {
        let mut address = top.clone().into_os_string();
        address.push(suffix);
        let mounted = MountedFile::with(&args!["-r"], address);
        holds(mounted.path(), &expected);
        let data = fs::metadata(mounted.path()).expect("stat");
        assert!(data.is_file() && !data.file_type().is_block_device());
        assert_eq!(data.len(), expected.len() as u64, "{suffix}");
        assert_eq!(data.permissions().mode() & 0o777, 0o440, "{suffix}");
        assert!(File::options().write(true).open(mounted.path()).is_err(), "{suffix} is writable");
        mounted.umount();
    }
    untouched.verify();
}

#[test]
fn what_is_written_to_the_file_is_in_the_image() {
    let images = Images::new();
    let mut random = Random::new(182);
    let base = images.create("base.qcow2", 8 * M, "");
    paint(&base, &mut random, 8 * M, 8);
    let image = images.overlay("disk.qcow2", "base.qcow2", "cluster_size=4k");
    let mut expected = bytes_of(&image);
    let mounted = MountedFile::with(&[], &image);
    let disk = File::options().read(true).write(true).open(mounted.path()).expect("open");
    for _ in 0..20 {
        let (offset, len) = random.range(8 * M, M);
        let data = random.bytes(index(len));
        disk.write_all_at(&data, offset).expect("write");
        expected[index(offset)..index(offset + len)].copy_from_slice(&data);
    }
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&disk, mode, 3 << 20, 1 << 20).expect("punch a hole");
    expected[3 << 20..4 << 20].fill(0);
    disk.sync_all().expect("fsync");
    mounted.kill();
    drop(disk);
    same("what was synced", &expected, &bytes_of(&image));
    qchainfs(&args!["umount", mounted.path()]).ok();
    mounted.is_over();

    run("qemu-img", &args!["check", "-q", "-r", "leaks", image]);
    let mounted = MountedFile::with(&[], &image);
    holds(mounted.path(), &expected);
    let disk = File::options().write(true).open(mounted.path()).expect("open");
    disk.write_all_at(&[9; 1000], 12345).expect("write");
    expected[12345..13345].fill(9);
    drop(disk);
    mounted.umount();
    check(&image);
    same("what was not synced", &expected, &bytes_of(&image));
}

#[test]
fn the_size_of_the_file_is_that_of_the_disk_unless_it_may_grow() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 3 0 1M"]);
    let mounted = MountedFile::with(&[], &image);
    let error = File::create(mounted.path()).expect_err("the disk was cut");
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    let disk = File::options().write(true).open(mounted.path()).expect("open");
    for size in [0, M / 2, 2 * M] {
        let error = disk.set_len(size).expect_err("the size was changed");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size}");
    }
    assert!(disk.write_all_at(&[1], M).is_err(), "a write behind the end");
    drop(disk);
    holds(mounted.path(), &[3; 1 << 20]);
    mounted.umount();

    let mounted = MountedFile::with(&args!["-o", "growable"], &image);
    let disk = File::options().write(true).open(mounted.path()).expect("open");
    disk.set_len(2 * M).expect("grow");
    disk.write_all_at(&[4; 512], 2 * M - 512).expect("write");
    assert!(disk.set_len(M).is_err(), "the disk was cut");
    drop(disk);
    assert_eq!(fs::metadata(mounted.path()).expect("stat").len(), 2 * M);
    mounted.umount();
    check(&image);
    assert_eq!(bytes_of(&image)[(2 << 20) - 512..], [4; 512]);
}

#[test]
fn holes_of_the_view_are_holes_of_the_file() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 8 * M, "");
    io(&image, &["write -P 1 1M 1M", "write -P 2 6M 64k"]);
    for options in [&args!["-r"][..], &[]] {
        let mounted = MountedFile::with(options, &image);
        let file = File::open(mounted.path()).expect("open");
        let seek = |from: i64, whence| lseek(&file, from, whence);
        assert_eq!(seek(0, Whence::SeekData), Ok(1 << 20));
        assert_eq!(seek(1 << 20, Whence::SeekHole), Ok(2 << 20));
        assert_eq!(seek(2 << 20, Whence::SeekData), Ok(6 << 20));
        assert_eq!(seek(7 << 20, Whence::SeekData), Err(Errno::ENXIO));
        let blocks = fs::metadata(mounted.path()).expect("stat").blocks();
        assert_eq!(blocks * 512, M + 65536);
        drop(file);
        mounted.umount();
    }
}

#[test]
fn a_loop_device_works_on_the_file() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 32 * M, "");
    let mounted = MountedFile::with(&[], &image);
    let device = LoopDevice::attach(mounted.path());
    run("mkfs.ext4", &args!["-q", device.path()]);
    let inner = FileSystem::mount(device.path(), "rw");
    fs::write(inner.path("file"), vec![5; 100_000]).expect("write a file");
    run("fstrim", &args![inner.root()]);
    let said = qchainfs(&args!["umount", mounted.path()]).fails(1);
    assert!(said.contains(&device.path().display().to_string()), "{said}");
    drop(inner);
    drop(device);
    mounted.umount();
    check(&image);
    snapshot(&image, "one");
    let mut address = image.clone().into_os_string();
    address.push("@one");
    let mounted = MountedFile::with(&[], address);
    let inner = FileSystem::mount(mounted.path(), "loop,ro");
    assert_eq!(fs::read(inner.path("file")).expect("read"), vec![5; 100_000]);
    drop(inner);
    wait_until("the loop device lets its file go", || {
        !run("losetup", &args!["-a"]).contains(&mounted.path().display().to_string())
    });
    mounted.umount();
}

#[test]
fn a_composed_chain_can_be_mounted_on_a_file() {
    let images = Images::new();
    let base = images.raw("base.raw", &[1; 1 << 20]);
    let top = images.create("top.qcow2", M, "");
    io(&top, &["write -P 2 0 64k"]);
    let chain = format!("{},{}", base.display(), top.display());
    let mounted = MountedFile::with(&args!["--chain", chain], &top);
    let mut expected = vec![1; 1 << 20];
    expected[..65536].fill(2);
    holds(mounted.path(), &expected);
    mounted.umount();
}

#[test]
fn a_mount_on_a_file_in_use_stays_and_names_who_uses_it() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = MountedFile::with(&[], &image);
    let disk = File::options().write(true).open(mounted.path()).expect("open");
    let said = qchainfs(&args!["umount", mounted.path()]).fails(1);
    assert!(said.contains(&std::process::id().to_string()), "{said}");
    disk.write_all_at(&[1; 100], 0).expect("the mount still works");
    let again = qchainfs(&args!["mount", image, mounted.path()]);
    assert_ne!(again.code, Some(0), "{again}");
    drop(disk);
    mounted.umount();
}

#[test]
fn a_signal_ends_a_mount_on_a_file() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = MountedFile::with(&[], &image);
    let state = state_of(mounted.path());
    let disk = File::options().write(true).open(mounted.path()).expect("open");
    disk.write_all_at(&[0x3c; 1000], 500_000).expect("write");
    drop(disk);
    kill(mounted.daemon(), Signal::SIGTERM).expect("send a signal");
    wait_until("the daemon ends", || !is_running(mounted.daemon()));
    mounted.is_over();
    assert!(!state.exists());
    check(&image);
    same("what was written", &[0x3c; 1000], &bytes_of(&image)[500_000..501_000]);
}

#[test]
fn what_a_killed_daemon_left_on_a_file_is_mounted_over_and_unmounted() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 8 0 1M"]);
    let mut mounted = MountedFile::with(&[], &image);
    mounted.kill();
    mounted.again(&image);
    holds(mounted.path(), &[8; 1 << 20]);
    mounted.kill();
    qchainfs(&args!["umount", mounted.path()]).ok();
    mounted.is_over();
}

#[test]
fn a_mount_on_a_file_of_its_own_chain_is_refused() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let untouched = Untouched::now(&[&base, &top]);
    for file in [&base, &top] {
        let said = qchainfs(&args!["mount", top, file]).fails(1);
        assert!(said.contains("mountpoint"), "{said}");
        assert!(mount_line(file).is_none());
    }
    untouched.verify();
}

#[test]
fn the_state_of_a_mount_on_a_directory_is_there_as_long_as_it_is() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let state = state_of(mounted.root());
    let text = fs::read_to_string(&state).expect("read the state of a mount");
    assert!(text.contains(&mounted.daemon().to_string()), "{text}");
    assert!(text.contains(&image.display().to_string()), "{text}");
    assert_eq!(fs::metadata(&state).expect("stat").permissions().mode() & 0o777, 0o600);
    let daemon = mounted.daemon();
    mounted.umount();
    assert!(!names(&state, daemon));
}
