//! What QEMU reads, and whether a view holds the same.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use super::images::format_of;
use super::tools::{args, run};

/// Every byte of `image`, through its backing files.
#[track_caller]
pub fn bytes_of(image: &Path) -> Vec<u8> {
    converted(&args!["-f", format_of(image), image])
}

/// Every byte of a snapshot, up to the size of the active disk: QEMU knows no other.
#[track_caller]
pub fn bytes_of_snapshot(image: &Path, snapshot: &str) -> Vec<u8> {
    converted(&args!["-l", snapshot, image])
}

/// What `qemu-img convert` makes of an image that is described by `words`.
#[track_caller]
pub fn converted(words: &[OsString]) -> Vec<u8> {
    let dir = TempDir::with_prefix("qchainfs-oracle-").expect("make a directory");
    let raw = dir.path().join("raw");
    run("qemu-img", &[&args!["convert", "-U", "-O", "raw"], words, &args![raw]].concat());
    fs::read(&raw).expect("read what qemu-img wrote")
}

/// Panics with the first difference, if there is one.
#[track_caller]
pub fn same(what: &str, expected: &[u8], found: &[u8]) {
    if expected == found {
        return;
    }
    if let Some(at) = expected.iter().zip(found).position(|(a, b)| a != b) {
        let count = expected.iter().zip(found).filter(|(a, b)| a != b).count();
        let (expected, found) = (expected[at], found[at]);
        panic!(
            "{what} differs first at {at}: expected {expected:#04x}, found {found:#04x}; \
             {count} bytes differ"
        );
    }
    panic!("{what}: expected {} bytes, found {}", expected.len(), found.len());
}

/// Panics unless the file `view` holds exactly `expected`.
#[track_caller]
pub fn holds(view: &Path, expected: &[u8]) {
    let found = fs::read(view).unwrap_or_else(|error| panic!("read {}: {error}", view.display()));
    same(&view.display().to_string(), expected, &found);
}

/// Panics unless the file `view` holds what QEMU reads from `image`.
#[track_caller]
pub fn reads_as(view: &Path, image: &Path) {
    holds(view, &bytes_of(image));
}

/// Panics unless the file `view` begins with what QEMU reads from the snapshot, as far as QEMU can
/// see it.
#[track_caller]
pub fn reads_as_snapshot(view: &Path, image: &Path, snapshot: &str) {
    let expected = bytes_of_snapshot(image, snapshot);
    let found = fs::read(view).unwrap_or_else(|error| panic!("read {}: {error}", view.display()));
    let common = expected.len().min(found.len());
    same(&view.display().to_string(), &expected[..common], &found[..common]);
}

/// The bytes at `offset`; fewer than `len` at the end of the file.
pub fn read_at(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        let now = file.read_at(&mut bytes[done..], offset + done as u64).expect("pread");
        if now == 0 {
            break;
        }
        done += now;
    }
    bytes.truncate(done);
    bytes
}

/// What `qemu-img info` knows about `image`.
#[track_caller]
pub fn info(image: &Path) -> Value {
    let format = format_of(image);
    let said = run("qemu-img", &args!["info", "-U", "-f", format, "--output", "json", image]);
    serde_json::from_str(&said).expect("qemu-img speaks JSON")
}

/// The size of the disk in `image`.
#[track_caller]
pub fn virtual_size(image: &Path) -> u64 {
    info(image)["virtual-size"].as_u64().expect("a virtual size")
}
