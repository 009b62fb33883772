//! `qchainfs map` says what `qemu-img map` says.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::images::{Images, io, paint, snapshot};
use crate::support::oracle::bytes_of_snapshot;
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs, run};
use crate::support::{K, M, index};

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The machine's form.
fn json_is_that_of_qemu(image: &Path) {
    File::open(image).expect("open").sync_all().expect("sync");
    json_is_the_same(&args![image], &args![image]);
}

/// The machine's form, of an image that is described to each program by words of its own.
pub(crate) fn json_is_the_same(theirs: &[OsString], ours: &[OsString]) {
    let words = |image: &[OsString]| [&args!["map", "--output=json"], image].concat();
    let expected = parse(&run("qemu-img", &words(theirs)));
    let found = parse(&qchainfs(&words(ours)).ok());
    let extents = |value: &Value| value.as_array().expect("a list").clone();
    for (expected, found) in extents(&expected).iter().zip(&extents(&found)) {
        assert_eq!(expected, found, "the first extent that differs");
    }
    assert_eq!(extents(&expected).len(), extents(&found).len(), "the number of extents");
}

/// Both forms. QEMU has no form for people where an image has compressed clusters.
fn is_that_of_qemu(image: &Path) {
    json_is_that_of_qemu(image);
    for words in [&args!["map", image][..], &args!["map", "--output=human", image]] {
        assert_eq!(run("qemu-img", words), qchainfs(words).ok());
    }
}

#[test]
fn the_map_of_an_empty_and_of_a_full_image_is_that_of_qemu() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 5 * M + 512, "");
    is_that_of_qemu(&image);
    io(&image, &[format!("write -P 1 0 {}", 5 * M + 512)]);
    is_that_of_qemu(&image);
}

#[test]
fn the_map_of_a_chain_is_that_of_qemu() {
    for (compat, cluster) in [("1.1", "64k"), ("0.10", "64k"), ("1.1", "512"), ("1.1", "2M")] {
        let images = Images::new();
        let mut random = Random::new(171);
        let options = format!("compat={compat},cluster_size={cluster}");
        let base = images.create("base.qcow2", 8 * M, &options);
        paint(&base, &mut random, 8 * M, 10);
        let middle = images.overlay("middle.qcow2", "base.qcow2", &options);
        paint(&middle, &mut random, 8 * M, 10);
        let top = images.overlay("top.qcow2", "middle.qcow2", &options);
        paint(&top, &mut random, 8 * M, 10);
        is_that_of_qemu(&top);
        is_that_of_qemu(&base);
    }
}

#[test]
fn the_map_of_zero_clusters_is_that_of_qemu() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 1 0 3M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    io(
        &top,
        &["write -z 0 256k", "write -P 2 1M 512k", "write -z 1M 128k", "write -z -u 1280k 64k"],
    );
    is_that_of_qemu(&top);
}

#[test]
fn the_map_of_preallocated_clusters_is_that_of_qemu() {
    let images = Images::new();
    for mode in ["metadata", "falloc", "full"] {
        let image = images.create("disk.qcow2", 3 * M, &format!("preallocation={mode}"));
        io(&image, &["write -P 9 128k 256k"]);
        is_that_of_qemu(&image);
    }
}

#[test]
fn the_map_of_compressed_clusters_is_that_of_qemu() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 128k 64k"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    io(&top, &["write -c -P 4 64k 64k", "write -c -P 5 1M 64k"]);
    json_is_that_of_qemu(&top);
    json_is_that_of_qemu(&base);
}

#[test]
fn the_map_over_a_raw_member_with_holes_is_that_of_qemu() {
    let images = Images::new();
    let base = images.raw("base.raw", &[1; 100_000]);
    let file = File::options().write(true).open(&base).expect("open");
    file.set_len(4 * M).expect("lengthen");
    file.write_all_at(&[2; 8192], 2 * M).expect("write");
    drop(file);
    let top = images.overlay("top.qcow2", "base.raw", "");
    io(&top, &["write -P 3 64k 64k", "write -P 3 3M 64k"]);
    is_that_of_qemu(&top);
}

#[test]
fn the_map_of_members_of_different_sizes_is_that_of_qemu() {
    let images = Images::new();
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 1 0 4M"]);
    let middle = images.overlay_sized("middle.qcow2", "base.qcow2", 2 * M + 512, "");
    io(&middle, &["write -P 2 1M 64k"]);
    let top = images.overlay_sized("top.qcow2", "middle.qcow2", 6 * M + 1024, "");
    io(&top, &["write -P 3 5M 64k"]);
    for image in [&top, &middle, &base] {
        is_that_of_qemu(image);
    }
}

#[test]
fn the_map_of_random_chains_is_that_of_qemu() {
    for seed in seeds(6) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let mut name = "0.qcow2".to_owned();
        images.create(&name, 4 * M, "");
        for level in 0..=2 + random.below(3) {
            let size = 512 * (1 + random.below(8 * K));
            let cluster = random.pick(&["512", "4k", "64k", "1M"]);
            let compat = random.pick(&["0.10", "1.1"]);
            let next = format!("{}.qcow2", level + 1);
            let options = format!("compat={compat},cluster_size={cluster}");
            let member = images.overlay_sized(&next, &name, size, &options);
            paint(&member, &mut random, size, 12);
            is_that_of_qemu(&member);
            name = next;
        }
    }
}

/// An extent: start, length, host offset if it is data.
type Extent = (u64, u64, Option<u64>);

fn extents(address: &std::ffi::OsStr) -> Vec<Extent> {
    let said = parse(&qchainfs(&args!["map", "--output", "json", address]).ok());
    let number = |value: &Value| value.as_u64();
    let one = |extent: &Value| {
        let offset = if extent["data"] == true { number(&extent["offset"]) } else { None };
        (
            number(&extent["start"]).expect("start"),
            number(&extent["length"]).expect("length"),
            offset,
        )
    };
    said.as_array().expect("a list").iter().map(one).collect()
}

/// Reads a disk as its map says, out of the one file that holds it.
fn read_by_map(extents: &[Extent], file: &Path, size: u64) -> Vec<u8> {
    let file = File::open(file).expect("open");
    let mut disk = vec![0; index(size)];
    for (start, length, offset) in extents {
        if let Some(offset) = offset {
            let place = &mut disk[index(*start)..index(start + length)];
            file.read_exact_at(place, *offset).expect("read an extent");
        }
    }
    disk
}

#[test]
fn the_map_of_a_snapshot_leads_to_its_bytes() {
    let images = Images::new();
    let mut random = Random::new(172);
    let image: PathBuf = images.create("disk.qcow2", 4 * M, "");
    io(&image, &["write -P 1 0 1M", "write -P 2 2M 1M"]);
    snapshot(&image, "one");
    paint(&image, &mut random, 4 * M, 20);
    for suffix in ["@one", "@#1", "[0]@one"] {
        let mut address = image.clone().into_os_string();
        address.push(suffix);
        let extents = extents(&address);
        let end = extents.last().map(|(start, length, _)| start + length);
        assert_eq!(end, Some(4 * M), "{suffix}");
        let disk = read_by_map(&extents, &image, 4 * M);
        assert!(disk == bytes_of_snapshot(&image, "one"), "{suffix}");
    }
}

#[test]
fn the_map_of_a_member_is_that_of_its_file() {
    let images = Images::new();
    let base = images.create("base.qcow2", 2 * M, "");
    io(&base, &["write -P 1 1M 128k"]);
    let top = images.overlay_sized("top.qcow2", "base.qcow2", 4 * M, "");
    io(&top, &["write -P 2 0 64k"]);
    let expected = extents(base.as_os_str());
    for suffix in ["[1]", "[base.qcow2]"] {
        let mut address = top.clone().into_os_string();
        address.push(suffix);
        assert_eq!(extents(&address), expected, "{suffix}");
    }
}
