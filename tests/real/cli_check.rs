//! `qchainfs check` says what `qemu-img check` says, finds more, and repairs without changing a byte.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::held::Held;
use crate::support::images::{Images, Untouched, check, io, paint, poke, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{Outcome, QCHAINFS, args, attempt, qchainfs, run};
use crate::support::{K, M};

/// `check` of both programs, with the same arguments.
fn both(words: &[OsString]) -> (Outcome, Outcome) {
    let words = [&args!["check"][..], words].concat();
    (attempt("qemu-img", &words), qchainfs(&words))
}

fn parse(outcome: &Outcome) -> Value {
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome}"))
}

/// Panics unless both programs say the same of `image`, ours with `extra` corruptions more.
#[track_caller]
fn says_what_qemu_says_and(image: &Path, extra: u64) -> Value {
    let (theirs, ours) = both(&args!["--output=json", image]);
    let (mut expected, mut found) = (parse(&theirs), parse(&ours));
    let own = found.as_object_mut().and_then(|object| object.remove("qchainfs"));
    if extra == 0 {
        assert_eq!(ours.code, theirs.code, "{theirs}\n{ours}");
    } else {
        let corruptions = expected["corruptions"].as_u64().unwrap_or(0);
        expected["corruptions"] = (corruptions + extra).into();
        assert_eq!(ours.code, Some(2), "{ours}");
    }
    assert_eq!(found, expected, "{ours}");
    own.unwrap_or_default()
}

/// Panics unless both programs say the same of `image`, which QEMU is told by words of its own.
#[track_caller]
pub(crate) fn says_the_same(theirs: &[OsString], image: &Path) {
    for output in ["--output=json", "--output=human"] {
        let theirs = attempt("qemu-img", &[&args!["check", output][..], theirs].concat());
        let ours = qchainfs(&args!["check", output, image]);
        assert_eq!(ours.code, theirs.code, "{theirs}\n{ours}");
        if output == "--output=human" {
            assert_eq!(ours.stdout, theirs.stdout, "{ours}");
            continue;
        }
        let [expected, found] = [&theirs, &ours].map(|outcome| {
            let mut value = parse(outcome);
            let object = value.as_object_mut().expect("an object");
            object.remove("filename");
            object.remove("qchainfs");
            value
        });
        assert_eq!(found, expected, "{ours}");
    }
}

/// Panics unless both programs say the same of `image`, as text and as JSON.
#[track_caller]
fn says_what_qemu_says(image: &Path) {
    says_what_qemu_says_and(image, 0);
    let (theirs, ours) = both(&args![image]);
    assert_eq!((&ours.stdout, ours.code), (&theirs.stdout, theirs.code), "{ours}");
}

fn number(image: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    let file = File::open(image).expect("open an image");
    file.read_exact_at(&mut bytes, at).expect("read an image");
    u64::from_be_bytes(bytes)
}

const COPIED: u64 = 1 << 63;

/// Where the tables of a small image are.
struct Parts {
    l1: u64,
    l2: u64,
    reftable: u64,
    block: u64,
    /// log2 of the bits of a refcount.
    order: u32,
    cluster: u64,
}

impl Parts {
    fn of(image: &Path) -> Self {
        let (l1, reftable) = (number(image, 40), number(image, 48));
        let version = number(image, 4) >> 32;
        Self {
            l1,
            l2: number(image, l1) & !COPIED,
            reftable,
            block: number(image, reftable),
            order: if version == 2 { 4 } else { (number(image, 96) >> 32) as u32 },
            cluster: 1 << (number(image, 20) >> 32),
        }
    }

    /// Sets the refcount of the cluster at `host`; widths of a byte and more.
    fn set_refcount(&self, image: &Path, host: u64, count: u8) {
        let len = 1 << (self.order - 3);
        let mut bytes = vec![0; len];
        bytes[len - 1] = count;
        poke(image, self.block + host / self.cluster * len as u64, &bytes);
    }
}

/// All that QEMU reads from an image and its snapshots.
fn views(image: &Path, snapshots: &[&str]) -> Vec<Vec<u8>> {
    let mut views = vec![bytes_of(image)];
    views.extend(snapshots.iter().map(|name| bytes_of_snapshot(image, name)));
    views
}

/// Repairs `image`, after which it is clean for both programs and reads as before.
#[track_caller]
fn repairs(image: &Path, snapshots: &[&str], extent: &str) -> Outcome {
    let before = views(image, snapshots);
    let outcome = qchainfs(&args!["check", "-r", extent, "--output=json", image]);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    check(image);
    says_what_qemu_says(image);
    for (before, after) in before.iter().zip(views(image, snapshots)) {
        same("a view after the repair", before, &after);
    }
    outcome
}

/// A disk with two runs of data.
fn written(images: &Images, options: &str) -> (PathBuf, Parts) {
    let image = images.create("disk.qcow2", 4 * M, options);
    io(&image, &["write -P 1 0 256k", "write -P 2 1M 64k"]);
    let parts = Parts::of(&image);
    (image, parts)
}

#[test]
fn check_on_sound_images_of_every_kind_is_that_of_qemu() {
    let images = Images::new();
    let mut random = Random::new(301);
    let kinds = [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=4",
        "refcount_bits=8",
        "refcount_bits=32",
        "refcount_bits=64",
        "preallocation=metadata",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "lazy_refcounts=on",
    ];
    for kind in kinds {
        let image = images.create("disk.qcow2", 3 * M + 512, kind);
        says_what_qemu_says(&image);
        paint(&image, &mut random, 3 * M, 12);
        says_what_qemu_says(&image);
        if kind != "refcount_bits=1" {
            for name in ["one", "two"] {
                snapshot(&image, name);
                paint(&image, &mut random, 3 * M, 12);
            }
            says_what_qemu_says(&image);
        }
    }
    let empty = images.create("empty.qcow2", 0, "");
    says_what_qemu_says(&empty);
}

#[test]
fn check_on_compressed_clusters_bitmaps_and_data_files_is_that_of_qemu() {
    let images = Images::new();
    let mut random = Random::new(302);
    let source = images.create("source.qcow2", 3 * M, "");
    let noise = images.raw("noise.pattern", &random.bytes(5000));
    let noisy = format!("write -s {} 0 2M", noise.display());
    io(&source, &[noisy.as_str(), "write -P 3 2500k 100k"]);
    for method in ["zlib", "zstd"] {
        let image = images.path("compressed.qcow2");
        let options = format!("compression_type={method}");
        run("qemu-img", &args!["convert", "-c", "-O", "qcow2", "-o", options, source, image]);
        says_what_qemu_says(&image);
        snapshot(&image, "one");
        io(&image, &["write -P 5 100k 300k"]);
        says_what_qemu_says(&image);
    }
    let image = images.create("bitmaps.qcow2", 4 * M, "");
    for name in ["a", "b"] {
        run("qemu-img", &args!["bitmap", "--add", image, name]);
    }
    io(&image, &["write -P 5 100k 300k"]);
    says_what_qemu_says(&image);
    // Nobody maintains them any more: their clusters are leaks.
    poke(&image, 88, &[0; 8]);
    says_what_qemu_says(&image);
    repairs(&image, &[], "leaks");

    for raw in ["on", "off"] {
        let image = images.path(&format!("{raw}.qcow2"));
        let data = images.path(&format!("{raw}.data"));
        let options = format!("data_file={},data_file_raw={raw}", data.display());
        run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-o", options, image, "4M"]);
        io(&image, &["write -P 5 100k 300k", "write -P 6 1M 5k"]);
        says_what_qemu_says(&image);
        io(&image, &["write -P 7 0 64k", "write -z 0 128k"]);
        says_what_qemu_says(&image);
        let parts = Parts::of(&image);
        let entry = number(&image, parts.l2 + 16);
        poke(&image, parts.l2 + 16, &(entry & !COPIED).to_be_bytes());
        says_what_qemu_says(&image);
        repairs(&image, &[], "all");
    }
}

#[test]
fn check_on_an_encrypted_image_needs_no_key() {
    let images = Images::new();
    let image = images.path("luks.qcow2");
    let object = "secret,id=s,data=x";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    run(
        "qemu-img",
        &args!["create", "-q", "--object", object, "-f", "qcow2", "-o", options, image, "4M"],
    );
    let opened = format!("driver=qcow2,file.filename={},encrypt.key-secret=s", image.display());
    let opened = args!["--image-opts", opened];
    let write = args!["--object", object, "-c", "write -P 1 0 500k"];
    run("qemu-io", &[&write[..], &opened].concat());
    for damaged in [false, true] {
        if damaged {
            let parts = Parts::of(&image);
            poke(&image, parts.l2, &[0; 8]);
        }
        says_the_same(&[&args!["--object", object][..], &opened].concat(), &image);
    }
    qchainfs(&args!["check", "-r", "leaks", image]).ok();
}

/// Pokes an image.
type Damage = fn(&Path, &Parts);

#[test]
fn wrong_refcounts_and_flags_are_found_as_qemu_finds_them_and_repaired() {
    let images = Images::new();
    let kinds = ["", "compat=0.10", "refcount_bits=8", "refcount_bits=64", "extended_l2=on"];
    for options in kinds {
        let damages: [(&str, Damage); 10] = [
            ("leaks", |image, parts| poke(image, parts.l2, &[0; 8])),
            ("leaks", |image, parts| {
                let data = number(image, parts.l2) & !COPIED;
                parts.set_refcount(image, data, 3);
            }),
            ("leaks", |image, parts| parts.set_refcount(image, parts.l2, 2)),
            ("leaks", |image, parts| parts.set_refcount(image, parts.block, 2)),
            ("all", |image, parts| {
                let data = number(image, parts.l2) & !COPIED;
                parts.set_refcount(image, data, 0);
            }),
            ("all", |image, parts| parts.set_refcount(image, parts.block, 0)),
            ("all", |image, parts| {
                let entry = number(image, parts.l2) & !COPIED;
                poke(image, parts.l2, &entry.to_be_bytes());
            }),
            ("all", |image, parts| poke(image, parts.l1, &parts.l2.to_be_bytes())),
            ("all", |image, parts| poke(image, parts.reftable, &[0; 8])),
            ("all", |image, parts| {
                poke(image, parts.reftable, &(1_u64 << 40).to_be_bytes());
            }),
        ];
        for (number, (extent, damage)) in damages.into_iter().enumerate() {
            eprintln!("{options} damage {number}");
            let (image, parts) = written(&images, options);
            damage(&image, &parts);
            if number == 0 && options == "extended_l2=on" {
                // Its subclusters would lack their cluster.
                continue;
            }
            says_what_qemu_says(&image);
            let theirs = images.path("theirs.qcow2");
            fs::copy(&image, &theirs).expect("copy an image");
            repairs(&image, &[], extent);
            attempt("qemu-img", &args!["check", "-q", "-r", "all", theirs]).ok();
            says_what_qemu_says(&theirs);
            io(&image, &["write -P 9 300k 1M"]);
            check(&image);
        }
    }
}

#[test]
fn what_qemu_can_not_open_or_repair_is_repaired_where_only_refcounts_are_lost() {
    let images = Images::new();
    for offset in [0x10200_u64, 1 << 62, 0x50000] {
        let (image, parts) = written(&images, "");
        let before = bytes_of(&image);
        poke(&image, 48, &offset.to_be_bytes());
        assert_eq!(qchainfs(&args!["check", image]).code, Some(2));
        assert_eq!(qchainfs(&args!["check", "-r", "leaks", image]).code, Some(2));
        qchainfs(&args!["check", "-r", "all", image]).ok();
        check(&image);
        same("the disk", &before, &bytes_of(&image));
        assert_ne!(number(&image, 48), parts.reftable, "the new table is in a new place");
    }
    let (image, parts) = written(&images, "");
    let before = bytes_of(&image);
    poke(&image, parts.reftable, &(parts.block + 512).to_be_bytes());
    assert_eq!(attempt("qemu-img", &args!["check", "-q", "-r", "all", image]).code, Some(1));
    qchainfs(&args!["check", "-r", "all", image]).ok();
    check(&image);
    same("the disk", &before, &bytes_of(&image));
}

#[test]
fn two_owners_of_a_cluster_are_found_and_left() {
    let images = Images::new();
    let (image, parts) = written(&images, "");
    let second = number(&image, parts.l2 + 8);
    poke(&image, parts.l2, &second.to_be_bytes());
    let own = says_what_qemu_says_and(&image, 1);
    assert!(own.to_string().contains("used twice as guest data"), "{own}");
    let before = bytes_of(&image);
    let outcome = qchainfs(&args!["check", "-r", "all", image]);
    assert_eq!(outcome.code, Some(2), "{outcome}");
    // For QEMU all is well by now: the refcount is two.
    check(&image);
    says_what_qemu_says_and(&image, 1);
    same("the disk", &before, &bytes_of(&image));

    let (image, parts) = written(&images, "");
    poke(&image, parts.l2, &(parts.l1 | COPIED).to_be_bytes());
    let own = says_what_qemu_says_and(&image, 1).to_string();
    assert!(own.contains("as the active L1 table and as guest data"), "{own}");
}

#[test]
fn pointers_to_nowhere_and_impossible_entries_are_found_as_qemu_finds_them_and_left() {
    let images = Images::new();
    let entries = [
        COPIED | 1 << 40,
        COPIED | 0x90200,
        COPIED | 0x0100_0000_0009_0000,
        COPIED | 0x0009_0002,
        1 << 62 | 1 << 40,
    ];
    for entry in entries {
        let (image, parts) = written(&images, "");
        poke(&image, parts.l2 + 16 * 8, &entry.to_be_bytes());
        says_what_qemu_says(&image);
        let outcome = qchainfs(&args!["check", "-r", "all", image]);
        assert_eq!(outcome.code, Some(2), "{entry:x}: {outcome}");
        let left = number(&image, parts.l2 + 16 * 8);
        assert_eq!(left & !COPIED, entry & !COPIED, "{entry:x} was changed");
    }
    for bitmap in [1_u64 << 40 | 1 << 8, 0x0000_0003_0000_0003] {
        let (image, parts) = written(&images, "extended_l2=on");
        poke(&image, parts.l2 + 8, &bitmap.to_be_bytes());
        let (theirs, ours) = both(&args!["--output=json", image]);
        let corruptions = parse(&ours)["corruptions"].clone();
        assert_eq!(corruptions, parse(&theirs)["corruptions"], "{bitmap:x}: {ours}");
    }
}

#[test]
fn what_a_broken_snapshot_refers_to_is_not_freed() {
    let images = Images::new();
    let (image, _) = written(&images, "");
    snapshot(&image, "one");
    io(&image, &["write -P 7 100k 100k"]);
    let table = number(&image, 64);
    let l1 = number(&image, table);
    let before = bytes_of_snapshot(&image, "one");
    poke(&image, table, &0x200_u64.to_be_bytes());
    says_what_qemu_says(&image);
    let untouched = Untouched::now(&[&image]);
    for extent in ["leaks", "all"] {
        let outcome = qchainfs(&args!["check", "-r", extent, image]);
        assert_eq!(outcome.code, Some(2), "{outcome}");
    }
    untouched.verify();
    poke(&image, table, &l1.to_be_bytes());
    check(&image);
    same("the snapshot", &before, &bytes_of_snapshot(&image, "one"));
}

#[test]
fn an_image_that_lazy_refcounts_left_dirty_is_repaired_and_can_be_written() {
    let images = Images::new();
    let image = images.create("disk.qcow2", 4 * M, "lazy_refcounts=on");
    io(&image, &["write -P 1 0 64k"]);
    let words = args!["-f", "qcow2", "-c", "write -P 2 64k 1M", "-c", "flush", "-c", "abort"];
    attempt("qemu-io", &[&words[..], &args![image]].concat());
    assert_eq!(number(&image, 72) & 1, 1, "the image is dirty");
    says_what_qemu_says(&image);
    let said = Mounted::refused(&[], &image, 1);
    assert!(said.contains("qchainfs check -r all"), "{said}");
    repairs(&image, &[], "all");
    assert_eq!(number(&image, 72), 0, "the mark is gone");
}

#[test]
fn a_corrupt_mark_goes_only_when_the_image_is_sound() {
    let images = Images::new();
    let (image, parts) = written(&images, "");
    poke(&image, 72, &2_u64.to_be_bytes());
    repairs(&image, &[], "leaks");
    assert_eq!(number(&image, 72), 0);
    poke(&image, 72, &2_u64.to_be_bytes());
    poke(&image, parts.l2 + 16 * 8, &(COPIED | 1 << 40).to_be_bytes());
    assert_eq!(qchainfs(&args!["check", "-r", "all", image]).code, Some(2));
    assert_eq!(number(&image, 72), 2);
}

#[test]
fn random_damage_to_counts_and_flags_is_repaired_over_all_snapshots() {
    for seed in seeds(6) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let options = random.pick(&[
            "cluster_size=512",
            "cluster_size=4k,refcount_bits=64",
            "compat=0.10,cluster_size=2k",
            "cluster_size=64k,refcount_bits=8",
            "cluster_size=16k,extended_l2=on",
        ]);
        let image = images.create("disk.qcow2", 4 * M, options);
        let snapshots = ["one", "two"];
        for name in snapshots {
            // The first L2 table is there, and is the active disk's own in the end.
            io(&image, &["write -P 1 0 4k"]);
            snapshot(&image, name);
            paint(&image, &mut random, 4 * M, 8);
        }
        io(&image, &["write -P 2 0 4k"]);
        let parts = Parts::of(&image);
        let clusters = fs::metadata(&image).expect("stat").len() / parts.cluster;
        let per_block = (parts.cluster * 8) >> parts.order;
        for _ in 0..20 {
            let cluster = random.below(clusters.min(per_block));
            parts.set_refcount(&image, cluster * parts.cluster, random.below(4) as u8);
        }
        let words = if options.contains("extended") { 16 } else { 8 };
        for _ in 0..10 {
            let place = parts.l2 + random.below(parts.cluster / words) * words;
            let entry = number(&image, place);
            if entry & !COPIED > 1 && entry >> 62 & 1 == 0 {
                poke(&image, place, &(entry ^ COPIED).to_be_bytes());
            }
        }
        says_what_qemu_says(&image);
        repairs(&image, &snapshots, "all");
    }
}

#[test]
fn an_image_that_is_written_is_not_checked_unless_forced_and_one_that_is_read_is_not_repaired() {
    let images = Images::new();
    let (image, _) = written(&images, "");
    let writer = Held::writing(&image);
    let said = qchainfs(&args!["check", image]).fails(1);
    assert!(said.contains("qemu-io"), "{said}");
    qchainfs(&args!["check", "-U", image]).ok();
    drop(writer);
    let reader = Held::reading(&image);
    qchainfs(&args!["check", image]).ok();
    qchainfs(&args!["check", "-r", "all", image]).fails(1);
    drop(reader);
    qchainfs(&args!["check", "-r", "all", image]).ok();
    assert_eq!(qchainfs(&args!["check", "-U", "-r", "all", image]).code, Some(1));
}

#[test]
fn what_can_not_be_checked_has_the_exit_code_of_qemu() {
    let images = Images::new();
    let raw = images.raw("disk.raw", &[0; 65536]);
    qchainfs(&args!["check", raw]).fails(63);
    qchainfs(&args!["check", images.path("missing.qcow2")]).fails(1);
    let (image, _) = written(&images, "");
    poke(&image, 72, &(1_u64 << 40).to_be_bytes());
    qchainfs(&args!["check", image]).fails(1);
    assert_eq!(qchainfs(&args!["check", "--nonsense", image]).code, Some(1));
}

#[test]
fn results_go_to_stdout_findings_and_progress_to_stderr_and_quiet_is_quiet() {
    let images = Images::new();
    let (image, parts) = written(&images, "");
    poke(&image, parts.l2, &[0; 8]);
    let outcome = qchainfs(&args!["check", image]);
    assert!(outcome.stderr.starts_with("Leaked cluster "), "{outcome}");
    let outcome = qchainfs(&args!["check", "-q", image]);
    let printed = (outcome.stdout.as_str(), outcome.stderr.as_str());
    assert_eq!((printed, outcome.code), (("", ""), Some(3)));
    let outcome = qchainfs(&args!["check", "--progress", "json", "--output", "json", image]);
    parse(&outcome);
    let last: Value = serde_json::from_str(outcome.stderr.lines().last().expect("a line"))
        .unwrap_or_else(|error| panic!("{error}: {outcome}"));
    assert_eq!(last["current-progress"], last["total-progress"], "{outcome}");
    let untouched = Untouched::now(&[&image]);
    qchainfs(&args!["check", image]);
    untouched.verify();
}

#[test]
fn a_check_of_a_large_disk_takes_little_memory() {
    let images = Images::new();
    let image = images.create("large.qcow2", 300 * K * M, "preallocation=metadata");
    let script = "ulimit -v 300000; exec \"$0\" check --output=json \"$1\"";
    let outcome = attempt("bash", &args!["-c", script, QCHAINFS, image]);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    says_what_qemu_says(&image);
}
