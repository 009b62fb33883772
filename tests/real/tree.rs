//! What the mount looks like: which names there are, and what `info.json` says.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde_json::Value;

use crate::support::M;
use crate::support::images::{Images, io, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of_snapshot, holds, info};
use crate::support::random::Random;
use crate::support::tools::{QCHAINFS, args, run};

/// The names in a directory, sorted.
pub fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("list a directory");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("an UTF-8 name"))
        .collect();
    names.sort();
    names
}

/// The JSON in a file of the mount.
fn json(file: &Path) -> Value {
    let text = fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

#[test]
fn the_mountpoint_is_the_view_of_the_active_layer() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    assert_eq!(names_in(mounted.root()), ["chain", "disk.raw", "info.json", "snapshots"]);
    assert_eq!(names_in(&mounted.path("snapshots")), [""; 0]);
    assert_eq!(names_in(&mounted.path("chain")), ["0", "by-name"]);
    mounted.umount();
}

#[test]
fn every_member_has_its_number_and_its_name() {
    let images = Images::new();
    images.create("base.qcow2", M, "");
    images.overlay("middle.qcow2", "base.qcow2", "");
    let top = images.overlay("top.qcow2", "middle.qcow2", "");
    let mounted = Mounted::new(&top);
    assert_eq!(names_in(&mounted.path("chain")), ["0", "1", "2", "by-name"]);
    let by_name = mounted.path("chain/by-name");
    assert_eq!(names_in(&by_name), ["base.qcow2", "middle.qcow2", "top.qcow2"]);
    for (name, number) in [("top.qcow2", "0"), ("middle.qcow2", "1"), ("base.qcow2", "2")] {
        let link = fs::read_link(by_name.join(name)).expect("a link");
        assert_eq!(link, Path::new("..").join(number));
    }
    for member in ["chain/1", "chain/2"] {
        assert_eq!(names_in(&mounted.path(member)), ["disk.raw", "info.json", "snapshots"]);
    }
    mounted.umount();
}

#[test]
fn member_zero_is_links_to_the_files_above() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    snapshot(&image, "one");
    let mounted = Mounted::new(&image);
    let zero = mounted.path("chain/0");
    assert_eq!(names_in(&zero), ["disk.raw", "info.json", "snapshots"]);
    for name in names_in(&zero) {
        let link = fs::read_link(zero.join(&name)).expect("a link");
        assert_eq!(link, Path::new("../..").join(&name));
    }
    let inode = |path: &str| fs::metadata(mounted.path(path)).expect("stat").ino();
    assert_eq!(inode("chain/0/disk.raw"), inode("disk.raw"));
    assert_eq!(inode("chain/0/snapshots/one/disk.raw"), inode("snapshots/one/disk.raw"));
    mounted.umount();
}

#[test]
fn a_walk_through_the_tree_ends_and_reads_every_file() {
    let images = Images::new();
    let mut random = Random::new(101);
    let base = images.create("base.qcow2", M, "");
    paint(&base, &mut random, M, 5);
    snapshot(&base, "one");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    snapshot(&top, "two");
    let mounted = Mounted::new(&top);
    let said = run("find", &args!["-L", mounted.root(), "-type", "f", "-name", "disk.raw"]);
    // The views and member 0's links to two of them, and every member once more by its name.
    assert_eq!(said.lines().count(), 4 + 2 + 4, "{said}");
    for file in said.lines() {
        assert_eq!(fs::read(file).expect("read a view").len() as u64, M, "{file}");
    }
    mounted.umount();
}

#[test]
fn info_json_tells_what_a_view_is() {
    let images = Images::new();
    let base = images.create("base.qcow2", 2 * M, "");
    io(&base, &["write -P 1 0 1M"]);
    snapshot(&base, "one");
    let top = images.overlay_sized("top.qcow2", "base.qcow2", 3 * M, "");
    let mounted = Mounted::new(&top);
    let views = [
        ("", 3 * M, "top.qcow2", false),
        ("chain/1", 2 * M, "base.qcow2", true),
        ("chain/1/snapshots/one", 2 * M, "base.qcow2", true),
    ];
    for (view, size, file, read_only) in views {
        let about = json(&mounted.path(view).join("info.json"));
        assert_eq!(about["size"], size, "{about}");
        assert_eq!(about["read-only"], read_only, "{about}");
        let allocated = about["allocated"].as_u64().expect("allocated bytes");
        assert!((M..2 * M).contains(&allocated), "{about}");
        assert!(about["file"].as_str().is_some_and(|name| name.ends_with(file)), "{about}");
        assert!(about["address"].as_str().is_some_and(|name| !name.is_empty()), "{about}");
        let created = about["created"].as_str().expect("a time");
        let seconds = run("date", &args!["--date", created, "+%s"]);
        assert!(created.contains('T') && seconds.trim().parse::<i64>().is_ok(), "{about}");
    }
    let when = &info(&base)["snapshots"][0]["date-sec"];
    let one = json(&mounted.path("chain/1/snapshots/one/info.json"));
    let created = one["created"].as_str().expect("a time");
    let seconds = run("date", &args!["--date", created, "+%s"]);
    assert_eq!(seconds.trim(), when.to_string(), "the snapshot's creation");
    mounted.umount();
}

#[test]
fn addresses_in_info_json_name_the_same_view_on_the_command_line() {
    let images = Images::new();
    let base = images.create("base.qcow2", 2 * M, "");
    snapshot(&base, "one");
    let top = images.overlay_sized("top.qcow2", "base.qcow2", 3 * M, "");
    let mounted = Mounted::read_only(&top);
    for (view, size) in [("", 3 * M), ("chain/1", 2 * M), ("chain/1/snapshots/one", 2 * M)] {
        let about = json(&mounted.path(view).join("info.json"));
        let address = about["address"].as_str().expect("an address");
        let again = Mounted::read_only(address);
        assert_eq!(fs::metadata(again.disk()).expect("stat").len(), size, "{address}");
        again.umount();
    }
    mounted.umount();
}

#[test]
fn the_hidden_directory_is_not_listed_but_answers() {
    let images = Images::new();
    images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let mounted = Mounted::new(&top);
    assert!(!names_in(mounted.root()).contains(&".qchainfs".to_owned()));
    let version = fs::read_to_string(mounted.path(".qchainfs/version")).expect("the version");
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    let chain = json(&mounted.path(".qchainfs/chain.json")).to_string();
    assert!(chain.contains("top.qcow2") && chain.contains("base.qcow2"), "{chain}");
    let daemon = json(&mounted.path(".qchainfs/daemon.json"));
    let exe = fs::read_link(format!("/proc/{}/exe", daemon["pid"])).expect("the daemon's program");
    assert_eq!(exe.file_name().expect("a name"), "qchainfs");
    mounted.umount();
}

#[test]
fn names_that_no_file_can_have_are_percent_encoded() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for name in ["a/b", ".hidden", "two\nlines", "..", "plain", "with space", "Ünï"] {
        io(&image, &[format!("write -P {} 0 512", name.len())]);
        snapshot(&image, name);
    }
    let mounted = Mounted::new(&image);
    let expected = ["%2E.", "%2Ehidden", "a%2Fb", "plain", "two%0Alines", "with space", "Ünï"]
        .map(String::from);
    assert_eq!(names_in(&mounted.path("snapshots")), expected);
    let view = mounted.path("snapshots/a%2Fb/disk.raw");
    holds(&view, &bytes_of_snapshot(&image, "a/b"));
    mounted.umount();
}

#[test]
fn of_snapshots_with_one_name_none_is_left_out() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for byte in [1, 2, 3] {
        io(&image, &[format!("write -P {byte} 0 1M")]);
        snapshot(&image, "same");
    }
    snapshot(&image, "");
    let mounted = Mounted::new(&image);
    let names = names_in(&mounted.path("snapshots"));
    assert_eq!(names.len(), 4, "{names:?}");
    for (name, byte) in [("same", 1), ("same~2", 2), ("same~3", 3)] {
        let view = mounted.path("snapshots").join(name).join("disk.raw");
        holds(&view, &vec![byte; crate::support::index(M)]);
    }
    mounted.umount();
}

#[test]
fn three_hundred_snapshots_are_all_there() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "cluster_size=4k");
    for number in 0..300 {
        snapshot(&image, &format!("a rather long name for the snapshot number {number:03}"));
    }
    let mounted = Mounted::new(&image);
    let names = names_in(&mounted.path("snapshots"));
    assert_eq!(names.len(), 300);
    assert!(names[299].ends_with("299"), "{names:?}");
    mounted.umount();
}

#[test]
fn the_address_in_info_json_leads_back_to_the_same_snapshot() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for (byte, name) in [(1, "same"), (2, "same"), (3, "#1"), (4, ""), (5, "alone")] {
        io(&image, &[format!("write -P {byte} 0 1M")]);
        snapshot(&image, name);
    }
    let mounted = Mounted::read_only(&image);
    let names = names_in(&mounted.path("snapshots"));
    assert_eq!(names.len(), 5, "{names:?}");
    for name in names {
        let about = json(&mounted.path("snapshots").join(name).join("info.json"));
        let address = about["address"].as_str().expect("an address");
        let found = run(QCHAINFS, &args!["info", "--output", "json", address]);
        let found: Value = serde_json::from_str(&found).expect("JSON");
        assert_eq!(found["qchainfs"]["snapshot"]["id"], about["snapshot"]["id"], "{address}");
        if about["snapshot"]["name"] == "alone" {
            assert!(address.ends_with("@alone"), "{address}");
        }
    }
    mounted.umount();
}

#[test]
fn members_have_their_numbers_in_the_whole_chain_also_where_a_part_is_mounted() {
    let images = Images::new();
    images.create("base.qcow2", M, "");
    images.overlay("middle.qcow2", "base.qcow2", "");
    let top = images.overlay("top.qcow2", "middle.qcow2", "");
    let mounted = Mounted::read_only(format!("{}[1]", top.display()));
    let members = json(&mounted.path(".qchainfs/chain.json"));
    assert_eq!((&members[0]["index"], &members[1]["index"]), (&1.into(), &2.into()));
    mounted.umount();
}
