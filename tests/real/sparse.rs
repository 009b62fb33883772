//! Holes of a view, as the tools that look for them see them.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde_json::Value;

use crate::support::images::{Images, io, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, read_at};
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::writer::Writer;
use crate::support::{M, index};

/// The runs of data in `file`, as start and end, by SEEK_DATA and SEEK_HOLE.
fn data_runs(file: &Path) -> Vec<(i64, i64)> {
    let file = File::open(file).expect("open");
    let mut runs = Vec::new();
    let mut at = 0;
    loop {
        let start = match lseek(&file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return runs,
            Err(errno) => panic!("SEEK_DATA at {at}: {errno}"),
        };
        let end = lseek(&file, start, Whence::SeekHole).expect("SEEK_HOLE");
        assert!(at <= start && start < end, "data from {start} to {end}, asked at {at}");
        runs.push((start, end));
        at = end;
    }
}

/// The same by `qemu-img map`.
fn data_runs_by_qemu(image: &Path) -> Vec<(i64, i64)> {
    let said = run("qemu-img", &args!["map", "-U", "--output", "json", image]);
    let extents: Vec<Value> = serde_json::from_str(&said).expect("qemu-img speaks JSON");
    let mut runs: Vec<(i64, i64)> = Vec::new();
    for extent in extents {
        if extent["data"] == true && extent["zero"] == false {
            let start = extent["start"].as_i64().expect("start");
            let end = start + extent["length"].as_i64().expect("length");
            match runs.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => runs.push((start, end)),
            }
        }
    }
    runs
}

/// An overlay with every kind of extent over a base.
fn patchwork(images: &Images) -> std::path::PathBuf {
    let base = images.create("base.qcow2", 16 * M, "");
    io(&base, &["write -P 1 1M 1M", "write -c -P 2 4M 64k", "write -P 3 15M 1M"]);
    let top = images.overlay_sized("top.qcow2", "base.qcow2", 24 * M + 512, "");
    io(
        &top,
        &["write -z 1M 256k", "write -P 4 8M 100", "write -z -u 15M 128k", "write -P 5 24M 512"],
    );
    top
}

#[test]
fn data_and_holes_are_where_qemu_sees_them() {
    let images = Images::new();
    let top = patchwork(&images);
    let mounted = Mounted::read_only(&top);
    assert_eq!(data_runs(&mounted.disk()), data_runs_by_qemu(&top));
    let base = images.path("base.qcow2");
    assert_eq!(data_runs(&mounted.path("chain/1/disk.raw")), data_runs_by_qemu(&base));
    mounted.umount();
}

#[test]
fn an_empty_disk_is_one_hole_and_a_full_one_has_none() {
    let images = Images::new();
    let empty = images.create("empty.qcow2", 3 * M, "");
    let mounted = Mounted::new(&empty);
    assert_eq!(data_runs(&mounted.disk()), []);
    mounted.umount();
    let full = images.create("full.qcow2", 3 * M, "");
    io(&full, &["write -P 1 0 3M"]);
    let mounted = Mounted::new(&full);
    assert_eq!(data_runs(&mounted.disk()), [(0, (3 * M).cast_signed())]);
    mounted.umount();
}

#[test]
fn no_hole_ever_hides_data() {
    let images = Images::new();
    let mut random = Random::new(131);
    let base = images.create("base.qcow2", 8 * M, "cluster_size=4k");
    paint(&base, &mut random, 8 * M, 30);
    snapshot(&base, "one");
    let top = images.overlay("top.qcow2", "base.qcow2", "cluster_size=512");
    paint(&top, &mut random, 8 * M, 30);
    let mounted = Mounted::new(&top);
    for view in ["disk.raw", "chain/1/disk.raw", "chain/1/snapshots/one/disk.raw"] {
        let view = mounted.path(view);
        let mut bytes = fs::read(&view).expect("read");
        for (start, end) in data_runs(&view) {
            let end = index(end.cast_unsigned()).min(bytes.len());
            bytes[index(start.cast_unsigned())..end].fill(0);
        }
        assert_eq!(bytes.iter().position(|byte| *byte != 0), None, "{}", view.display());
    }
    mounted.umount();
}

#[test]
fn a_seek_behind_the_end_has_no_answer() {
    let images = Images::new();
    let top = patchwork(&images);
    let mounted = Mounted::read_only(&top);
    let size = (24 * M + 512).cast_signed();
    let disk = File::open(mounted.disk()).expect("open");
    for whence in [Whence::SeekData, Whence::SeekHole] {
        assert_eq!(lseek(&disk, size, whence), Err(Errno::ENXIO));
        assert_eq!(lseek(&disk, size + M.cast_signed(), whence), Err(Errno::ENXIO));
    }
    assert_eq!(lseek(&disk, size - 1, Whence::SeekHole), Ok(size));
    assert_eq!(lseek(&disk, size - 1, Whence::SeekData), Ok(size - 1));
    drop(disk);
    mounted.umount();
}

#[test]
fn a_write_makes_data_and_a_punch_makes_a_hole_at_once() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 8 * M, "");
    let mut writer = Writer::open(&image);
    let disk = writer.mounted().disk();
    let blocks = || fs::metadata(&disk).expect("stat").blocks();
    writer.fill(2 * M, M, 7);
    assert_eq!(data_runs(&disk), [((2 * M).cast_signed(), (3 * M).cast_signed())]);
    assert!((2048..3072).contains(&blocks()), "{} blocks", blocks());
    writer.punch(2 * M, M);
    assert_eq!(data_runs(&disk), []);
    assert!(blocks() < 1024, "{} blocks", blocks());
    writer.close();
}

#[test]
fn cp_and_tar_keep_the_holes_of_a_view() {
    let images = Images::new();
    let top = patchwork(&images);
    let expected = bytes_of(&top);
    let mounted = Mounted::read_only(&top);
    let copy = images.path("copy");
    run("cp", &args!["--sparse=auto", mounted.disk(), copy]);
    let archive = images.path("archive.tar");
    run("tar", &args!["-S", "-cf", archive, "-C", mounted.root(), "disk.raw"]);
    run("tar", &args!["-S", "-xf", archive, "-C", images.path("")]);
    for copied in [copy, images.path("disk.raw")] {
        let file = File::open(&copied).expect("open");
        file.sync_all().expect("sync");
        assert!(read_at(&file, 0, expected.len() + 1) == expected, "{}", copied.display());
        let blocks = file.metadata().expect("stat").blocks();
        assert!(blocks * 512 < 4 * M, "{} takes {blocks} blocks", copied.display());
    }
    assert!(fs::metadata(&archive).expect("stat").len() < 4 * M, "the archive has no holes");
    mounted.umount();
}
