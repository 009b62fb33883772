//! Writing beside internal snapshots.

use crate::support::images::{Images, check, io, paint, snapshot};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, same};
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::writer::Writer;
use crate::support::{K, M};

#[test]
fn a_write_beside_a_snapshot_leaves_the_snapshot_alone() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "");
    io(&image, &["write -P 1 0 2M"]);
    snapshot(&image, "one");
    let before = bytes_of_snapshot(&image, "one");
    let mut writer = Writer::open(&image);
    writer.fill(100, 5, 0xee);
    writer.fill(64 * K - 1, 2, 0xdd);
    writer.fill(128 * K, 64 * K, 0xcc);
    writer.fill(M + 7, 300 * K, 0xbb);
    writer.fill(3 * M, 1, 0xaa);
    holds(&writer.mounted().path("snapshots/one/disk.raw"), &before);
    writer.close();
    same("the snapshot", &before, &bytes_of_snapshot(&image, "one"));
}

#[test]
fn writes_between_many_snapshots_leave_each_as_it_was() {
    for (compat, cluster) in [("0.10", "64k"), ("1.1", "512"), ("1.1", "64k"), ("1.1", "1M")] {
        let images = Images::new();
        let mut random = Random::new(41);
        let options = format!("compat={compat},cluster_size={cluster}");
        let image = images.create("disk.qcow2", 4 * M, &options);
        paint(&image, &mut random, 4 * M, 10);
        let mut moments = Vec::new();
        for round in 0..4 {
            let name = format!("moment {round}");
            snapshot(&image, &name);
            moments.push((name.clone(), bytes_of_snapshot(&image, &name)));
            let mut writer = Writer::open(&image);
            writer.scribble(&mut random, 12);
            writer.punch(round * M, M / 2 + 100);
            writer.close();
            for (name, before) in &moments {
                same(name, before, &bytes_of_snapshot(&image, name));
            }
        }
    }
}

#[test]
fn qemu_can_go_back_to_a_snapshot_and_delete_it_after_we_wrote() {
    let images = Images::new();
    let mut random = Random::new(42);
    let image = images.create("disk.qcow2", 4 * M, "cluster_size=4k");
    paint(&image, &mut random, 4 * M, 20);
    snapshot(&image, "one");
    let before = bytes_of(&image);
    let mut writer = Writer::open(&image);
    writer.scribble(&mut random, 30);
    writer.close();
    run("qemu-img", &args!["snapshot", "-a", "one", image]);
    check(&image);
    same("the disk after going back", &before, &bytes_of(&image));
    run("qemu-img", &args!["snapshot", "-d", "one", image]);
    check(&image);
    let mut writer = Writer::open(&image);
    writer.scribble(&mut random, 30);
    writer.close();
}

#[test]
fn after_qemu_deleted_a_snapshot_writes_go_to_the_freed_clusters_without_harm() {
    let images = Images::new();
    let mut random = Random::new(43);
    let image = images.create("disk.qcow2", 4 * M, "");
    for name in ["one", "two", "three"] {
        paint(&image, &mut random, 4 * M, 10);
        snapshot(&image, name);
    }
    run("qemu-img", &args!["snapshot", "-d", "two", image]);
    let kept = ["one", "three"].map(|name| (name, bytes_of_snapshot(&image, name)));
    let mut writer = Writer::open(&image);
    writer.scribble(&mut random, 40);
    writer.close();
    for (name, before) in kept {
        same(name, &before, &bytes_of_snapshot(&image, name));
    }
}

#[test]
fn a_snapshot_over_a_base_still_sees_the_base_after_the_overlay_was_written() {
    let images = Images::new();
    let mut random = Random::new(44);
    let base = images.create("base.qcow2", 4 * M, "");
    io(&base, &["write -P 0x51 0 4M"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    paint(&top, &mut random, 4 * M, 5);
    snapshot(&top, "one");
    let before = bytes_of_snapshot(&top, "one");
    let mut writer = Writer::open(&top);
    writer.scribble(&mut random, 20);
    writer.zero(0, 4 * M);
    writer.close();
    same("the snapshot", &before, &bytes_of_snapshot(&top, "one"));
}
