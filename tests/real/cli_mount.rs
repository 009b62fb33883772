//! `qchainfs mount` and `umount` as commands: background, signals, options, exit codes.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::M;
use crate::support::foreground::Foreground;
use crate::support::images::{Images, Untouched, check, io, snapshot};
use crate::support::mounted::{Mounted, is_running};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, same};
use crate::support::tools::{args, attempt, qchainfs, run};
use crate::support::watchdog::wait_until;

#[test]
fn a_mount_is_of_the_type_fuse_qchainfs() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let line = mounted.mount_line().expect("a mount");
    assert_eq!(line[2], "fuse.qchainfs");
    let options: Vec<_> = line[3].split(',').collect();
    assert!(options.contains(&"nosuid") && options.contains(&"nodev"), "{options:?}");
    let said = run("findmnt", &args!["-n", "-o", "TARGET", "-t", "fuse.qchainfs"]);
    assert!(said.contains(&mounted.root().display().to_string()), "{said}");
    mounted.umount();
}

#[test]
fn the_options_ro_and_rw_are_those_of_any_mount() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for (option, writable) in [("ro", false), ("rw", true)] {
        let mounted = Mounted::with(&args!["-o", option], &image);
        let line = mounted.mount_line().expect("a mount");
        assert!(line[3].split(',').any(|word| word == option), "{line:?}");
        assert_eq!(File::options().write(true).open(mounted.disk()).is_ok(), writable, "{option}");
        mounted.umount();
    }
}

#[test]
fn options_that_mount_gives_to_any_helper_are_accepted() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let standard = "nofail,_netdev,noauto,auto,user,nouser,users,defaults,x-systemd.automount,\
                    x-systemd.requires=network.target,comment=x,nosuid,suid,nodev,dev,noexec,exec,\
                    relatime,noatime,sync,async";
    Mounted::with(&args!["-o", standard], &image).umount();
    let several = args!["-o", "ro,nofail", "-o", "threads=2", "-o", "discard=unmap"];
    Mounted::with(&several, &image).umount();
}

#[test]
fn an_unknown_option_or_a_wrong_value_is_a_usage_error() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let wrong = ["colour=blue", "threads=none", "threads=0", "discard=maybe", "uid=someone-else"];
    for option in wrong.into_iter().chain(["backing_policy=maybe", "umask=9"]) {
        match Mounted::attempt(&args!["-o", option], &image) {
            Ok(_) => panic!("-o {option} was accepted"),
            Err(outcome) => {
                assert_eq!(outcome.code, Some(2), "{outcome}");
                let name = option.split('=').next().expect("a name");
                assert!(outcome.stderr.contains(name), "{outcome}");
            }
        }
    }
    for words in [&args!["mount"][..], &args!["mount", image], &args!["umount"], &args!["fly"]] {
        assert_eq!(qchainfs(words).code, Some(2), "{words:?}");
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for words in [&args!["--help"][..], &args!["--version"], &args!["mount", "--help"]] {
        let said = qchainfs(words).ok();
        assert!(said.contains("qchainfs"), "{said}");
    }
}

#[test]
fn a_signal_unmounts_and_keeps_what_was_written() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let images = Images::new();
        let image = images.create("disk.qcow2", M, "");
        let front = Foreground::start(&image);
        let disk = File::options().write(true).open(front.disk()).expect("open");
        disk.write_all_at(&[0x3d; 1000], 500_000).expect("write");
        drop(disk);
        front.end_by(signal);
        check(&image);
        same("what was written", &[0x3d; 1000], &bytes_of(&image)[500_000..501_000]);
    }
}

#[test]
fn a_signal_ends_a_mount_in_the_background_too() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let disk = File::options().write(true).open(mounted.disk()).expect("open");
    disk.write_all_at(&[0x3e; 1000], 500_000).expect("write");
    drop(disk);
    kill(mounted.daemon(), Signal::SIGTERM).expect("send a signal");
    wait_until("the daemon ends", || !is_running(mounted.daemon()));
    mounted.is_over();
    check(&image);
    same("what was written", &[0x3e; 1000], &bytes_of(&image)[500_000..501_000]);
}

#[test]
fn umount_of_the_system_leaves_a_clean_image_as_well() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let disk = File::options().write(true).open(mounted.disk()).expect("open");
    disk.write_all_at(&[0x3f; 1000], 500_000).expect("write");
    drop(disk);
    run("umount", &args![mounted.root()]);
    mounted.is_over();
    check(&image);
    same("what was written", &[0x3f; 1000], &bytes_of(&image)[500_000..501_000]);
}

#[test]
fn umount_of_a_mount_in_use_fails_and_says_who_uses_it() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let disk = File::options().read(true).write(true).open(mounted.disk()).expect("open");
    let said = qchainfs(&args!["umount", mounted.root()]).fails(1);
    assert!(said.contains(&std::process::id().to_string()), "{said}");
    disk.write_all_at(&[1; 100], 0).expect("the mount still works");
    drop(disk);
    mounted.umount();
}

#[test]
fn a_daemon_whose_mount_is_gone_leaves_the_next_mount_at_its_place_alone() {
    let images = Images::new();
    let (first, second) =
        (images.create("first.qcow2", M, ""), images.create("second.qcow2", M, ""));
    let mounted = Mounted::read_only(&first);
    let told = fs::read_to_string(mounted.path(".qchainfs/daemon.json")).expect("daemon.json");
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    let pid = Pid::from_raw(told["pid"].as_i64().expect("a pid") as i32);
    let open = File::open(mounted.disk()).expect("keep it in use");
    run("umount", &args!["-l", "-i", mounted.root()]);
    let again = qchainfs(&args!["mount", "-r", second, mounted.root()]);
    again.ok();
    kill(pid, Signal::SIGTERM).expect("send a signal");
    // It goes on for the one who has it open, and does not answer before it has taken note of the signal.
    let mut byte = [0];
    for _ in 0..100 {
        std::os::unix::fs::FileExt::read_exact_at(&open, &mut byte, 0).expect("it still serves");
    }
    drop(open);
    wait_until("the first daemon ends", || !is_running(pid));
    let source = mounted.mount_line().expect("the second mount")[0].clone();
    assert!(source.ends_with("second.qcow2"), "{source}");
    mounted.umount();
}

#[test]
fn umount_of_what_is_no_mount_fails() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    qchainfs(&args!["umount", images.path("")]).fails(1);
    qchainfs(&args!["umount", image]).fails(1);
    qchainfs(&args!["umount", "/proc"]).fails(1);
}

#[test]
fn a_mountpoint_that_can_not_be_used_is_refused_and_the_image_let_go() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let untouched = Untouched::now(&[&image]);
    for wrong in [images.path("missing"), image.clone(), "/dev/null".into()] {
        let outcome = qchainfs(&args!["mount", image, wrong]);
        let code = outcome.code.expect("a code");
        assert!([1, 10].contains(&code), "{outcome}");
        outcome.fails(code);
    }
    untouched.verify();
    io(&image, &["write 0 512"]);
}

#[test]
fn owner_and_mode_follow_the_options() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    snapshot(&image, "one");
    let mounted = Mounted::with(&args!["-o", "uid=1234,gid=2345,umask=027"], &image);
    for path in ["", "disk.raw", "info.json", "snapshots/one", "snapshots/one/disk.raw"] {
        let data = fs::metadata(mounted.path(path)).expect("stat");
        assert_eq!((data.uid(), data.gid()), (1234, 2345), "{path}");
        assert_eq!(data.permissions().mode() & 0o027, 0, "{path}");
    }
    mounted.umount();
}

#[test]
fn other_users_get_in_only_with_allow_other() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for (options, allowed) in [("uid=65534", false), ("uid=65534,allow_other", true)] {
        let mounted = Mounted::with(&args!["-o", options], &image);
        let user = args!["--reuid=65534", "--regid=65534", "--clear-groups", "cat", mounted.disk()];
        let outcome = attempt("setpriv", &user);
        assert_eq!(outcome.code == Some(0), allowed, "-o {options}: {outcome}");
        mounted.umount();
    }
}

#[test]
fn a_snapshot_or_member_by_its_address_is_the_root_of_a_read_only_mount() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    io(&base, &["write -P 1 0 1M"]);
    snapshot(&base, "one");
    io(&base, &["write -P 2 0 512k"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    io(&top, &["write -P 3 0 64k"]);
    let untouched = Untouched::now(&[&base, &top]);
    let one = bytes_of_snapshot(&base, "one");
    let views = [("[1]", bytes_of(&base)), ("[1]@one", one.clone()), ("[base.qcow2]@#1", one)];
    for (suffix, expected) in views {
        let mut address = top.clone().into_os_string();
        address.push(suffix);
        let mounted = Mounted::read_only(&address);
        holds(&mounted.disk(), &expected);
        assert!(File::options().write(true).open(mounted.disk()).is_err(), "{suffix} is writable");
        mounted.umount();
    }
    untouched.verify();
}

#[test]
fn an_image_with_at_signs_and_brackets_in_its_name_is_mounted() {
    let images = Images::new();
    for name in ["a@b.qcow2", "c[1].qcow2", "d@#1.qcow2", "with space.qcow2", "e[0]"] {
        let image = images.create(name, M, "");
        io(&image, &["write -P 5 0 1M"]);
        let mounted = Mounted::new(&image);
        holds(&mounted.disk(), &[5; 1 << 20]);
        mounted.umount();
    }
}
