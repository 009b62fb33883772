//! Backing files must not change: images remember theirs, `seal` lets others do so, and `strict` refuses what has changed.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::support::M;
use crate::support::images::{Images, check, io, paint, poke};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, info, same};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, run};

/// Panics unless `image` mounts strictly and without a warning.
#[track_caller]
fn is_content_with_its_base(image: &Path) {
    let mut said = String::new();
    let mounted = Mounted::attempt_by(image.as_os_str(), |image, root| {
        let outcome = qchainfs(&args!["mount", "-o", "ro,strict", image, root]);
        said.clone_from(&outcome.stderr);
        outcome
    });
    match mounted {
        Ok(mounted) => mounted.umount(),
        Err(outcome) => panic!("{outcome}"),
    }
    assert_eq!(said, "");
}

/// Panics unless mounting `image` warns of its backing file, and does not do so strictly.
#[track_caller]
fn misses_its_base(image: &Path) {
    let mut said = String::new();
    let mounted = Mounted::attempt_by(image.as_os_str(), |image, root| {
        let outcome = qchainfs(&args!["mount", "-r", image, root]);
        said.clone_from(&outcome.stderr);
        outcome
    });
    match mounted {
        Ok(mounted) => mounted.umount(),
        Err(outcome) => panic!("{outcome}"),
    }
    assert!(said.contains("remembers its backing file"), "{said}");
    let said = Mounted::refused(&args!["-o", "ro,strict"], image, 13);
    assert!(said.contains("qchainfs seal"), "{said}");
}

/// Gives the file back the time that it had before `change`.
fn behind_its_back(file: &Path, change: impl FnOnce()) {
    let time = fs::metadata(file).and_then(|found| found.modified()).expect("look at it");
    change();
    let file = File::options().write(true).open(file).expect("open");
    file.set_modified(time).expect("set its time");
}

#[test]
fn images_that_we_make_remember_their_backing_file() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    paint(&base, &mut Random::new(601), 4 * M, 10);
    let made = images.path("made.qcow2");
    qchainfs(&args!["create", "-b", "base.qcow2", "-F", "qcow2", &made]).ok();
    let resting = images.path("resting.qcow2");
    qchainfs(&args!["overlay", "-q", &made, &resting]).ok();
    let live = images.path("live.qcow2");
    let reverted = images.path("reverted.qcow2");
    let mounted = Mounted::new(&resting);
    fs::write(images.path("patch"), [7; 70_000]).expect("write a file");
    let disk = format!("of={}", mounted.disk().display());
    let patch = format!("if={}", images.path("patch").display());
    run("dd", &args![&patch, &disk, "conv=notrunc", "status=none"]);
    qchainfs(&args!["overlay", mounted.root(), &live]).ok();
    run("dd", &args![&patch, &disk, "conv=notrunc", "status=none", "seek=9"]);
    qchainfs(&args!["revert", mounted.root(), "[2]", &reverted]).ok();
    mounted.umount();
    for image in [&made, &resting, &live, &reverted] {
        is_content_with_its_base(image);
        check(image);
    }
    io(&base, &["write -P 9 0 64k"]);
    for image in [&made, &resting, &live, &reverted] {
        misses_its_base(image);
    }
}

#[test]
fn an_image_of_any_kind_is_sealed_and_nothing_else_in_it_changes() {
    for options in ["", "compat=0.10", "cluster_size=2M", "extended_l2=on", "cluster_size=4k"] {
        let images = Images::new();
        let base = images.create("base.qcow2", 4 * M, "");
        paint(&base, &mut Random::new(602), 4 * M, 10);
        let image = images.overlay("top.qcow2", "base.qcow2", options);
        paint(&image, &mut Random::new(603), 4 * M, 10);
        let (bytes, mut before) = (bytes_of(&image), info(&image));
        // It does not remember anything.
        is_content_with_its_base(&image);
        qchainfs(&args!["seal", "--verify", &image]).fails(2);
        for _ in 0..2 {
            let said = qchainfs(&args!["seal", &image]).ok();
            assert!(said.contains("base.qcow2"), "{said}");
            is_content_with_its_base(&image);
            check(&image);
            let mut after = info(&image);
            // What the file occupies may differ.
            for info in [&mut before, &mut after] {
                info["actual-size"].take();
                info["children"].take();
            }
            assert_eq!(after, before, "{options}");
            same("the disk", &bytes, &bytes_of(&image));
        }
        // QEMU keeps what it does not know, also where it writes the header anew.
        io(&image, &["write -P 7 1M 64k"]);
        run("qemu-img", &args!["rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", &image]);
        is_content_with_its_base(&image);
        io(&base, &["write -P 9 0 64k"]);
        misses_its_base(&image);
        qchainfs(&args!["seal", "-q", &image]).ok();
        is_content_with_its_base(&image);
        check(&image);
    }
}

#[test]
fn a_hash_tells_a_copy_from_a_change() {
    let images = Images::new();
    let base = images.raw("base.img", &Random::new(604).bytes(3_000_000));
    let image = images.path("top.qcow2");
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", &image]);
    let said = qchainfs(&args!["seal", "--hash", &image]).ok();
    let sum = run("sha256sum", &args![&base]);
    assert!(said.contains(&sum[..64]), "{said}");
    qchainfs(&args!["seal", "--verify", &image]).ok();

    let file = File::options().write(true).open(&base).expect("open");
    file.set_modified(SystemTime::now() - Duration::from_secs(5000)).expect("set its time");
    misses_its_base(&image);
    qchainfs(&args!["seal", "--verify", &image]).ok();
    qchainfs(&args!["seal", "--hash", "-q", &image]).ok();
    is_content_with_its_base(&image);
    behind_its_back(&base, || poke(&base, 1_234_567, b"x"));
    is_content_with_its_base(&image);
    let said = qchainfs(&args!["seal", "--verify", &image]).fails(13);
    assert!(said.contains("its bytes are others"), "{said}");
}

#[test]
fn sealing_an_image_is_no_change_for_its_own_overlay() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    let middle = images.overlay("middle.qcow2", "base.qcow2", "");
    paint(&middle, &mut Random::new(605), 4 * M, 10);
    let top = images.path("top.qcow2");
    qchainfs(&args!["create", "-b", "middle.qcow2", "-F", "qcow2", &top]).ok();
    for options in [&args!["seal", "-q"][..], &args!["seal", "-q", "--hash"]] {
        qchainfs(&[options, &args![&middle]].concat()).ok();
        is_content_with_its_base(&middle);
        is_content_with_its_base(&top);
    }
    // A change from before it was sealed is one after that, too.
    io(&middle, &["write -P 9 0 64k"]);
    qchainfs(&args!["seal", "-q", &middle]).ok();
    misses_its_base(&top);
    io(&base, &["write -P 9 0 64k"]);
    misses_its_base(&middle);
}

#[test]
fn an_image_that_got_another_backing_file_remembers_nothing_of_the_old_one() {
    for options in [&args!["rebase", "-u"][..], &args!["rebase"]] {
        let images = Images::new();
        let base = images.create("base.qcow2", 4 * M, "");
        paint(&base, &mut Random::new(606), 4 * M, 10);
        let other = images.create("other.qcow2", 4 * M, "");
        let image = images.path("top.qcow2");
        qchainfs(&args!["create", "-b", "base.qcow2", "-F", "qcow2", &image]).ok();
        run("qemu-img", &[options, &args!["-b", "other.qcow2", "-F", "qcow2", &image]].concat());
        is_content_with_its_base(&image);
        let said = qchainfs(&args!["seal", "--verify", &image]).fails(2);
        assert!(said.contains("does not remember"), "{said}");
        qchainfs(&args!["seal", "-q", &image]).ok();
        is_content_with_its_base(&image);
        check(&image);
        io(&other, &["write -P 9 0 64k"]);
        misses_its_base(&image);
    }
}

#[test]
fn what_can_not_be_sealed_says_why() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let said = qchainfs(&args!["seal", &base]).fails(2);
    assert!(said.contains("no backing file"), "{said}");
    let image = images.overlay("top.qcow2", "base.qcow2", "");
    let mounted = Mounted::new(&image);
    qchainfs(&args!["seal", &image]).fails(11);
    mounted.umount();
    let long = "b".repeat(200);
    images.create(&long, M, "");
    let small = images.overlay("small.qcow2", &long, "cluster_size=512");
    let said = qchainfs(&args!["seal", &small]).fails(2);
    assert!(said.contains("no room"), "{said}");
    check(&small);
}
