//! `overlay`: a new image on top of a chain, live or at rest.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::images::{Images, Untouched, check, paint, snapshot};
use crate::support::loopdev::{FileSystem, LoopDevice};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, holds, info, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs, run};
use crate::support::watchdog::wait_until;
use crate::support::{M, index};

const SECTOR: u64 = 4096;

fn backing_of(image: &Path) -> Option<String> {
    info(image)["backing-filename"].as_str().map(str::to_owned)
}

#[test]
fn what_was_written_before_an_overlay_is_below_and_what_comes_after_is_above() {
    let images = Images::new();
    let mut random = Random::new(301);
    let base = images.create("base.qcow2", 8 * M, "");
    paint(&base, &mut random, 8 * M, 10);
    let old = images.overlay("old.qcow2", "base.qcow2", "");
    snapshot(&old, "early");
    let new = images.path("new.qcow2");

    let mounted = Mounted::new(&old);
    let inode = |path: &str| {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(mounted.path(path)).expect("stat").ino()
    };
    let (disk_inode, base_inode) = (inode("disk.raw"), inode("chain/1/disk.raw"));
    let disk = File::options().read(true).write(true).open(mounted.disk()).expect("open");
    disk.write_all_at(&random.bytes(300_000), M + 77).expect("write");
    let mut expected = fs::read(mounted.disk()).expect("read the disk");
    let below = expected.clone();
    qchainfs(&args!["overlay", mounted.root(), &new]).ok();

    let later = random.bytes(200_000);
    disk.write_all_at(&later, M).expect("write to a file that was open before");
    expected[index(M)..index(M) + later.len()].copy_from_slice(&later);
    holds(&mounted.disk(), &expected);
    holds(&mounted.path("chain/0/disk.raw"), &expected);
    holds(&mounted.path("chain/1/disk.raw"), &below);
    holds(&mounted.path("chain/2/disk.raw"), &bytes_of(&base));
    holds(&mounted.path("chain/by-name/old.qcow2/disk.raw"), &below);
    assert!(mounted.path("chain/1/snapshots/early/disk.raw").exists());
    assert!(!mounted.path("snapshots/early").exists());
    assert_eq!(inode("disk.raw"), disk_inode, "an open disk is the same file as before");
    assert_eq!(inode("chain/2/disk.raw"), base_inode, "a backup program sees an old file");
    let said = fs::read_to_string(mounted.path("info.json")).expect("info.json");
    assert!(said.contains("new.qcow2"), "{said}");

    drop(disk);
    mounted.umount();
    assert_eq!(backing_of(&new).as_deref(), Some("old.qcow2"));
    for image in [&base, &old, &new] {
        check(image);
    }
    same("the new image", &expected, &bytes_of(&new));
    same("the old image", &below, &bytes_of(&old));
}

#[test]
fn overlays_under_parallel_writers_are_points_in_time() {
    for seed in seeds(3) {
        let images = Images::new();
        let base = images.create("base.qcow2", 4 * M, "");
        paint(&base, &mut Random::new(seed), 4 * M, 10);
        let top = images.overlay("0.qcow2", "base.qcow2", "");
        let mounted = Mounted::new(&top);
        const WRITERS: u64 = 4;
        const OVERLAYS: u64 = 4;
        let stop = AtomicBool::new(false);
        // The last number that each writer knows to be written, and the last that it has begun to write.
        let done: [AtomicU64; WRITERS as usize] = Default::default();
        let begun: [AtomicU64; WRITERS as usize] = Default::default();
        let numbers = |array: &[AtomicU64]| -> Vec<u64> {
            array.iter().map(|number| number.load(Ordering::SeqCst)).collect()
        };
        let mut windows = Vec::new();
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (stop, begun, done) = (&stop, &begun[index(writer)], &done[index(writer)]);
                let disk = File::options().write(true).open(mounted.disk()).expect("open");
                scope.spawn(move || {
                    for number in 1.. {
                        if stop.load(Ordering::SeqCst) {
                            return;
                        }
                        begun.store(number, Ordering::SeqCst);
                        let block = number.to_be_bytes().repeat(512);
                        // Two places in different clusters, one behind the other.
                        for half in [0, 2 * M] {
                            let at = half + writer * 3 * SECTOR;
                            disk.write_all_at(&block, at).expect("write");
                        }
                        done.store(number, Ordering::SeqCst);
                    }
                });
            }
            for overlay in 1..=OVERLAYS {
                let written = numbers(&done);
                wait_until("the writers write", || {
                    numbers(&done).iter().zip(&written).all(|(now, then)| now > then)
                });
                let before = numbers(&done);
                let new = images.path(&format!("{overlay}.qcow2"));
                qchainfs(&args!["overlay", mounted.root(), &new]).ok();
                windows.push((before, numbers(&begun)));
            }
            stop.store(true, Ordering::SeqCst);
        });
        let last = numbers(&done);
        for writer in 0..WRITERS {
            let at = writer * 3 * SECTOR;
            let number = |view: &Path, at: u64| {
                let mut bytes = [0; 8];
                let file = File::open(view).expect("open a view");
                file.read_exact_at(&mut bytes, at).expect("read a view");
                u64::from_be_bytes(bytes)
            };
            for (overlay, (before, after)) in windows.iter().enumerate() {
                let index_in_chain = index(OVERLAYS) - overlay;
                let view = mounted.path(&format!("chain/{index_in_chain}/disk.raw"));
                let (first, second) = (number(&view, at), number(&view, 2 * M + at));
                let window = before[index(writer)]..=after[index(writer)];
                assert!(window.contains(&first), "seed {seed}: {first} is not in {window:?}");
                let order = second == first || second + 1 == first;
                assert!(order, "seed {seed}: {second} was written behind {first}");
            }
            assert_eq!(number(&mounted.disk(), at), last[index(writer)], "seed {seed}");
        }
        mounted.umount();
        for overlay in 0..=OVERLAYS {
            check(&images.path(&format!("{overlay}.qcow2")));
        }
    }
}

#[test]
fn an_overlay_of_a_frozen_file_system_needs_no_recovery() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 64 * M, "");
    let mounted = Mounted::new(&image);
    let device = LoopDevice::attach(&mounted.disk());
    run("mkfs.ext4", &args!["-q", device.path()]);
    let inner = FileSystem::mount(device.path(), "rw");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0_u64.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let name = inner.path(&format!("file-{}", number % 20));
                fs::write(name, vec![number as u8; 50_000]).expect("write a file");
            }
        });
        for number in 1..=3 {
            let new = images.path(&format!("new-{number}.qcow2"));
            qchainfs(&args!["overlay", "--quiesce", mounted.root(), &new]).ok();
        }
        stop.store(true, Ordering::SeqCst);
    });
    fs::write(inner.path("last"), "thawed").expect("the file system takes writes again");
    for member in 1..=3 {
        let view = mounted.path(&format!("chain/{member}/disk.raw"));
        let frozen = LoopDevice::attach(&view);
        let said = run("dumpe2fs", &args!["-h", frozen.path()]);
        assert!(!said.contains("needs_recovery"), "chain/{member} has a journal to replay");
        run("e2fsck", &args!["-fn", frozen.path()]);
    }
    drop(inner);
    drop(device);
    mounted.umount();
    check(&images.path("new-3.qcow2"));
}

#[test]
fn an_image_at_rest_gets_an_overlay_too() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    paint(&image, &mut Random::new(302), 4 * M, 10);
    let untouched = Untouched::now(&[&image]);
    fs::create_dir(images.path("elsewhere")).expect("make a directory");
    let near = images.path("near.qcow2");
    let far = images.path("elsewhere/far.qcow2");
    qchainfs(&args!["overlay", &image, &near]).ok();
    qchainfs(&args!["overlay", "-q", &image, &far]).ok();
    assert_eq!(backing_of(&near).as_deref(), Some("disk.qcow2"));
    let absolute = image.canonicalize().expect("resolve").display().to_string();
    assert_eq!(backing_of(&far), Some(absolute));
    for overlay in [&near, &far] {
        check(overlay);
        same("an overlay", &bytes_of(&image), &bytes_of(overlay));
    }
    untouched.verify();
}

#[test]
fn an_overlay_that_is_made_while_the_mount_goes_says_what_came_of_it() {
    for seed in seeds(8) {
        let images = Images::new();
        let image = images.create("disk.qcow2", 4 * M, "");
        paint(&image, &mut Random::new(seed), 4 * M, 10);
        let bytes = bytes_of(&image);
        let mounted = Mounted::new(&image);
        let root = mounted.root();
        let mut top = image;
        thread::scope(|scope| {
            let umounted = scope.spawn(|| {
                thread::sleep(Duration::from_millis(5 * seed));
                qchainfs(&args!["umount", root])
            });
            for number in 0.. {
                let new = images.path(&format!("{number}.qcow2"));
                let outcome = qchainfs(&args!["overlay", root, &new]);
                if outcome.code == Some(0) {
                    top = new;
                    continue;
                }
                let code = outcome.code.expect("an exit code");
                let said = outcome.fails(code);
                // Without the mount its mountpoint is a mere directory.
                let words = ["the mount ended", "does not answer", "is not a mountpoint"];
                assert!(words.iter().any(|word| said.contains(word)), "{said}");
                break;
            }
            umounted.join().expect("join").ok();
        });
        mounted.is_over();
        check(&top);
        same("the disk", &bytes, &bytes_of(&top));
    }
}

#[test]
fn a_file_that_is_there_is_overwritten_only_by_force_and_a_member_never() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    paint(&image, &mut Random::new(303), 4 * M, 10);
    let other = images.raw("other.img", b"precious");
    let mounted = Mounted::new(&image);
    let said = qchainfs(&args!["overlay", mounted.root(), &other]).fails(1);
    assert!(said.contains("exists already"), "{said}");
    assert!(said.contains("--force"), "{said}");
    let said = qchainfs(&args!["overlay", mounted.root(), &image]).fails(1);
    assert!(said.contains("part of the chain") && !said.contains("--force"), "{said}");
    assert_eq!(fs::read(&other).expect("read"), b"precious");
    let said = qchainfs(&args!["overlay", "--force", mounted.root(), &image]).fails(1);
    assert!(said.contains("part of the chain"), "{said}");
    // What would be refused is so when nothing shall be done, too.
    qchainfs(&args!["overlay", "-n", mounted.root(), &other]).fails(1);
    qchainfs(&args!["overlay", "-n", "--force", mounted.root(), &image]).fails(1);
    qchainfs(&args!["overlay", "-n", mounted.root(), images.path("")]).fails(1);
    qchainfs(&args!["overlay", "-n", "--force", mounted.root(), &other]).ok();
    assert_eq!(fs::read(&other).expect("read"), b"precious");
    let before = fs::read(mounted.disk()).expect("read");
    qchainfs(&args!["overlay", "--force", mounted.root(), &other]).ok();
    holds(&mounted.disk(), &before);
    holds(&mounted.path("chain/1/disk.raw"), &before);
    mounted.umount();
    check(&other);
}

#[test]
fn nobody_is_told_to_overwrite_what_can_not_be_an_image() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let (directory, link, pipe) = (images.path("d"), images.path("link"), images.path("pipe"));
    fs::create_dir(&directory).expect("mkdir");
    symlink("nowhere", &link).expect("symlink");
    run("mkfifo", &args![pipe]);
    for new in [&directory, &link, &pipe] {
        for options in [&[][..], &["--force"]] {
            let mut words = args!["overlay"].to_vec();
            words.extend(options.iter().map(Into::into));
            words.extend(args![mounted.root(), new]);
            let said = qchainfs(&words).fails(1);
            assert!(said.contains("not a regular file") && !said.contains("--force"), "{said}");
        }
    }
    assert!(!images.path("nowhere").exists());
    mounted.umount();
}

#[test]
fn an_image_that_a_mount_writes_is_reached_through_the_mount() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    let mounted = Mounted::new(&image);
    let (second, third) = (images.path("2.qcow2"), images.path("3.qcow2"));
    qchainfs(&args!["overlay", &image, &second]).ok();
    qchainfs(&args!["overlay", &second, &third]).ok();
    assert!(mounted.path("chain/2/disk.raw").exists());
    let said = qchainfs(&args!["ls"]).ok();
    let root = mounted.root().display().to_string();
    let line = said.lines().find(|line| line.contains(&root)).expect("the mount is listed");
    assert!(line.contains("3.qcow2") && line.contains("writable"), "{line}");
    // The first one backs others now, and could be opened by others who only read it.
    run("qemu-img", &args!["info", &image]);
    mounted.umount();
}

#[test]
fn a_new_image_on_a_file_system_on_the_disk_itself_is_refused() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 64 * M, "");
    let mounted = Mounted::new(&image);
    let device = LoopDevice::attach(&mounted.disk());
    run("mkfs.ext4", &args!["-q", device.path()]);
    let inner = FileSystem::mount(device.path(), "rw");
    let new = inner.path("new.qcow2");
    let said = qchainfs(&args!["overlay", mounted.root(), &new]).fails(2);
    assert!(said.contains("on this very disk"), "{said}");
    assert!(!new.exists());
    drop(inner);
    drop(device);
    mounted.umount();
    check(&image);
}

#[test]
#[ignore = "needs btrfs in the kernel: tests/run runs it where that is there"]
fn a_btrfs_on_the_disk_is_frozen_too_and_takes_no_new_image() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 256 * M, "");
    let mounted = Mounted::new(&image);
    let device = LoopDevice::attach(&mounted.disk());
    run("mkfs.btrfs", &args!["-q", device.path()]);
    let inner = FileSystem::mount(device.path(), "rw");
    fs::write(inner.path("inside.qcow2"), b"").expect("write a file");
    symlink(inner.path("inside.qcow2"), images.path("link.qcow2")).expect("make a link");
    for new in [inner.path("new.qcow2"), images.path("link.qcow2")] {
        let said = qchainfs(&args!["overlay", "--force", mounted.root(), &new]).fails(2);
        assert!(said.contains("on this very disk"), "{said}");
    }
    assert!(!inner.path("new.qcow2").exists());
    fs::write(inner.path("late"), "written and not synced").expect("write a file");
    let new = images.path("new.qcow2");
    qchainfs(&args!["overlay", "--quiesce", mounted.root(), &new]).ok();
    // The kernel mounts no two file systems of one name at a time.
    drop(inner);
    drop(device);
    let device = LoopDevice::attach(&mounted.path("chain/1/disk.raw"));
    let frozen = FileSystem::mount(device.path(), "ro");
    let found = fs::read_to_string(frozen.path("late")).expect("read it at the point in time");
    assert_eq!(found, "written and not synced");
    drop(frozen);
    drop(device);
    mounted.umount();
    check(&new);
}

#[test]
fn an_active_layer_that_was_moved_gets_no_overlay_that_would_name_another_file() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    let mounted = Mounted::new(&image);
    let (moved, new) = (images.path("moved.qcow2"), images.path("new.qcow2"));
    fs::rename(&image, &moved).expect("move the image");
    images.create("disk.qcow2", 4 * M, "");
    let said = qchainfs(&args!["overlay", mounted.root(), &new]).fails(1);
    assert!(said.contains("moved or replaced"), "{said}");
    fs::remove_file(&image).expect("take the other away");
    qchainfs(&args!["overlay", mounted.root(), &new]).fails(10);
    assert!(!new.exists());
    fs::rename(&moved, &image).expect("move it back");
    qchainfs(&args!["overlay", mounted.root(), &new]).ok();
    mounted.umount();
    check(&new);
}

#[test]
fn an_overlay_made_through_a_link_names_its_backing_file_rightly_from_both_sides() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    paint(&image, &mut Random::new(304), 4 * M, 10);
    fs::create_dir(images.path("elsewhere")).expect("make a directory");
    let real = images.raw("elsewhere/real.qcow2", b"");
    let link = images.path("link.qcow2");
    symlink(&real, &link).expect("make a link");
    qchainfs(&args!["overlay", "--force", &image, &link]).ok();
    for name in [&real, &link] {
        same("an overlay", &bytes_of(&image), &bytes_of(name));
    }
}

#[test]
fn a_read_only_mount_and_an_encrypted_image_get_no_overlay() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    let mounted = Mounted::read_only(&image);
    let new = images.path("new.qcow2");
    let said = qchainfs(&args!["overlay", mounted.root(), &new]).fails(1);
    assert!(said.contains("read-only"), "{said}");
    assert!(!new.exists());
    mounted.umount();
    let key = images.raw("key", b"secret");
    let secret = format!("secret,id=key,file={}", key.display());
    let encrypted = images.path("encrypted.qcow2");
    let options = "encrypt.format=aes,encrypt.key-secret=key";
    run(
        "qemu-img",
        &args!["create", "-q", "-f", "qcow2", "--object", secret, "-o", options, &encrypted, "1M"],
    );
    let option = format!("secret={}", key.display());
    let said = qchainfs(&args!["overlay", "-o", option, &encrypted, &new]).fails(14);
    assert!(said.contains("encrypted"), "{said}");
    assert!(!new.exists());
}

#[test]
fn an_overlay_of_an_image_opened_by_a_link_has_the_chain_that_the_mount_has() {
    let images = Images::new();
    for directory in ["here", "there"] {
        fs::create_dir(images.path(directory)).expect("make a directory");
        let base = images.create(&format!("{directory}/base.qcow2"), 4 * M, "");
        let mut random = Random::new(if directory == "here" { 305 } else { 306 });
        paint(&base, &mut random, 4 * M, 10);
    }
    let image = images.path("there/disk.qcow2");
    run(
        "qemu-img",
        &args!["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &image],
    );
    let link = images.path("here/disk.qcow2");
    symlink("../there/disk.qcow2", &link).expect("make a link");
    let mounted = Mounted::with(&args!["-o", "backing_policy=any"], &link);
    let expected = bytes_of(&images.path("here/base.qcow2"));
    holds(&mounted.disk(), &expected);
    let new = images.path("here/new.qcow2");
    qchainfs(&args!["overlay", mounted.root(), &new]).ok();
    holds(&mounted.disk(), &expected);
    mounted.umount();
    assert_eq!(backing_of(&new).as_deref(), Some("disk.qcow2"));
    same("the new image", &expected, &bytes_of(&new));
}
