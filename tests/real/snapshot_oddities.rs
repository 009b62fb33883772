//! Internal snapshots that are out of the ordinary: their names, their sizes, what they lie on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::images::{Images, io, paint, poke, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, reads_as, reads_as_snapshot};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, run};
use crate::support::{K, M, index};

/// Where the entry of a snapshot begins whose table has entries of 24 bytes of extra data, an id of one byte and a name of
/// `name_len` bytes.
fn entry(image: &Path, number: u64, name_len: u64) -> u64 {
    let mut table = [0; 8];
    File::open(image).expect("open").read_exact_at(&mut table, 64).expect("read");
    u64::from_be_bytes(table) + number * (40 + 24 + 1 + name_len).next_multiple_of(8)
}

/// An image with three snapshots "one", "two" and "six", and their content.
fn three(images: &Images) -> (PathBuf, Vec<Vec<u8>>) {
    let image = images.create("disk.qcow2", M, "");
    let mut random = Random::new(191);
    let mut contents = Vec::new();
    for name in ["one", "two", "six"] {
        paint(&image, &mut random, M, 5);
        snapshot(&image, name);
        contents.push(bytes_of(&image));
    }
    paint(&image, &mut random, M, 5);
    (image, contents)
}

#[test]
fn ids_are_text_and_need_be_no_numbers() {
    let images = Images::new();
    let (image, contents) = three(&images);
    for (number, id) in [b"x", b"/", b"\x07"].into_iter().enumerate() {
        poke(&image, entry(&image, number as u64, 3) + 64, id);
    }
    let mounted = Mounted::new(&image);
    for (name, content) in ["one", "two", "six"].into_iter().zip(&contents) {
        holds(&mounted.path(&format!("snapshots/{name}/disk.raw")), content);
    }
    mounted.umount();
    // QEMU finds it by that id, and so do we.
    assert_eq!(bytes_of_snapshot(&image, "x"), contents[0]);
    let mut address = image.clone().into_os_string();
    address.push("@#x");
    let mounted = Mounted::read_only(&address);
    holds(&mounted.disk(), &contents[0]);
    mounted.umount();
}

#[test]
fn snapshots_that_share_both_name_and_id_are_all_there() {
    let images = Images::new();
    let (image, contents) = three(&images);
    for number in 0..3 {
        poke(&image, entry(&image, number, 3) + 64, b"1one");
    }
    let mounted = Mounted::new(&image);
    let names = crate::tree::names_in(&mounted.path("snapshots"));
    assert_eq!(names.len(), 3, "{names:?}");
    for content in &contents {
        let has = |name: &String| {
            let view = mounted.path("snapshots").join(name).join("disk.raw");
            fs::read(view).expect("read a view") == *content
        };
        assert!(names.iter().any(has), "a content is left out of {names:?}");
    }
    mounted.umount();
}

#[test]
fn a_name_that_is_another_snapshots_id_does_not_hide_that_one() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for (byte, name) in [(1, "2"), (2, "1")] {
        io(&image, &[format!("write -P {byte} 0 1M")]);
        snapshot(&image, name);
    }
    for (suffix, byte) in [("@2", 1), ("@1", 2), ("@#1", 1), ("@#2", 2)] {
        let mut address = image.clone().into_os_string();
        address.push(suffix);
        let mounted = Mounted::read_only(&address);
        holds(&mounted.disk(), &vec![byte; index(M)]);
        mounted.umount();
    }
}

#[test]
fn the_state_of_a_machine_is_no_part_of_the_disk() {
    let images = Images::new();
    let mut random = Random::new(192);
    // One L2 table maps 512 MiB: the state begins there, behind the disk.
    let image = images.create("disk.qcow2", 2 * M, "");
    paint(&image, &mut random, 2 * M, 8);
    let disk = bytes_of(&image);
    let resize = |size: u64| {
        run("qemu-img", &args!["resize", "-q", "--shrink", "-f", "qcow2", image, size.to_string()]);
    };
    resize(514 * M);
    io(&image, &["write -P 0xee 512M 300k"]);
    snapshot(&image, "running");
    resize(2 * M);
    let at = entry(&image, 0, 7);
    poke(&image, at + 32, &0_u32.to_be_bytes());
    poke(&image, at + 40, &(300 * K).to_be_bytes());
    poke(&image, at + 48, &(2 * M).to_be_bytes());
    io(&image, &["write -P 9 0 1M"]);
    let mounted = Mounted::new(&image);
    let view = mounted.path("snapshots/running/disk.raw");
    holds(&view, &disk);
    reads_as_snapshot(&view, &image, "running");
    mounted.umount();
    let said = run("qemu-img", &args!["info", "--output=json", image]);
    let theirs: Value = serde_json::from_str(&said).expect("JSON");
    let said = qchainfs(&args!["info", "--output=json", image]).ok();
    let ours: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(ours["snapshots"][0]["vm-state-size"], 300 * K);
    assert_eq!(ours["snapshots"][0]["vm-state-size"], theirs["snapshots"][0]["vm-state-size"]);
    // A machine's state is not lost when the disk is written.
    io(&image, &["write -P 3 1M 64k"]);
    crate::support::images::check(&image);
}

#[test]
fn snapshots_of_any_member_keep_their_sizes_and_see_what_lay_below() {
    let images = Images::new();
    let mut random = Random::new(193);
    let base = images.create("0.qcow2", 3 * M, "");
    paint(&base, &mut random, 3 * M, 10);
    let mut expected: Vec<(usize, &str, Vec<u8>)> = Vec::new();
    let mut members = vec![base];
    for level in 0..3_usize {
        let image = members.last().expect("a member").clone();
        for (name, size) in [("first", 2 * M + 512), ("larger", 5 * M), ("smaller", M - 1536)] {
            expected.push((level, name, bytes_of(&image)));
            snapshot(&image, name);
            run(
                "qemu-img",
                &args!["resize", "-q", "--shrink", "-f", "qcow2", image, size.to_string()],
            );
            paint(&image, &mut random, size, 6);
        }
        let (name, below) = (format!("{}.qcow2", level + 1), format!("{level}.qcow2"));
        members.push(images.overlay_sized(&name, &below, 3 * M, ""));
        paint(members.last().expect("a member"), &mut random, 3 * M, 4);
    }
    let mounted = Mounted::new(members.last().expect("a member"));
    for (level, name, content) in &expected {
        let number = members.len() - 1 - level;
        holds(&mounted.path(&format!("chain/{number}/snapshots/{name}/disk.raw")), content);
    }
    for (level, member) in members.iter().enumerate() {
        let number = members.len() - 1 - level;
        reads_as(&mounted.path(&format!("chain/{number}/disk.raw")), member);
    }
    mounted.umount();
}

#[test]
fn a_snapshot_lies_on_the_backing_file_of_today() {
    let images = Images::new();
    let mut random = Random::new(194);
    for (name, size) in [("old", 4 * M), ("new", 4 * M), ("short", M + 512), ("long", 6 * M)] {
        let base = images.create(&format!("{name}.qcow2"), size, "");
        paint(&base, &mut random, size, 12);
    }
    let top = images.overlay("top.qcow2", "old.qcow2", "");
    paint(&top, &mut random, 4 * M, 4);
    snapshot(&top, "one");
    paint(&top, &mut random, 4 * M, 4);
    for name in ["new.qcow2", "short.qcow2", "long.qcow2", "", "old.qcow2"] {
        run("qemu-img", &args!["rebase", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", top]);
        let mounted = Mounted::new(&top);
        let view = mounted.path("snapshots/one/disk.raw");
        holds(&view, &bytes_of_snapshot(&top, "one"));
        reads_as(&mounted.disk(), &top);
        mounted.umount();
    }
}
