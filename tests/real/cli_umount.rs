//! `qchainfs umount` of mounts that are busy, and of those whose process dies in that moment.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use crate::support::M;
use crate::support::images::{Images, check};
use crate::support::mounted::{Mounted, is_running};
use crate::support::mute::{Mute, Request};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, start};
use crate::support::watchdog::wait_until;

/// A process that is in `directory` for so many seconds.
fn stay_in(directory: &Path, seconds: &str) -> Child {
    start(Command::new("sleep").arg(seconds).current_dir(directory))
}

#[test]
fn a_mount_that_a_process_is_about_to_leave_is_unmounted() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for _ in 0..3 {
        let mounted = Mounted::new(&image);
        let mut child = stay_in(mounted.root(), "0.1");
        mounted.umount();
        assert!(child.wait().expect("wait for sleep").success());
        check(&image);
    }
}

#[test]
fn a_mount_with_a_file_that_is_about_to_be_closed_is_unmounted() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for _ in 0..3 {
        let mounted = Mounted::new(&image);
        let disk = File::open(mounted.disk()).expect("open");
        let closer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(disk);
        });
        mounted.umount();
        closer.join().expect("close");
        check(&image);
    }
}

#[test]
fn a_mount_that_a_process_stays_in_is_busy_and_goes_on() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let mut child = stay_in(mounted.root(), "60");
    let begin = Instant::now();
    let said = qchainfs(&args!["umount", mounted.root()]).fails(1);
    let took = begin.elapsed();
    assert!(said.contains(&format!("in use by sleep (pid {})", child.id())), "{said}");
    assert!(took < Duration::from_secs(10), "it said so after {took:?}");
    File::open(mounted.disk()).expect("the mount still works");
    child.kill().expect("end sleep");
    child.wait().expect("wait for sleep");
    mounted.umount();
    check(&image);
}

#[test]
fn a_process_that_dies_before_it_answers_leaves_nothing_to_unmount() {
    for last in [Request::Attributes, Request::Open] {
        let mut mute = Mute::mount();
        let place = mute.path().to_path_buf();
        let umount = thread::spawn(move || qchainfs(&args!["umount", place]));
        mute.end_at(last);
        umount.join().expect("umount").ok();
        assert!(!mute.is_mounted(), "{last:?}");
    }
}

#[test]
fn that_a_process_dies_before_all_is_durable_is_told_and_a_second_umount_succeeds() {
    let mut mute = Mute::mount();
    let place = mute.path().to_path_buf();
    let umount = thread::spawn(move || qchainfs(&args!["umount", place]));
    mute.end_at(Request::Sync);
    let said = umount.join().expect("umount").fails(1);
    assert!(said.contains("durable"), "{said}");
    qchainfs(&args!["umount", mute.path()]).ok();
    assert!(!mute.is_mounted());
}

#[test]
fn a_process_killed_at_any_moment_of_umount_leaves_a_mount_that_goes() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mut random = Random::new(17);
    for _ in 0..25 {
        let mounted = Mounted::new(&image);
        let daemon = mounted.daemon();
        let delay = Duration::from_micros(random.below(6000));
        let killer = thread::spawn(move || {
            thread::sleep(delay);
            // It may have ended by itself.
            let _ = kill(daemon, Signal::SIGKILL);
        });
        let outcome = qchainfs(&args!["umount", mounted.root()]);
        killer.join().expect("kill");
        wait_until("the daemon dies", || !is_running(daemon));
        if outcome.code != Some(0) {
            let said = outcome.fails(1);
            assert!(said.contains("durable"), "{said}");
            qchainfs(&args!["umount", mounted.root()]).ok();
        }
        mounted.is_over();
        // It had nothing to write.
        check(&image);
    }
}
