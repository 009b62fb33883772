//! What QEMU says of the images that our own checker judges.

use std::io::Write as _;
use std::process::Command;

/// Panics if `qemu-img check` finds more than leaked clusters in the image `bytes`.
///
/// Only while a snapshot is made, a cut can fall between the counts of all its clusters and the flags in the tables: the
/// counts are too high then, which QEMU calls leaks, and the flags say that they are one, which it calls errors. Both
/// are gone with the leaks.
pub fn finds_at_most_leaks(bytes: &[u8], context: &str) {
    let mut file = tempfile::NamedTempFile::new().expect("make a file");
    file.write_all(bytes).expect("write an image");
    let check = |options: &[&str]| {
        let words = [&["check", "-f", "qcow2"], options].concat();
        let outcome = Command::new("qemu-img").args(words).arg(file.path()).output();
        outcome.expect("this test needs qemu-img: run tests/run")
    };
    let outcome = check(&[]);
    if [Some(0), Some(3)].contains(&outcome.status.code()) {
        return;
    }
    let said = String::from_utf8_lossy(&outcome.stderr);
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("ERROR")).collect();
    let harmless = |line: &&str| line.contains("OFLAG_COPIED") && !line.contains("refcount=0");
    assert!(!errors.is_empty() && errors.iter().all(harmless), "{context}: {said}");
    check(&["-r", "leaks"]);
    assert_eq!(check(&[]).status.code(), Some(0), "{context}, after a repair of leaks");
}

/// An image that holds `disk` in compressed clusters, as `qemu-img convert` makes it with `options`.
pub fn packed(disk: &[u8], options: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("make a directory");
    let (raw, image) = (dir.path().join("raw"), dir.path().join("qcow2"));
    std::fs::write(&raw, disk).expect("write a raw image");
    let words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
    let outcome = Command::new("qemu-img").args(words).args([&raw, &image]).output();
    let outcome = outcome.expect("this test needs qemu-img: run tests/run");
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    std::fs::read(&image).expect("read an image")
}
