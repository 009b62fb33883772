//! `qchainfs diff` finds every sector in which two views differ, and no other.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use serde_json::Value;

use crate::support::held::Held;
use crate::support::images::{Images, io, paint, poke, snapshot};
use crate::support::oracle::{bytes_of, bytes_of_snapshot};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, attempt, qchainfs};
use crate::support::{K, M, index};

/// Start and length.
type Range = (u64, u64);

/// The address of a view of `image`.
fn view(image: &Path, suffix: &str) -> OsString {
    let mut address = image.to_path_buf().into_os_string();
    address.push(suffix);
    address
}

/// The sectors in which two disks differ, byte by byte.
fn expected(first: &[u8], second: &[u8]) -> Vec<Range> {
    let longest = first.len().max(second.len());
    let byte = |disk: &[u8], at: usize| disk.get(at).copied().unwrap_or(0);
    let mut ranges: Vec<Range> = Vec::new();
    for start in (0..longest).step_by(512) {
        let end = longest.min(start + 512);
        if (start..end).all(|at| byte(first, at) == byte(second, at)) {
            continue;
        }
        let (start, len) = (start as u64, (end - start) as u64);
        match ranges.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += len,
            _ => ranges.push((start, len)),
        }
    }
    ranges
}

/// What the program says, which its exit code must confirm.
#[track_caller]
fn said(first: &OsStr, second: &OsStr) -> Vec<Range> {
    let outcome = qchainfs(&args!["diff", "--output", "json", first, second]);
    assert!([Some(0), Some(4)].contains(&outcome.code), "{outcome}");
    let list: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let number = |value: &Value| value.as_u64().expect("a number");
    let list = list.as_array().expect("a list");
    let ranges: Vec<_> =
        list.iter().map(|range| (number(&range["start"]), number(&range["length"]))).collect();
    assert_eq!(outcome.code == Some(0), ranges.is_empty(), "{outcome}");
    ranges
}

/// Panics unless the differences are those of the bytes, in both directions.
#[track_caller]
fn differs_as(first: (&OsStr, &[u8]), second: (&OsStr, &[u8])) {
    let ranges = expected(first.1, second.1);
    assert_eq!(
        said(first.0, second.0),
        ranges,
        "{first:?} {second:?}",
        first = first.0,
        second = second.0
    );
    assert_eq!(said(second.0, first.0), ranges, "the other way round");
}

#[test]
fn views_of_the_same_bytes_are_equal_however_they_are_stored() {
    let images = Images::new();
    let plain = images.create("plain.qcow2", 4 * M, "");
    io(&plain, &["write -P 7 1M 1M", "write -z 3M 64k"]);
    let packed = images.create("packed.qcow2", 4 * M, "cluster_size=4k,compat=0.10");
    io(&packed, &["write -c -P 7 1M 4k", "write -P 7 1028k 1020k", "write -P 0 2M 1M"]);
    assert_eq!(said(plain.as_os_str(), packed.as_os_str()), []);
    let outcome = qchainfs(&args!["diff", plain, packed]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), ""), "{outcome}");
    assert_eq!(said(plain.as_os_str(), plain.as_os_str()), []);
}

#[test]
fn differences_are_told_in_sectors_with_neighbours_made_one() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 1 0 4M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    // Inside a sector; over the border of two; two neighbours written apart.
    io(
        &top,
        &["write -P 2 1000 1", "write -P 2 65535 2", "write -P 2 1M 64k", "write -P 3 1088k 512"],
    );
    let ranges = [(512, 512), (65024, 1024), (M, 66048)];
    assert_eq!(said(&view(&top, ""), &view(&top, "[1]")), ranges);
    let outcome = qchainfs(&args!["diff", top, base]);
    let lines = "Offset          Length\n0x200           0x200\n0xfe00          0x400\n\
                 0x100000        0x10200\n";
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(4), lines), "{outcome}");
}

#[test]
fn the_views_of_random_chains_differ_as_their_bytes_do() {
    for seed in seeds(6) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let mut views: Vec<(OsString, Vec<u8>)> = Vec::new();
        let base = images.raw("0.raw", &random.bytes(index(2 * M)));
        let mut name = "0.raw".to_owned();
        let mut files = vec![base];
        for level in 1..=3 {
            let size = 512 * (2 * K + random.below(4 * K));
            let options = random.pick(&[
                "cluster_size=512",
                "cluster_size=4k",
                "cluster_size=1M",
                "cluster_size=64k,extended_l2=on",
            ]);
            let next = format!("{level}.qcow2");
            let member = images.overlay_sized(&next, &name, size, options);
            paint(&member, &mut random, size, 6);
            snapshot(&member, "one");
            views.push((view(&member, "@one"), bytes_of_snapshot(&member, "one")));
            paint(&member, &mut random, size, 3);
            views.push((view(&member, ""), bytes_of(&member)));
            files.push(member);
            name = next;
        }
        let top = files.last().expect("a top").clone();
        views.push((view(&top, "[3]"), bytes_of(&files[0])));
        views.push((view(&top, "[2]"), bytes_of(&files[1])));
        views.push((view(&top, "[1]@one"), bytes_of_snapshot(&files[2], "one")));
        for _ in 0..10 {
            let (first, second) = (random.below(9) as usize, random.below(9) as usize);
            let (first, second) = (&views[first], &views[second]);
            differs_as((&first.0, &first.1), (&second.0, &second.1));
        }
        // QEMU's own judgement on two of them.
        let qemu = attempt("qemu-img", &args!["compare", files[3], files[2]]);
        let ours = qchainfs(&args!["diff", "-q", files[3], files[2]]);
        assert_eq!(qemu.code == Some(0), ours.code == Some(0), "{qemu}\n{ours}");
    }
}

#[test]
fn the_shorter_view_reads_as_zero_behind_its_end() {
    let images = Images::new();
    let short = images.create("short.qcow2", M, "");
    let long = images.create("long.qcow2", 3 * M, "");
    for image in [&short, &long] {
        io(image, &["write -P 5 0 1M"]);
    }
    io(&long, &["write -P 0 1M 64k"]);
    let compare = || attempt("qemu-img", &args!["compare", short, long]).code;
    let outcome = qchainfs(&args!["diff", short, long]);
    assert_eq!((outcome.code, compare()), (Some(0), Some(0)), "{outcome}");
    assert!(outcome.stderr.contains("1048576") && outcome.stderr.contains("zero"), "{outcome}");
    io(&long, &["write -P 6 2M 512"]);
    assert_eq!(said(short.as_os_str(), long.as_os_str()), [(2 * M, 512)]);
    assert_eq!(said(long.as_os_str(), short.as_os_str()), [(2 * M, 512)]);
    assert_eq!(compare(), Some(1));
}

#[test]
fn what_both_views_have_from_one_place_is_not_read() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -c -P 1 0 64k", "write -P 2 1M 1M"]);
    let left = images.overlay("left.qcow2", "base.qcow2", "cluster_size=4k");
    io(&left, &["write -P 3 3M 4k"]);
    let right = images.overlay("right.qcow2", "base.qcow2", "");
    // A compressed cluster that can't be read, for it no longer is one.
    let file = std::fs::read(&base).expect("read");
    let l1 = be_u64(&file, 40);
    let l2 = be_u64(&file, l1) & 0x00ff_ffff_ffff_fe00;
    let entry = be_u64(&file, l2);
    assert_ne!(entry & (1 << 62), 0, "a compressed cluster");
    poke(&base, entry & ((1 << 54) - 1), &[0xff; 64]);
    assert_eq!(said(left.as_os_str(), right.as_os_str()), [(3 * M, 4096)]);
    assert_eq!(said(&view(&left, "[1]"), right.as_os_str()), []);
    // It is not readable at all where the other view has something else.
    io(&right, &["write -P 9 0 64k"]);
    qchainfs(&args!["diff", left, right]).fails(1);
}

fn be_u64(file: &[u8], at: u64) -> u64 {
    let at = index(at);
    u64::from_be_bytes(file[at..at + 8].try_into().expect("eight bytes"))
}

#[test]
fn huge_disks_that_share_almost_everything_are_compared_at_once() {
    let images = Images::new();
    let base = images.create("base.qcow2", 16 << 40, "cluster_size=2M");
    io(&base, &["write -P 1 5T 4M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "cluster_size=2M");
    io(&top, &["write -P 2 15T 512", "write -P 1 10T 512"]);
    let ranges = [(10 << 40, 512), (15 << 40, 512)];
    assert_eq!(said(&view(&top, ""), &view(&top, "[1]")), ranges);
}

#[test]
fn quiet_says_it_by_the_exit_code_alone() {
    let images = Images::new();
    let first = images.create("first.qcow2", M, "");
    let second = images.create("second.qcow2", 2 * M, "");
    for code in [0, 4] {
        let outcome = qchainfs(&args!["diff", "-q", first, second]);
        assert_eq!(outcome.code, Some(code), "{outcome}");
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""), "{outcome}");
        io(&second, &["write -P 1 2000k 1"]);
    }
}

#[test]
fn images_that_are_written_or_missing_are_refused_as_by_any_verb() {
    let images = Images::new();
    let first = images.create("first.qcow2", M, "");
    let second = images.create("second.qcow2", M, "");
    let held = Held::writing(&second);
    qchainfs(&args!["diff", first, second]).fails(11);
    qchainfs(&args!["diff", "-U", first, second]).ok();
    drop(held);
    qchainfs(&args!["diff", first, images.path("missing")]).fails(10);
    qchainfs(&args!["diff", first, view(&first, "@missing")]).fails(10);
    assert_eq!(qchainfs(&args!["diff", first]).code, Some(2));
    assert_eq!(qchainfs(&args!["diff", "-o", "colour=blue", first, second]).code, Some(2));
}
