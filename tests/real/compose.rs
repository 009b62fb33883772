//! `--chain`: a chain of files that do not name each other, as full and incremental backups are.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::M;
use crate::support::held::Held;
use crate::support::images::{Images, Untouched, format_of, io, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, attempt, qchainfs, run};

/// The value of `--chain`.
fn list(files: &[&Path]) -> OsString {
    let files: Vec<_> = files.iter().map(|file| file.as_os_str().to_owned()).collect();
    files.join(",".as_ref())
}

/// A full backup and two incremental ones, the base first, with what each stood for when it was made.
struct Backups {
    files: Vec<PathBuf>,
    bytes: Vec<Vec<u8>>,
}

impl Backups {
    /// Makes them as a chain and has the headers forget it.
    fn make(images: &Images, random: &mut Random, base: &str) -> Self {
        let full = images.path(base);
        match format_of(&full) {
            "raw" => images.raw(base, &random.bytes(4 << 20)),
            _ => images.create(base, 4 * M, "cluster_size=4k"),
        };
        paint(&full, random, 4 * M, 8);
        let mut files = vec![full];
        for (name, below) in [("monday.qcow2", base), ("tuesday.qcow2", "monday.qcow2")] {
            let next = images.overlay(name, below, "");
            paint(&next, random, 4 * M, 6);
            files.push(next);
        }
        let bytes = files.iter().map(|file| bytes_of(file)).collect();
        for file in &files[1..] {
            run("qemu-img", &args!["rebase", "-u", "-b", "", file]);
        }
        Self { files, bytes }
    }

    fn list(&self) -> OsString {
        list(&self.files.iter().map(PathBuf::as_path).collect::<Vec<_>>())
    }

    /// Mounts by `words`, of which the last is not yet the mountpoint.
    fn mount(words: &[OsString]) -> Mounted {
        let mounted = Mounted::attempt_by("--chain".as_ref(), |_, root| {
            let mut all = args!["mount"].to_vec();
            all.extend_from_slice(words);
            all.extend(args![root]);
            qchainfs(&all)
        });
        mounted.unwrap_or_else(|outcome| panic!("{outcome}"))
    }
}

#[test]
fn every_backup_of_a_composed_chain_reads_as_it_was_when_it_was_made() {
    for seed in seeds(2) {
        for base in ["full.qcow2", "full.raw"] {
            let images = Images::new();
            let backups = Backups::make(&images, &mut Random::new(seed), base);
            let untouched = Untouched::now(&backups.files);
            let mounted = Backups::mount(&args!["--chain", backups.list()]);
            holds(&mounted.disk(), &backups.bytes[2]);
            holds(&mounted.path("chain/1/disk.raw"), &backups.bytes[1]);
            holds(&mounted.path("chain/2/disk.raw"), &backups.bytes[0]);
            holds(&mounted.path("chain/by-name").join(base).join("disk.raw"), &backups.bytes[0]);
            assert!(File::options().write(true).open(mounted.disk()).is_err(), "it is writable");
            assert!(mounted.mount_line().expect("a mount")[3].split(',').any(|word| word == "ro"));
            mounted.umount();
            untouched.verify();
        }
    }
}

#[test]
fn an_address_names_a_view_of_the_composed_chain_by_the_file_on_top() {
    let images = Images::new();
    let backups = Backups::make(&images, &mut Random::new(1), "full.raw");
    snapshot(&backups.files[1], "noon");
    let chain = backups.list();
    for (suffix, expected) in
        [("", 2), ("[1]", 1), ("[monday.qcow2]", 1), ("[1]@noon", 1), ("[2]", 0)]
    {
        let mut address = backups.files[2].clone().into_os_string();
        address.push(suffix);
        let mounted = Backups::mount(&args!["--chain", chain, address]);
        holds(&mounted.disk(), &backups.bytes[expected]);
        mounted.umount();
    }
    let (monday, place) = (&backups.files[1], images.path("mountpoint"));
    fs::create_dir(&place).expect("make a directory");
    qchainfs(&args!["mount", "--chain", chain, monday, place]).fails(2);
    qchainfs(&args!["map", "--chain", chain, monday]).fails(2);
}

#[test]
fn map_info_and_diff_see_the_composed_chain() {
    let images = Images::new();
    let backups = Backups::make(&images, &mut Random::new(2), "full.qcow2");
    let (chain, top) = (backups.list(), &backups.files[2]);
    let parse = |text: &str| -> Vec<Value> { serde_json::from_str(text).expect("JSON") };
    let map = qchainfs(&args!["map", "--output", "json", "--chain", chain]).ok();
    assert!(parse(&map).iter().any(|extent| extent["depth"] == 2), "{map}");
    let info = args!["info", "--backing-chain", "--output", "json", "--chain", chain];
    let info = parse(&qchainfs(&info).ok());
    let names: Vec<_> = info.iter().map(|member| member["filename"].clone()).collect();
    let expected: Vec<_> =
        backups.files.iter().rev().map(|file| file.display().to_string()).collect();
    assert_eq!(names, expected);

    // The last backup against the disk that it was made from, which is one image by now.
    let disk = images.path("disk.qcow2");
    let raw = images.raw("disk.raw", &backups.bytes[2]);
    run("qemu-img", &args!["convert", "-f", "raw", "-O", "qcow2", raw, disk]);
    qchainfs(&args!["diff", "--chain", chain, top, disk]).ok();
    io(&disk, &["write -P 1 100k 512", "write -P 2 200k 512"]);
    assert_eq!(qchainfs(&args!["diff", "-q", "--chain", chain, top, disk]).code, Some(4));
    qchainfs(&args!["diff", "--chain", chain, disk, disk]).fails(2);
}

#[test]
fn what_the_headers_name_is_ignored() {
    let images = Images::new();
    let mut random = Random::new(3);
    let other = images.create("other.qcow2", M, "");
    io(&other, &["write -P 9 0 1M"]);
    let base = images.raw("base.raw", &random.bytes(1 << 20));
    let top = images.overlay("top.qcow2", "other.qcow2", "");
    io(&top, &["write -P 1 0 64k"]);
    let mut expected = bytes_of(&base);
    expected[..65536].fill(1);
    let mounted = Backups::mount(&args!["--chain", list(&[&base, &top])]);
    holds(&mounted.disk(), &expected);
    mounted.umount();
    fs::remove_file(&other).expect("remove");
    let mounted = Backups::mount(&args!["--chain", list(&[&base, &top])]);
    holds(&mounted.disk(), &expected);
    mounted.umount();
}

#[test]
fn a_file_is_taken_for_what_its_first_bytes_say_unless_its_format_is_given() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 4 0 1M"]);
    let (as_disk, as_file) = (bytes_of(&image), fs::read(&image).expect("read"));
    // What a file is called says nothing.
    let strange = images.path("strange.raw");
    fs::copy(&image, &strange).expect("copy");
    let prefixed = |prefix: &str| {
        let mut word = OsString::from(prefix);
        word.push(&strange);
        word
    };
    for (word, expected) in
        [(prefixed(""), &as_disk), (prefixed("qcow2:"), &as_disk), (prefixed("raw:"), &as_file)]
    {
        let mounted = Backups::mount(&args!["--chain", word]);
        let found = fs::read(mounted.disk()).expect("read");
        assert!(found.starts_with(expected), "{}", word.display());
        mounted.umount();
    }
    let raw = images.raw("zeroes", &[0; 1 << 20]);
    let mut word = OsString::from("qcow2:");
    word.push(&raw);
    qchainfs(&args!["map", "--chain", word]).fails(1);
}

#[test]
fn a_chain_that_makes_no_sense_is_a_usage_error() {
    let images = Images::new();
    let raw = images.raw("base.raw", &[1; 1 << 20]);
    let top = images.create("top.qcow2", M, "");
    let link = images.path("link.qcow2");
    std::os::unix::fs::symlink(&top, &link).expect("link");
    let untouched = Untouched::now(&[&raw, &top]);
    let place = images.path("mountpoint");
    fs::create_dir(&place).expect("make a directory");
    for wrong in
        [&[&*raw, &top, &top][..], &[&raw, &top, &link], &[&top, &raw], &[Path::new(""), &top]]
    {
        let said = qchainfs(&args!["mount", "--chain", list(wrong), place]).fails(2);
        assert!(said.contains("chain"), "{said}");
    }
    let chain = list(&[&raw, &top]);
    qchainfs(&args!["mount", "-o", "rw", "--chain", chain, place]).fails(2);
    assert_eq!(qchainfs(&args!["mount", "--chain", chain]).code, Some(2));
    qchainfs(&args!["mount", "--chain", list(&[&raw, &images.path("missing")]), place]).fails(10);
    untouched.verify();
}

#[test]
fn the_files_of_a_composed_chain_are_locked_as_for_reading() {
    let images = Images::new();
    let backups = Backups::make(&images, &mut Random::new(4), "full.qcow2");
    let chain = backups.list();
    let mounted = Backups::mount(&args!["--chain", chain]);
    for file in &backups.files {
        let outcome = attempt("qemu-io", &args!["-f", "qcow2", "-c", "write 0 512", file]);
        assert_ne!(outcome.code, Some(0), "{outcome}");
        run("qemu-io", &args!["-r", "-f", "qcow2", "-c", "read 0 512", file]);
    }
    mounted.umount();
    let held = Held::writing(&backups.files[1]);
    let said = qchainfs(&args!["map", "--chain", chain]).fails(11);
    assert!(said.contains(&held.pid().to_string()), "{said}");
    qchainfs(&args!["map", "-U", "--chain", chain]).ok();
}

#[test]
fn a_comma_in_a_name_is_written_twice() {
    let images = Images::new();
    let base = images.create("a,b.qcow2", M, "");
    io(&base, &["write -P 6 0 1M"]);
    let top = images.create("top.qcow2", M, "");
    let base = base.display().to_string().replace(',', ",,");
    let mounted = Backups::mount(&args!["--chain", format!("{base},{}", top.display())]);
    holds(&mounted.disk(), &[6; 1 << 20]);
    mounted.umount();
}

#[test]
fn a_snapshot_in_a_backup_stands_on_the_files_below_it() {
    let images = Images::new();
    let base = images.raw("base.raw", &[7; 1 << 20]);
    let top = images.overlay("top.qcow2", "base.raw", "");
    io(&top, &["write -P 1 0 64k"]);
    snapshot(&top, "one");
    io(&top, &["write -P 2 0 256k"]);
    let expected = bytes_of_snapshot(&top, "one");
    run("qemu-img", &args!["rebase", "-u", "-b", "", top]);
    let mounted = Backups::mount(&args!["--chain", list(&[&base, &top])]);
    holds(&mounted.path("snapshots/one/disk.raw"), &expected);
    mounted.umount();
}

#[test]
fn a_data_file_of_a_composed_chain_passes_the_policy() {
    let images = Images::new();
    let base = images.raw("base.raw", &[7; 1 << 20]);
    let elsewhere = Images::new();
    for (name, code) in [(images.path("data"), 0), (elsewhere.path("data"), 13)] {
        let top = images.path("top.qcow2");
        let options = format!("data_file={}", name.display());
        run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-o", options, top, "1M"]);
        io(&top, &["write -P 1 0 64k"]);
        let chain = list(&[&base, &top]);
        let mut expected = vec![7; 1 << 20];
        expected[..65536].fill(1);
        let (raw, flat) = (images.raw("flat.raw", &expected), images.path("flat.qcow2"));
        run("qemu-img", &args!["convert", "-f", "raw", "-O", "qcow2", raw, flat]);
        let equal = |options: &[OsString]| {
            let mut words = args!["diff"].to_vec();
            words.extend_from_slice(options);
            words.extend(args!["--chain", chain, top, flat]);
            qchainfs(&words)
        };
        assert_eq!(equal(&[]).code, Some(code));
        equal(&args!["-o", "backing_policy=any"]).ok();
        fs::remove_file(&top).expect("remove");
    }
}
