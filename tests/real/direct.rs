//! Many writers at once, with and without the page cache.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::thread;

use crate::support::images::{Images, Untouched, check, io, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, read_at, same};
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::writer::Writer;
use crate::support::{K, M, index};

const ALIGN: usize = 4096;

/// Opens `disk` past the page cache.
pub fn open_direct(disk: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    options.open(disk).expect("open with O_DIRECT")
}

/// Hands `use_it` a copy of `bytes` at an address that direct input and output accepts.
pub fn aligned<T>(bytes: &[u8], use_it: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = vec![0; bytes.len() + ALIGN];
    let start = buffer.as_ptr().align_offset(ALIGN);
    let place = &mut buffer[start..start + bytes.len()];
    place.copy_from_slice(bytes);
    use_it(place)
}

/// Writes every cell of `cell` bytes that is `worker` modulo `workers`, in random order, and tells
/// what it wrote.
fn write_cells(
    disk: &File,
    size: u64,
    cell: u64,
    worker: u64,
    workers: u64,
) -> Vec<(u64, Vec<u8>)> {
    let mut random = Random::new(1000 + worker);
    let mut cells: Vec<u64> = (worker..size / cell).step_by(index(workers)).collect();
    let mut written = Vec::new();
    while !cells.is_empty() {
        let offset = cells.swap_remove(index(random.below(cells.len() as u64))) * cell;
        let data = random.bytes(index(cell));
        aligned(&data, |place| disk.write_all_at(place, offset)).expect("pwrite");
        written.push((offset, data));
    }
    written
}

/// Lets eight workers write neighbouring cells, so that they meet in the same clusters and tables.
fn write_by_many(image: &Path, open: fn(&Path) -> File, cell: u64) {
    let mut writer = Writer::open(image);
    let size = writer.bytes().len() as u64;
    let disk = open(&writer.mounted().disk());
    let written: Vec<_> = thread::scope(|scope| {
        let disk = &disk;
        let start = |worker| scope.spawn(move || write_cells(disk, size, cell, worker, 8));
        let workers: Vec<_> = (0..8).map(start).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker")).collect()
    });
    drop(disk);
    for (offset, data) in written {
        writer.bytes_mut()[index(offset)..index(offset) + data.len()].copy_from_slice(&data);
    }
    writer.close();
}

#[test]
fn direct_writes_of_whole_sectors_are_what_qemu_reads() {
    let images = Images::new();
    let mut random = Random::new(71);
    let base = images.create("base.qcow2", 8 * M, "");
    paint(&base, &mut random, 8 * M, 10);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let mut writer = Writer::open(&top);
    let disk = open_direct(&writer.mounted().disk());
    for _ in 0..40 {
        let offset = random.below(2 * K) * 4096;
        let len = (4096 * (1 + random.below(64))).min(8 * M - offset);
        let data = random.bytes(index(len));
        aligned(&data, |place| disk.write_all_at(place, offset)).expect("pwrite");
        writer.bytes_mut()[index(offset)..index(offset + len)].copy_from_slice(&data);
        let found = aligned(&vec![0; index(len)], |place| {
            disk.read_exact_at(place, offset).expect("pread");
            place.to_vec()
        });
        same("a direct read after a direct write", &data, &found);
    }
    drop(disk);
    writer.close();
}

#[test]
fn parallel_direct_writers_do_not_disturb_each_other() {
    for options in ["cluster_size=64k", "cluster_size=4k", "compat=0.10,cluster_size=512"] {
        let images = Images::new();
        let image = images.create("disk.qcow2", 8 * M, options);
        write_by_many(&image, open_direct, 4096);
    }
}

#[test]
fn parallel_cached_writers_do_not_disturb_each_other() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    let open = |disk: &Path| File::options().read(true).write(true).open(disk).expect("open");
    write_by_many(&image, open, 512 * 3);
}

#[test]
fn parallel_writers_over_a_base_and_beside_a_snapshot_do_not_disturb_either() {
    let images = Images::new();
    let mut random = Random::new(72);
    let base = images.create("base.qcow2", 8 * M, "");
    io(&base, &["write -P 0x3c 0 8M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "cluster_size=32k");
    paint(&top, &mut random, 8 * M, 10);
    snapshot(&top, "one");
    let before = bytes_of_snapshot(&top, "one");
    let untouched = Untouched::now(&[base]);
    write_by_many(&top, open_direct, 4096);
    same("the snapshot", &before, &bytes_of_snapshot(&top, "one"));
    untouched.verify();
}

/// Writes and punches at random in the upper half, where the workers overlap; writes its own cells
/// in the lower half.
fn write_and_punch(disk: &File, writer: &Writer, worker: u64, half: u64) -> Vec<(u64, Vec<u8>)> {
    let mut random = Random::new(200 + worker);
    for _ in 0..60 {
        let offset = half + random.below(half / 4096) * 4096;
        if worker.is_multiple_of(2) {
            aligned(&[0xcd; 4096], |place| disk.write_all_at(place, offset)).expect("pwrite");
        } else {
            let len = (512 * (1 + random.below(600))).min(2 * half - offset);
            writer.try_punch(offset, len).expect("punch a hole");
        }
    }
    write_cells(disk, half, 4096, worker, 4)
}

#[test]
fn writers_and_hole_punchers_side_by_side_leave_a_clean_image() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 8 * M, "");
    let mut writer = Writer::open(&image);
    let disk = open_direct(&writer.mounted().disk());
    let half = 4 * M;
    let written: Vec<_> = thread::scope(|scope| {
        let (disk, writer) = (&disk, &writer);
        let start = |worker| scope.spawn(move || write_and_punch(disk, writer, worker, half));
        let workers: Vec<_> = (0..4).map(start).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker")).collect()
    });
    drop(disk);
    for (offset, data) in written {
        writer.bytes_mut()[index(offset)..index(offset) + data.len()].copy_from_slice(&data);
    }
    let found = read_at(writer.file(), half, index(half));
    assert!(found.iter().all(|byte| [0, 0xcd].contains(byte)), "the upper half has a third byte");
    writer.bytes_mut()[index(half)..].copy_from_slice(&found);
    writer.close();
}

#[test]
fn qemu_img_converts_into_the_mounted_disk() {
    for (options, threads) in [
        ("compat=1.1", "16"),
        ("compat=1.1", "8"),
        ("compat=1.1,cluster_size=4k", "4"),
        ("compat=1.1,cluster_size=2M", "2"),
        ("compat=0.10", "1"),
        ("compat=0.10", "16"),
    ] {
        let images = Images::new();
        let mut random = Random::new(73);
        let source = images.raw("source.raw", &random.bytes(index(24 * M)));
        let image = images.create("disk.qcow2", 24 * M, options);
        let mounted = Mounted::new(&image);
        let words = args!["convert", "-n", "-W", "-m", threads, "-f", "raw", "-O", "raw"];
        let files = args!["-t", "none", source, mounted.disk()];
        run("qemu-img", &[&words[..], &files[..]].concat());
        mounted.umount();
        check(&image);
        same("the converted disk", &bytes_of(&source), &bytes_of(&image));
    }
}
