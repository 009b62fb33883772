//! `qchainfs create` makes what `qemu-img create` makes.

use std::fs;

use crate::support::M;
use crate::support::images::{Images, Untouched, check, io, paint};
use crate::support::oracle::{bytes_of, info, same, virtual_size};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, run};
use crate::support::writer::Writer;

/// What an image is, without what differs between any two files.
fn properties(image: &std::path::Path) -> serde_json::Value {
    let mut about = info(image);
    let about = about.as_object_mut().expect("an object");
    for key in ["children", "filename", "actual-size", "full-backing-filename"] {
        about.remove(key);
    }
    serde_json::Value::Object(std::mem::take(about))
}

#[test]
fn a_new_image_has_the_properties_that_qemu_gives_it() {
    let images = Images::new();
    let options = [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=4k,refcount_bits=1",
        "refcount_bits=64",
        "compat=0.10,cluster_size=4096",
        "preallocation=off,lazy_refcounts=off",
    ];
    for options in options {
        let theirs = images.create("theirs.qcow2", 100 * M, options);
        let ours = images.path("ours.qcow2");
        qchainfs(&args!["create", "-o", options, ours, "100M"]).ok();
        check(&ours);
        assert_eq!(properties(&ours), properties(&theirs), "{options}");
        fs::remove_file(ours).expect("remove");
    }
}

#[test]
fn sizes_are_given_as_to_qemu() {
    let images = Images::new();
    for size in ["1048576", "512", "3k", "5M", "7G", "1T", "1.5G", "1000", ".5M", "5."] {
        let (ours, theirs) = (images.path("ours.qcow2"), images.path("theirs.qcow2"));
        run("qemu-img", &args!["create", "-q", "-f", "qcow2", theirs, size]);
        qchainfs(&args!["create", ours, size]).ok();
        check(&ours);
        assert_eq!(virtual_size(&ours), virtual_size(&theirs), "{size}");
        fs::remove_file(ours).expect("remove");
    }
}

#[test]
fn a_new_overlay_shows_its_base_and_has_its_size() {
    let images = Images::new();
    let mut random = Random::new(181);
    let base = images.create("base.qcow2", 6 * M, "");
    paint(&base, &mut random, 6 * M, 10);
    images.raw("base.raw", &random.bytes(300_000));
    for (name, format) in [("base.qcow2", "qcow2"), ("base.raw", "raw")] {
        let base = images.path(name);
        let untouched = Untouched::now(&[&base]);
        let (ours, theirs) = (images.path("ours.qcow2"), images.overlay("theirs.qcow2", name, ""));
        qchainfs(&args!["create", "-b", name, "-F", format, ours]).ok();
        check(&ours);
        assert_eq!(properties(&ours), properties(&theirs), "{name}");
        same("the overlay", &bytes_of(&theirs), &bytes_of(&ours));
        fs::remove_file(ours).expect("remove");
        untouched.verify();
    }
}

#[test]
fn an_overlay_may_be_larger_than_its_base() {
    let images = Images::new();
    let base = images.create("base.qcow2", 2 * M, "");
    io(&base, &["write -P 3 0 2M"]);
    let ours = images.path("ours.qcow2");
    qchainfs(&args!["create", "-b", "base.qcow2", "-F", "qcow2", ours, "5M"]).ok();
    check(&ours);
    let theirs = images.overlay_sized("theirs.qcow2", "base.qcow2", 5 * M, "");
    same("the overlay", &bytes_of(&theirs), &bytes_of(&ours));
}

#[test]
fn a_new_image_is_written_by_us_and_by_qemu() {
    for options in ["compat=0.10", "cluster_size=512", "cluster_size=64k,refcount_bits=8"] {
        let images = Images::new();
        let mut random = Random::new(182);
        let image = images.path("disk.qcow2");
        qchainfs(&args!["create", "-o", options, image, "4M"]).ok();
        let mut writer = Writer::open(&image);
        writer.scribble(&mut random, 20);
        writer.close();
        paint(&image, &mut random, 4 * M, 20);
        check(&image);
        let mut writer = Writer::open(&image);
        writer.scribble(&mut random, 20);
        writer.close();
    }
}

#[test]
fn an_existing_file_is_not_overwritten() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let other = images.raw("notes.txt", b"not an image");
    let untouched = Untouched::now(&[&image, &other]);
    for file in [&image, &other] {
        let said = qchainfs(&args!["create", file, "4M"]).fails(1);
        assert!(!said.contains("rm "), "deleting a file is no advice: {said}");
    }
    untouched.verify();
}

#[test]
fn a_base_without_a_format_is_a_usage_error_and_nothing_is_made() {
    let images = Images::new();
    images.create("base.qcow2", M, "");
    let ours = images.path("ours.qcow2");
    let outcome = qchainfs(&args!["create", "-b", "base.qcow2", ours]);
    assert_eq!(outcome.code, Some(2), "{outcome}");
    assert!(outcome.stderr.contains("-F"), "{outcome}");
    assert!(!ours.exists());
}

#[test]
fn a_base_that_is_not_there_is_named_and_nothing_is_made() {
    let images = Images::new();
    let ours = images.path("ours.qcow2");
    let said = qchainfs(&args!["create", "-b", "none.qcow2", "-F", "qcow2", ours]).fails(10);
    assert!(said.contains("none.qcow2"), "{said}");
    assert!(!ours.exists(), "a half-made image was left behind");
}

#[test]
fn impossible_options_are_usage_errors_and_nothing_is_made() {
    let images = Images::new();
    let ours = images.path("ours.qcow2");
    let wrong = [
        "cluster_size=1000",
        "cluster_size=4M",
        "refcount_bits=3",
        "compat=2.0",
        "compat=0.10,refcount_bits=8",
        "colour=blue",
        "lazy_refcounts=on",
        "preallocation=full",
    ];
    for options in wrong {
        let outcome = qchainfs(&args!["create", "-o", options, ours, "1M"]);
        assert_eq!(outcome.code, Some(2), "{outcome}");
        assert!(!ours.exists(), "{options}");
    }
    for size in [&["many"][..], &[], &["-5"], &["1kB"], &["1MiB"], &["1.5"]] {
        let mut words = args!["create", ours].to_vec();
        words.extend(size.iter().map(std::ffi::OsString::from));
        let outcome = qchainfs(&words);
        assert_eq!(outcome.code, Some(2), "{outcome}");
        assert!(!ours.exists(), "{size:?}");
    }
}

#[test]
fn nothing_that_the_base_names_is_opened() {
    let images = Images::new();
    images.create("lowest.qcow2", M, "");
    let base = images.overlay("base.qcow2", "lowest.qcow2", "");
    fs::remove_file(images.path("lowest.qcow2")).expect("remove");
    let ours = images.path("ours.qcow2");
    qchainfs(&args!["create", "-b", base, "-F", "qcow2", ours]).ok();
    assert_eq!(properties(&ours)["virtual-size"], M);
}

#[test]
fn what_has_an_argument_of_its_own_can_be_an_option_too() {
    let images = Images::new();
    images.create("base.qcow2", M, "");
    let (ours, theirs) = (images.path("ours.qcow2"), images.path("theirs.qcow2"));
    let options = "backing_file=base.qcow2,backing_fmt=qcow2,size=3M";
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-o", options, theirs]);
    qchainfs(&args!["create", "-o", options, ours]).ok();
    assert_eq!(properties(&ours), properties(&theirs));
}

#[test]
fn an_empty_name_is_no_base() {
    let images = Images::new();
    let ours = images.path("ours.qcow2");
    let said = qchainfs(&args!["create", "-b", "", "-F", "qcow2", ours, "1M"]).fails(2);
    assert!(said.contains("backing file"), "{said}");
    assert!(!ours.exists());
}
