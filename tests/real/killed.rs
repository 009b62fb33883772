//! A daemon that is killed loses nothing that was synced, and damages nothing.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::sys::signal::{Signal, kill};

use crate::support::images::{Images, Untouched, paint, snapshot};
use crate::support::mounted::{Mounted, is_running};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, attempt};
use crate::support::watchdog::wait_until;
use crate::support::writer::Writer;
use crate::support::{M, index};

/// Ends the daemon with no chance to tidy up.
fn kill_daemon(mounted: &Mounted) {
    let daemon = mounted.daemon();
    kill(daemon, Signal::SIGKILL).expect("kill the daemon");
    wait_until("the daemon dies", || !is_running(daemon));
}

/// Panics if QEMU finds more than leaked clusters.
pub fn check_for_leaks_only(image: &Path) {
    let outcome = attempt("qemu-img", &args!["check", image]);
    assert!([Some(0), Some(3)].contains(&outcome.code), "{outcome}");
}

#[test]
fn a_killed_daemon_loses_nothing_that_was_synced() {
    for seed in seeds(3) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let base = images.create("base.qcow2", 4 * M, "");
        paint(&base, &mut random, 4 * M, 10);
        let cluster = random.pick(&["512", "4k", "64k"]);
        let top = images.overlay("top.qcow2", "base.qcow2", &format!("cluster_size={cluster}"));
        snapshot(&top, "one");
        let before = bytes_of_snapshot(&top, "one");
        let untouched = Untouched::now(&[base]);
        let mut writer = Writer::open(&top);
        writer.scribble(&mut random, 20);
        writer.punch(M, M / 3);
        writer.sync();
        kill_daemon(writer.mounted());
        check_for_leaks_only(&top);
        same("what was synced", writer.bytes(), &bytes_of(&top));
        same("the snapshot", &before, &bytes_of_snapshot(&top, "one"));
        untouched.verify();
    }
}

#[test]
fn a_daemon_killed_between_writes_damages_nothing_that_was_synced_before() {
    for seed in seeds(3) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let image = images.create("disk.qcow2", 8 * M, "cluster_size=4k");
        let mut writer = Writer::open(&image);
        let first = random.bytes(index(4 * M));
        writer.write(0, &first);
        writer.sync();
        let synced = writer.bytes()[..index(4 * M)].to_vec();
        for _ in 0..20 {
            let (offset, len) = random.range(4 * M, M / 4);
            let data = random.bytes(index(len));
            writer.write(4 * M + offset, &data);
        }
        kill_daemon(writer.mounted());
        check_for_leaks_only(&image);
        same("the synced half", &synced, &bytes_of(&image)[..index(4 * M)]);
    }
}

#[test]
fn after_a_kill_the_image_mounts_and_is_written_again() {
    let images = Images::new();
    let mut random = Random::new(81);
    let image = images.create("disk.qcow2", 4 * M, "");
    let mut writer = Writer::open(&image);
    writer.scribble(&mut random, 10);
    writer.sync();
    kill_daemon(writer.mounted());
    drop(writer);
    attempt("qemu-img", &args!["check", "-q", "-r", "leaks", image]).ok();
    let mut writer = Writer::open(&image);
    writer.scribble(&mut random, 10);
    writer.close();
}

#[test]
fn umount_removes_a_mount_whose_daemon_was_killed() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    kill_daemon(&mounted);
    mounted.umount();
}

#[test]
fn a_reader_of_a_mount_whose_daemon_was_killed_gets_an_error_and_does_not_hang() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let disk = File::open(mounted.disk()).expect("open");
    kill_daemon(&mounted);
    assert!(disk.read_at(&mut [0; 512], M / 2).is_err(), "a read from nowhere succeeded");
}
