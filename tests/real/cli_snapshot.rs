//! `qchainfs snapshot`, in turns with `qemu-img snapshot`.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::held::Held;
use crate::support::images::{Images, Untouched, allocated, check, io, paint, poke, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, info, same, virtual_size};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs, run};
use crate::support::{K, M, index};

/// Runs a verb of ours that must succeed, after which nothing may be wrong with the image.
#[track_caller]
fn ours(verb: &str, image: &Path, name: &str) {
    let said = qchainfs(&args!["snapshot", verb, image, name]).ok();
    assert!(said.starts_with("Snapshot \"") && said.lines().count() == 1, "{said}");
    check(image);
    assert_eq!(qchainfs(&args!["check", "-q", image]).code, Some(0), "our own check");
}

/// The same by QEMU.
#[track_caller]
fn theirs(verb: &str, image: &Path, name: &str) {
    run("qemu-img", &args!["snapshot", verb, name, image]);
    check(image);
    assert_eq!(qchainfs(&args!["check", "-q", image]).code, Some(0), "our own check");
}

/// The options of `qemu-img create` for an image.
const KINDS: [&str; 9] = [
    "cluster_size=512",
    "cluster_size=64k",
    "cluster_size=64k,compat=0.10",
    "cluster_size=2M",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=64k,lazy_refcounts=on",
    "cluster_size=4k,preallocation=metadata",
];

#[test]
fn qemu_and_we_make_apply_and_delete_snapshots_in_turns_and_none_is_lost() {
    for seed in seeds(12) {
        let mut random = Random::new(seed);
        let images = Images::new();
        let kind = random.pick(&KINDS);
        let with_base = !kind.contains("preallocation") && random.below(2) == 0;
        eprintln!("{kind}, base: {with_base}");
        let mut size = 2 * M;
        let image = if with_base {
            let base = images.create("base.qcow2", 3 * M, "");
            paint(&base, &mut random, 3 * M, 10);
            images.overlay_sized("disk.qcow2", "base.qcow2", size, kind)
        } else {
            images.create("disk.qcow2", size, kind)
        };
        let mut snapshots: Vec<(String, u64, Vec<u8>)> = Vec::new();
        // Two bits count three owners, and to go back takes one more for a moment.
        let most = if kind.contains("refcount_bits=2") { 1 } else { 4 };
        for round in 0..14 {
            paint(&image, &mut random, size, 4);
            let by_us = random.below(3) > 0;
            let do_it = |ours_verb: &str, their_verb: &str, name: &str| match by_us {
                true => ours(ours_verb, &image, name),
                false => theirs(their_verb, &image, name),
            };
            let pick = |random: &mut Random| index(random.below(snapshots.len() as u64));
            match random.below(5) {
                0 | 1 if snapshots.len() < most => {
                    let name = format!("moment {round}");
                    let bytes = bytes_of(&image);
                    do_it("create", "-c", &name);
                    snapshots.push((name, size, bytes));
                }
                2 if !snapshots.is_empty() => {
                    let (name, ..) = snapshots.remove(pick(&mut random));
                    do_it("delete", "-d", &name);
                }
                3 if !snapshots.is_empty() => {
                    let (name, its_size, bytes) = snapshots[pick(&mut random)].clone();
                    do_it("apply", "-a", &name);
                    size = its_size;
                    assert_eq!(virtual_size(&image), size, "after going back");
                    same("after going back", &bytes, &bytes_of(&image));
                }
                4 if !kind.contains("0.10") => {
                    size = 512 * (K + random.below(5 * K));
                    let words = args!["resize", "-q", "--shrink", image, size.to_string()];
                    run("qemu-img", &words);
                }
                _ => {}
            }
            // QEMU shows snapshots at the size of today.
            for (name, its_size, bytes) in &snapshots {
                let common = index(size.min(*its_size));
                let found = bytes_of_snapshot(&image, name);
                same(name, &bytes[..common], &found[..common]);
            }
        }
        let mounted = Mounted::read_only(&image);
        for (name, _, bytes) in &snapshots {
            let view = mounted.path(&format!("snapshots/{name}/disk.raw"));
            same(name, bytes, &fs::read(view).expect("read a view"));
        }
        mounted.umount();
        for (name, ..) in snapshots {
            ours("delete", &image, &name);
        }
    }
}

#[test]
fn the_list_is_that_of_qemu() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    assert_eq!(qchainfs(&args!["snapshot", "list", image]).ok(), "");
    let said = qchainfs(&args!["snapshot", "list", "--output=json", image]).ok();
    assert_eq!(serde_json::from_str::<Value>(&said).expect("JSON"), serde_json::json!([]));
    for name in ["one", "with blanks", "a rather long name of a snapshot"] {
        ours("create", &image, name);
    }
    snapshot(&image, "theirs");
    let expected = run("qemu-img", &args!["snapshot", "-l", image]);
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let found = qchainfs(&args!["snapshot", "list", image]).ok();
    assert_eq!(words(&found), words(&expected));
    let said = qchainfs(&args!["snapshot", "list", "--output", "json", image]).ok();
    let found: Value = serde_json::from_str(&said).expect("JSON");
    let expected = &info(&image)["snapshots"];
    let (found, expected) = (found.as_array().expect("a list"), expected.as_array().expect("one"));
    assert_eq!(found.len(), expected.len());
    for (ours, theirs) in found.iter().zip(expected) {
        for (key, value) in theirs.as_object().expect("an object") {
            assert_eq!(ours[key], *value, "{key}");
        }
    }
}

#[test]
fn what_is_only_planned_changes_nothing() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 1 0 1M"]);
    ours("create", &image, "one");
    run("qemu-img", &args!["resize", "-q", image, "2M"]);
    let untouched = Untouched::now(&[&image]);
    let said = qchainfs(&args!["snapshot", "apply", "-n", image, "one"]).ok();
    assert!(said.contains("\"one\" (#1)") && said.contains("1048576"), "{said}");
    assert!(said.contains("2097152"), "{said}");
    let said = qchainfs(&args!["snapshot", "delete", "-n", image, "#1"]).ok();
    assert!(said.contains("\"one\" (#1)") && said.contains("would be deleted"), "{said}");
    untouched.verify();
    for verb in ["apply", "delete"] {
        assert_eq!(qchainfs(&args!["snapshot", verb, "-q", image, "one"]).ok(), "");
    }
    assert_eq!(qchainfs(&args!["snapshot", "create", "-q", image, "one"]).ok(), "");
}

#[test]
fn a_name_that_several_snapshots_have_is_refused_with_their_ids() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for byte in 1..=2 {
        io(&image, &[format!("write -P {byte} 0 1M")]);
        // QEMU makes no second one of the name either, but other programs do.
        snapshot(&image, &format!("on{byte}"));
    }
    let mut table = [0; 8];
    let bytes = fs::read(&image).expect("read");
    table.copy_from_slice(&bytes[64..72]);
    let table = u64::from_be_bytes(table);
    for number in 0..2 {
        poke(&image, table + number * 72 + 65, b"one");
    }
    let untouched = Untouched::now(&[&image]);
    for verb in ["apply", "delete"] {
        for options in [&[][..], &["-n"]] {
            let mut words = args!["snapshot", verb].to_vec();
            words.extend(options.iter().map(Into::into));
            words.extend(args![image, "one"]);
            let said = qchainfs(&words).fails(2);
            assert!(said.contains("#1, #2") && said.contains("snapshot list"), "{said}");
        }
    }
    untouched.verify();
    ours("apply", &image, "#1");
    same("the first of them", &vec![1; index(M)], &bytes_of(&image));
    ours("delete", &image, "#2");
    ours("apply", &image, "one");
}

#[test]
fn a_change_never_falls_on_a_snapshot_whose_id_is_only_like_the_name() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for name in ["one", "two", "#1"] {
        ours("create", &image, name);
    }
    let untouched = Untouched::now(&[&image]);
    for verb in ["apply", "delete"] {
        let said = qchainfs(&args!["snapshot", verb, image, "#1"]).fails(2);
        assert!(said.contains("#1, #3"), "{said}");
        // A script that deletes what is gone already.
        qchainfs(&args!["snapshot", verb, image, "2"]).fails(10);
    }
    untouched.verify();
    ours("delete", &image, "#3");
    ours("apply", &image, "#1");
    ours("delete", &image, "#2");
}

#[test]
fn what_is_wrong_is_said_by_name() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 1 0 1M"]);
    ours("create", &image, "one");
    let untouched = Untouched::now(&[&image]);
    for verb in ["apply", "delete"] {
        let said = qchainfs(&args!["snapshot", verb, image, "two"]).fails(10);
        assert!(said.contains("\"two\"") && said.contains("it has: one"), "{said}");
        qchainfs(&args!["snapshot", verb, image, "#7"]).fails(10);
        assert_eq!(qchainfs(&args!["snapshot", verb, image]).code, Some(2));
    }
    for name in ["one", "1", ""] {
        qchainfs(&args!["snapshot", "create", image, name]).fails(2);
    }
    qchainfs(&args!["snapshot", "create", images.path("none.qcow2"), "x"]).fails(10);
    let raw = images.raw("disk.raw", &[0; 4096]);
    qchainfs(&args!["snapshot", "list", raw]).fails(1);
    untouched.verify();

    let options = format!("data_file={}", images.path("data").display());
    let external = images.create("external.qcow2", M, &options);
    for verb in ["create", "apply", "delete"] {
        let said = qchainfs(&args!["snapshot", verb, external, "x"]);
        assert!([Some(14), Some(10)].contains(&said.code), "{said}");
    }
    let said = qchainfs(&args!["snapshot", "create", external, "x"]).fails(14);
    assert!(said.contains("external data file"), "{said}");

    let narrow = images.create("narrow.qcow2", M, "refcount_bits=1");
    io(&narrow, &["write -P 1 0 64k"]);
    let untouched = Untouched::now(&[&narrow]);
    let said = qchainfs(&args!["snapshot", "create", narrow, "x"]).fails(14);
    assert!(said.contains("1-bit refcounts"), "{said}");
    check(&narrow);
    untouched.verify();
}

#[test]
fn an_image_in_use_is_left_alone_and_the_list_can_be_had_by_force() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 1 0 1M"]);
    ours("create", &image, "one");
    let held = Held::writing(&image);
    for verb in ["create", "apply", "delete"] {
        let said = qchainfs(&args!["snapshot", verb, image, "one"]).fails(11);
        assert!(said.contains(&held.pid().to_string()), "{said}");
    }
    qchainfs(&args!["snapshot", "list", image]).fails(11);
    let said = qchainfs(&args!["snapshot", "list", "-U", image]).ok();
    assert!(said.contains("one"), "{said}");
    drop(held);
    let mounted = Mounted::read_only(&image);
    let said = qchainfs(&args!["snapshot", "delete", image, "one"]).fails(11);
    assert!(said.contains("qchainfs"), "{said}");
    qchainfs(&args!["snapshot", "delete", mounted.root(), "one"]).fails(1);
    mounted.umount();
    ours("delete", &image, "one");
}

#[test]
fn neither_a_missing_backing_file_nor_a_missing_key_is_in_the_way() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    io(&top, &["write -P 1 0 64k"]);
    fs::rename(&base, images.path("elsewhere.qcow2")).expect("rename");
    for verb in ["create", "apply", "delete"] {
        qchainfs(&args!["snapshot", verb, top, "one"]).ok();
    }
    fs::rename(images.path("elsewhere.qcow2"), &base).expect("rename");
    check(&top);

    let (locked, secret) = (images.path("locked.qcow2"), "secret,id=key,data=secret");
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let mut words = args!["create", "-q", "-f", "qcow2", "--object", secret].to_vec();
    words.extend(args!["-o", options, locked, "1M"]);
    run("qemu-img", &words);
    let file = locked.display();
    let opened = format!("driver=qcow2,encrypt.key-secret=key,file.filename={file}");
    let write = |byte: u32| {
        let command = format!("write -P {byte} 0 300k");
        run("qemu-io", &args!["--object", secret, "--image-opts", opened, "-c", command]);
    };
    let read = |byte: u32| {
        let command = format!("read -P {byte} 0 300k");
        let words = args!["--object", secret, "--image-opts", opened, "-c", command];
        let said = run("qemu-io", &words);
        assert!(!said.contains("Pattern verification failed"), "{said}");
    };
    write(1);
    qchainfs(&args!["snapshot", "create", locked, "one"]).ok();
    write(2);
    qchainfs(&args!["snapshot", "create", locked, "two"]).ok();
    write(3);
    for (name, byte) in [("one", 1), ("two", 2)] {
        qchainfs(&args!["snapshot", "apply", locked, name]).ok();
        read(byte);
    }
    for name in ["one", "two"] {
        qchainfs(&args!["snapshot", "delete", locked, name]).ok();
    }
    read(2);
    let words = args!["check", "--object", secret, "--image-opts", opened];
    assert!(run("qemu-img", &words).contains("No errors were found"));
}

#[test]
fn what_a_snapshot_alone_had_is_given_back_to_the_host() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 64 * M, "");
    io(&image, &["write -P 5 0 64M"]);
    ours("create", &image, "one");
    io(&image, &["write -P 6 0 64M"]);
    let before = allocated(&image);
    ours("delete", &image, "one");
    let after = allocated(&image);
    assert!(before > 128 * M && after < 66 * M, "{before} bytes became {after}");
    same("the disk", &vec![6; index(64 * M)], &bytes_of(&image));
}

#[test]
fn a_machines_state_is_kept_when_its_snapshot_is_applied_and_freed_with_it() {
    let images = Images::new();
    let mut random = Random::new(215);
    // One L2 table maps 512 MiB: the state begins there, behind the disk.
    let image = images.create("disk.qcow2", 2 * M, "");
    paint(&image, &mut random, 2 * M, 8);
    let disk = bytes_of(&image);
    let resize = |size: &str| {
        run("qemu-img", &args!["resize", "-q", "--shrink", "-f", "qcow2", image, size]);
    };
    resize("514M");
    io(&image, &["write -P 0xee 512M 300k"]);
    snapshot(&image, "running");
    resize("2M");
    let bytes = fs::read(&image).expect("read");
    let mut table = [0; 8];
    table.copy_from_slice(&bytes[64..72]);
    let at = u64::from_be_bytes(table);
    poke(&image, at + 40, &(300 * K).to_be_bytes());
    poke(&image, at + 48, &(2 * M).to_be_bytes());
    let holds_state = || {
        let bytes = fs::read(&image).expect("read");
        bytes.iter().filter(|&&byte| byte == 0xee).count() >= index(300 * K)
    };
    io(&image, &["write -P 9 0 1M"]);
    ours("apply", &image, "running");
    same("the disk", &disk, &bytes_of(&image));
    assert!(holds_state(), "the state is gone");
    // What QEMU leaves in the active L1 table behind the disk is counted like all else.
    theirs("-a", &image, "running");
    io(&image, &["write -P 8 0 1M"]);
    ours("create", &image, "another");
    ours("apply", &image, "running");
    ours("delete", &image, "another");
    assert!(holds_state(), "the state is gone");
    ours("delete", &image, "running");
    assert!(!holds_state(), "the state is left");
    same("the disk", &disk, &bytes_of(&image));
}
