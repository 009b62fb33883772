//! QEMU's image locks, from both sides.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;

use crate::support::M;
use crate::support::held::Held;
use crate::support::images::{Images, io};
use crate::support::mounted::Mounted;
use crate::support::mute::Mute;
use crate::support::oracle::{bytes_of, holds, reads_as};
use crate::support::tools::{args, attempt, qchainfs, run};
use crate::support::writer::Writer;

/// Panics unless QEMU's tool `program` is kept out by a lock.
#[track_caller]
fn is_locked_out(program: &str, words: &[std::ffi::OsString]) {
    let outcome = attempt(program, words);
    assert_ne!(outcome.code, Some(0), "nobody kept it out: {outcome}");
    assert!(outcome.stderr.contains("lock"), "it failed for another reason: {outcome}");
}

#[test]
fn while_we_write_an_image_qemu_keeps_off() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    is_locked_out("qemu-img", &args!["info", image]);
    is_locked_out("qemu-io", &args!["-r", "-f", "qcow2", "-c", "read 0 512", image]);
    is_locked_out("qemu-io", &args!["-f", "qcow2", "-c", "write 0 512", image]);
    run("qemu-img", &args!["info", "-U", image]);
    mounted.umount();
    run("qemu-img", &args!["info", image]);
}

#[test]
fn while_we_write_an_image_qemu_may_put_an_overlay_on_it() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let over = images.path("over.qcow2");
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", over]);
    mounted.umount();
}

#[test]
fn an_image_that_qemu_writes_is_not_mounted_and_the_process_is_named() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let held = Held::writing(&image);
    for options in [vec![], args!["-r"].to_vec()] {
        let said = Mounted::refused(&options, &image, 11);
        assert!(said.contains("disk.qcow2"), "{said}");
        assert!(said.contains("qemu-io"), "{said}");
        assert!(said.contains(&held.pid().to_string()), "{said}");
    }
    drop(held);
    Mounted::new(&image).umount();
}

#[test]
fn an_image_that_qemu_reads_is_mounted_read_only_and_not_writable() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 4 0 1M"]);
    let held = Held::reading(&image);
    let said = Mounted::refused(&[], &image, 11);
    assert!(said.contains(&held.pid().to_string()), "{said}");
    let mounted = Mounted::read_only(&image);
    reads_as(&mounted.disk(), &image);
    mounted.umount();
}

#[test]
fn while_we_read_an_image_qemu_may_read_it_but_not_write_it() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::read_only(&image);
    run("qemu-io", &args!["-r", "-f", "qcow2", "-c", "read -P 0 0 1M", image]);
    run("qemu-img", &args!["info", image]);
    is_locked_out("qemu-io", &args!["-f", "qcow2", "-c", "write 0 512", image]);
    mounted.umount();
    run("qemu-io", &args!["-f", "qcow2", "-c", "write 0 512", image]);
}

#[test]
fn backing_members_may_be_read_by_qemu_but_not_written() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let middle = images.overlay("middle.qcow2", "base.qcow2", "");
    let top = images.overlay("top.qcow2", "middle.qcow2", "");
    for options in [vec![], args!["-r"].to_vec()] {
        let mounted = Mounted::with(&options, &top);
        for member in [&base, &middle] {
            run("qemu-io", &args!["-r", "-f", "qcow2", "-c", "read -P 0 0 1M", member]);
            is_locked_out("qemu-io", &args!["-f", "qcow2", "-c", "write 0 512", member]);
        }
        mounted.umount();
    }
    io(&base, &["write 0 512"]);
}

#[test]
fn a_base_that_qemu_writes_keeps_its_overlay_from_being_mounted() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let held = Held::writing(&base);
    let said = Mounted::refused(&[], &top, 11);
    assert!(said.contains("base.qcow2"), "{said}");
    drop(held);
}

#[test]
fn two_overlays_of_one_base_are_mounted_at_once() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    io(&base, &["write -P 6 0 1M"]);
    let overlays = ["a", "b"].map(|name| images.overlay(name, "base.qcow2", ""));
    let mut writers = overlays.each_ref().map(|image| Writer::open(image));
    for (writer, byte) in writers.iter_mut().zip([1, 2]) {
        writer.fill(1000, 1000, byte);
    }
    writers.into_iter().for_each(Writer::close);
}

#[test]
fn a_mounted_image_is_not_mounted_for_writing_a_second_time() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let first = Mounted::new(&image);
    for options in [vec![], args!["-r"].to_vec()] {
        let said = Mounted::refused(&options, &image, 11);
        assert!(said.contains("qchainfs"), "{said}");
        assert!(said.contains(&first.daemon().to_string()), "{said}");
    }
    first.umount();
}

#[test]
fn an_image_is_mounted_read_only_any_number_of_times() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounts = [1, 2, 3].map(|_| Mounted::read_only(&image));
    for mounted in mounts {
        holds(&mounted.disk(), &bytes_of(&image));
        mounted.umount();
    }
}

#[test]
fn info_and_map_of_a_locked_image_need_a_forced_share() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let held = Held::writing(&image);
    let said = qchainfs(&args!["info", image]).fails(11);
    assert!(said.contains(&held.pid().to_string()), "{said}");
    qchainfs(&args!["map", image]).fails(11);
    qchainfs(&args!["info", "-U", image]).ok();
    drop(held);
}

#[test]
fn a_process_without_a_lock_is_no_hindrance() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let reader = File::options().read(true).write(true).open(&image).expect("open the image");
    Mounted::new(&image).umount();
    drop(reader);
}

#[test]
fn who_holds_a_lock_is_found_though_somebody_has_a_file_open_whose_file_system_never_answers() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let held = Held::writing(&image);
    let mute = Mute::mount();
    // Nothing is asked of a file system for that.
    let open = File::options().read(true).custom_flags(libc::O_PATH).open(mute.path());
    let open = open.expect("open");
    let said = qchainfs(&args!["info", image]).fails(11);
    assert!(said.contains(&format!("(pid {})", held.pid())), "{said}");
    assert!(mute.is_mounted(), "it waited for that file system, until that was taken away");
    drop((open, mute));
    drop(held);
}
