//! `qchainfs info` says what `qemu-img info` says.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::M;
use crate::support::images::{Images, io, paint, snapshot};
use crate::support::random::Random;
use crate::support::tools::{QCHAINFS, args, qchainfs, run, start};

/// Removes what QEMU does not say.
fn without_ours(mut value: Value) -> Value {
    match &mut value {
        Value::Object(object) => {
            object.remove("qchainfs");
            for inner in object.values_mut() {
                *inner = without_ours(inner.take());
            }
        }
        Value::Array(list) => {
            for inner in list {
                *inner = without_ours(inner.take());
            }
        }
        _ => {}
    }
    value
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Panics with the first key whose value differs.
fn same_value(at: &str, expected: &Value, found: &Value) {
    match (expected, found) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys()) {
                let null = &Value::Null;
                let (a, b) = (a.get(key).unwrap_or(null), b.get(key).unwrap_or(null));
                same_value(&format!("{at}.{key}"), a, b);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (number, (a, b)) in a.iter().zip(b).enumerate() {
                same_value(&format!("{at}[{number}]"), a, b);
            }
        }
        _ => assert_eq!(expected, found, "{at}"),
    }
}

/// Both programs are given the same arguments after `info`.
pub(crate) fn says_what_qemu_says(words: &[OsString]) {
    let words = [&args!["info", "--output=json"][..], words].concat();
    let expected = parse(&run("qemu-img", &words));
    let found = without_ours(parse(&qchainfs(&words).ok()));
    same_value(&format!("{words:?}"), &expected, &found);
}

/// The allocation that `info` tells does not change any more.
pub(crate) fn settle(image: &Path) {
    File::open(image).expect("open").sync_all().expect("sync");
}

fn about(words: &[OsString]) -> Value {
    parse(&qchainfs(&[&args!["info", "--output", "json"][..], words].concat()).ok())
}

#[test]
fn info_on_images_of_every_kind_is_that_of_qemu() {
    let images = Images::new();
    let kinds = [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "preallocation=metadata",
    ];
    for kind in kinds {
        let image = images.create("disk.qcow2", 5 * M + 512, kind);
        io(&image, &["write -P 1 1M 100k"]);
        settle(&image);
        says_what_qemu_says(&args![image]);
    }
}

#[test]
fn info_on_snapshots_is_that_of_qemu() {
    let images = Images::new();
    for compat in ["0.10", "1.1"] {
        let image = images.create("disk.qcow2", M, &format!("compat={compat}"));
        for name in ["one", "a second", "ein drittes: ü", "one"] {
            snapshot(&image, name);
        }
        settle(&image);
        says_what_qemu_says(&args![image]);
    }
}

#[test]
fn info_on_a_chain_is_that_of_qemu() {
    let images = Images::new();
    let mut random = Random::new(161);
    let base = images.raw("base.raw", &random.bytes(300_000));
    let middle = images.overlay("middle.qcow2", "base.raw", "compat=0.10");
    paint(&middle, &mut random, 300_000, 5);
    let top = images.path("top.qcow2");
    let words = args!["create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, "4M"];
    run("qemu-img", &words);
    for image in [&base, &middle, &top] {
        settle(image);
    }
    says_what_qemu_says(&args![top]);
    says_what_qemu_says(&args!["--backing-chain", top]);
    says_what_qemu_says(&args!["-U", "--backing-chain", top]);
}

#[test]
fn info_on_a_marked_image_is_that_of_qemu() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    crate::support::images::poke(&image, 72, &2_u64.to_be_bytes());
    settle(&image);
    says_what_qemu_says(&args![image]);
}

#[test]
fn info_on_images_that_can_not_be_mounted_still_tells_what_they_are_or_names_the_feature() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "extended_l2=on");
    let outcome = qchainfs(&args!["info", image]);
    if outcome.code != Some(0) {
        let said = outcome.fails(14);
        assert!(said.to_lowercase().contains("extended l2"), "{said}");
    }
}

#[test]
fn info_takes_the_address_of_a_member() {
    let images = Images::new();
    images.raw("base.raw", &[1; 65536]);
    images.overlay_sized("middle.qcow2", "base.raw", 2 * M, "");
    let top = images.overlay_sized("top.qcow2", "middle.qcow2", 3 * M, "");
    let sizes = [
        ("", 3 * M),
        ("[0]", 3 * M),
        ("[1]", 2 * M),
        ("[2]", 65536),
        ("[middle.qcow2]", 2 * M),
        ("[base.raw]", 65536),
    ];
    for (suffix, size) in sizes {
        let mut address = top.clone().into_os_string();
        address.push(suffix);
        assert_eq!(about(&args![address])["virtual-size"], size, "{suffix}");
    }
}

#[test]
fn info_takes_the_address_of_a_snapshot() {
    let images = Images::new();
    let base = images.create("base.qcow2", 2 * M, "");
    snapshot(&base, "small");
    run("qemu-img", &args!["resize", "-q", base, "3M"]);
    snapshot(&base, "large");
    let top = images.overlay_sized("top.qcow2", "base.qcow2", 5 * M, "");
    let sizes = [
        ("[1]@small", 2 * M),
        ("[1]@large", 3 * M),
        ("[1]@#1", 2 * M),
        ("[1]@#2", 3 * M),
        ("[base.qcow2]@small", 2 * M),
    ];
    for (suffix, size) in sizes {
        let mut address = top.clone().into_os_string();
        address.push(suffix);
        assert_eq!(about(&args![address])["virtual-size"], size, "{suffix}");
    }
}

#[test]
fn info_for_people_names_file_format_and_size() {
    let images = Images::new();
    images.create("base.qcow2", 3 * M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    snapshot(&top, "before the update");
    for words in [&args!["info", top][..], &args!["info", "--output", "human", top]] {
        let said = qchainfs(words).ok();
        for word in ["top.qcow2", "qcow2", "3 MiB", "base.qcow2", "before the update"] {
            assert!(said.contains(word), "\"{word}\" is not in: {said}");
        }
    }
}

#[test]
fn sizes_are_rounded_as_qemu_rounds_them() {
    let images = Images::new();
    let sizes = [
        1_000_448,
        1_022_976,
        1_023_488,
        1_024_000,
        1_048_064,
        1_048_570_368,
        1_179_648,
        10_747_904,
        105_381_888,
        106_430_464,
    ];
    for size in sizes {
        let image = images.create("disk.qcow2", size, "");
        let shown =
            |said: String| said.lines().find(|line| line.contains("virtual")).map(str::to_owned);
        let theirs = shown(run("qemu-img", &args!["info", image]));
        assert_eq!(shown(qchainfs(&args!["info", image]).ok()), theirs);
    }
}

#[test]
fn a_result_that_can_not_be_printed_is_an_error_but_not_to_a_reader_who_has_seen_enough() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let full = || File::options().write(true).open("/dev/full").expect("open /dev/full");
    for verb in [&["info"][..], &["map"], &["map", "--output", "json"]] {
        let prepared = || {
            let mut command = Command::new(QCHAINFS);
            command.args(verb).arg(&image).stderr(Stdio::piped());
            command
        };
        let ended = start(prepared().stdout(full())).wait_with_output().expect("wait");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{verb:?}: {said}");
        assert!(said.starts_with("qchainfs: could not print"), "{verb:?}: {said}");
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let ended = start(prepared().stdout(writer)).wait_with_output().expect("wait");
        assert_eq!((ended.status.code(), ended.stderr), (Some(0), Vec::new()), "{verb:?}");
        let mut missing = Command::new(QCHAINFS);
        missing.args(verb).arg(images.path("missing.qcow2"));
        let status = start(missing.stdout(full()).stderr(full())).wait().expect("wait");
        assert_eq!(status.code(), Some(10), "{verb:?}");
    }
}
