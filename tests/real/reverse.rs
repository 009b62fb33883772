//! QEMU and we take turns with one image: each opens what the other wrote, and writes again.

use std::path::{Path, PathBuf};

use crate::support::images::{Images, Untouched, check, io, paint, snapshot};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, run};
use crate::support::writer::Writer;
use crate::support::{K, M, index};

const ROUNDS: usize = 6;

/// Any image that QEMU makes and we write.
fn any_image(images: &Images, random: &mut Random, size: u64) -> (PathBuf, Vec<PathBuf>) {
    let cluster = random.pick(&["512", "4k", "64k", "2M"]);
    let options = match random.below(4) {
        0 => format!("compat=0.10,cluster_size={cluster}"),
        1 => format!("compat=1.1,lazy_refcounts=on,cluster_size={cluster}"),
        _ => format!("refcount_bits={},cluster_size={cluster}", random.pick(&[8, 16, 32, 64])),
    };
    eprintln!("{size} bytes, {options}");
    match random.below(3) {
        0 => (images.create("disk.qcow2", size, &options), Vec::new()),
        1 => {
            let base = images.raw("base.raw", &random.bytes(index(size / 2)));
            (images.overlay_sized("disk.qcow2", "base.raw", size, &options), vec![base])
        }
        _ => {
            let source = images.raw("source.raw", &random.bytes(64).repeat(index(size) / 64));
            let packed = images.path("disk.qcow2");
            let words = args!["convert", "-c", "-O", "qcow2", "-o", options, source, packed];
            run("qemu-img", &words);
            (packed, Vec::new())
        }
    }
}

fn qemus_turn(image: &Path, random: &mut Random, size: u64) {
    paint(image, random, size, 12);
    let (offset, len) = random.range(size, size / 4);
    let version_2 =
        crate::support::oracle::info(image)["format-specific"]["data"]["compat"] == "0.10";
    if !version_2 {
        io(image, &[format!("discard {offset} {len}")]);
    }
    check(image);
}

fn our_turn(image: &Path, random: &mut Random, size: u64, snapshots: &[(String, Vec<u8>)]) {
    let mut writer = Writer::open(image);
    for (name, expected) in snapshots {
        holds(&writer.mounted().path(&format!("snapshots/{name}/disk.raw")), expected);
    }
    for _ in 0..12 {
        let (offset, len) = random.range(size, size / 6);
        match random.below(6) {
            0 => writer.punch(offset, len),
            1 => writer.zero(offset, len),
            2 => writer.sync(),
            _ => {
                let data = random.bytes(index(len));
                writer.write(offset, &data);
            }
        }
    }
    writer.close();
}

#[test]
fn qemu_and_we_write_an_image_in_turns_and_neither_loses_anything() {
    for seed in seeds(4) {
        let mut random = Random::new(seed);
        let images = Images::new();
        let size = 512 * (2 * K + random.below(4 * K));
        let size = size / M * M + M;
        let (image, below) = any_image(&images, &mut random, size);
        let untouched = Untouched::now(&below);
        let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
        for round in 0..ROUNDS {
            our_turn(&image, &mut random, size, &snapshots);
            let name = format!("s{round}");
            match random.below(4) {
                0 if !snapshots.is_empty() => {
                    let (gone, _) = snapshots.remove(index(random.below(snapshots.len() as u64)));
                    run("qemu-img", &args!["snapshot", "-d", gone, image]);
                }
                1 if !snapshots.is_empty() => {
                    let (name, bytes) = &snapshots[index(random.below(snapshots.len() as u64))];
                    run("qemu-img", &args!["snapshot", "-a", name, image]);
                    same("what was applied", bytes, &bytes_of(&image));
                }
                _ => {
                    snapshot(&image, &name);
                    snapshots.push((name, bytes_of(&image)));
                }
            }
            qemus_turn(&image, &mut random, size);
        }
        our_turn(&image, &mut random, size, &snapshots);
        for (name, bytes) in &snapshots {
            same(name, bytes, &bytes_of_snapshot(&image, name));
        }
        untouched.verify();
    }
}
