//! Which backing files an image may have opened on its behalf.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::M;
use crate::support::images::{Images, io};
use crate::support::mounted::Mounted;
use crate::support::oracle::reads_as;
use crate::support::tools::{args, run};

/// An image in one directory over a base in another, which it names as `name`.
fn outside(images: &Images, name: &str) -> (PathBuf, PathBuf) {
    fs::create_dir(images.path("here")).expect("make a directory");
    fs::create_dir(images.path("there")).expect("make a directory");
    let base = images.create("there/base.qcow2", M, "");
    io(&base, &["write -P 7 0 1M"]);
    let top = images.path("here/top.qcow2");
    let words = args!["create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", top];
    run("qemu-img", &words);
    (top, base)
}

fn option(policy: impl AsRef<std::ffi::OsStr>) -> Vec<OsString> {
    let mut option = OsString::from("backing_policy=");
    option.push(policy);
    args!["-o", option].to_vec()
}

fn allow(directory: &Path) -> Vec<OsString> {
    let mut policy = OsString::from("allow:");
    policy.push(directory);
    option(policy)
}

#[test]
fn a_base_outside_the_directory_of_the_image_is_refused_unless_allowed() {
    let images = Images::new();
    let (top, _) = outside(&images, "../there/base.qcow2");
    for options in [vec![], option("same-dir"), option("deny"), allow(&images.path("here"))] {
        let said = Mounted::refused(&options, &top, 13);
        assert!(said.contains("top.qcow2") && said.contains("base.qcow2"), "{said}");
    }
    for options in [option("any"), allow(&images.path("there")), allow(&images.path(""))] {
        let mounted = Mounted::with(&options, &top);
        reads_as(&mounted.disk(), &top);
        mounted.umount();
    }
}

#[test]
fn an_absolute_name_follows_the_same_rule() {
    let images = Images::new();
    let name = images.path("there/base.qcow2");
    let (top, _) = outside(&images, name.to_str().expect("an UTF-8 name"));
    let said = Mounted::refused(&[], &top, 13);
    assert!(said.contains("backing_policy="), "no way out is told: {said}");
    Mounted::with(&option("any"), &top).umount();
}

#[test]
fn a_base_in_a_directory_below_is_allowed() {
    let images = Images::new();
    fs::create_dir(images.path("below")).expect("make a directory");
    let base = images.create("below/base.qcow2", M, "");
    io(&base, &["write -P 7 0 1M"]);
    let top = images.overlay("top.qcow2", "below/base.qcow2", "");
    let absolute = images.path("absolute.qcow2");
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", absolute]);
    for image in [&top, &absolute] {
        let mounted = Mounted::new(image);
        reads_as(&mounted.disk(), image);
        mounted.umount();
    }
}

#[test]
fn deny_refuses_any_backing_file_and_no_image_without_one() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    Mounted::refused(&option("deny"), &top, 13);
    Mounted::with(&option("deny"), &base).umount();
}

#[test]
fn the_rule_of_the_top_image_holds_for_members_further_down() {
    let images = Images::new();
    let (middle, _) = outside(&images, "../there/base.qcow2");
    let top = images.path("here/over.qcow2");
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top]);
    let said = Mounted::refused(&[], &top, 13);
    assert!(said.contains("base.qcow2"), "{said}");
    Mounted::with(&allow(&images.path("there")), &top).umount();
}

#[test]
fn a_directory_whose_name_only_begins_alike_is_outside() {
    let images = Images::new();
    fs::create_dir(images.path("disk")).expect("make a directory");
    fs::create_dir(images.path("disk-other")).expect("make a directory");
    images.create("disk-other/base.qcow2", M, "");
    let top = images.path("disk/top.qcow2");
    let name = "../disk-other/base.qcow2";
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", top]);
    Mounted::refused(&[], &top, 13);
}

#[test]
fn a_relative_name_is_looked_up_beside_the_image_and_not_beside_the_caller() {
    let images = Images::new();
    let (top, _) = outside(&images, "../there/base.qcow2");
    fs::write(images.path("base.qcow2"), "not this one").expect("write");
    let mounted = Mounted::with(&option("any"), &top);
    reads_as(&mounted.disk(), &top);
    mounted.umount();
}

#[test]
fn names_that_are_no_files_are_never_opened() {
    for name in ["nbd://localhost:1/x", "json:{\"driver\":\"nbd\"}", "fat:rw:/tmp", "/dev/zero"] {
        let images = Images::new();
        let top = images.create("top.qcow2", M, "");
        run("qemu-img", &args!["rebase", "-u", "-b", name, "-F", "raw", top]);
        for options in [vec![], option("any")] {
            match Mounted::attempt(&options, &top) {
                Ok(_) => panic!("{name} was opened"),
                Err(outcome) => {
                    let code = outcome.code.expect("a code");
                    assert!([1, 10, 13, 14].contains(&code), "{outcome}");
                    outcome.fails(code);
                }
            }
        }
    }
}
