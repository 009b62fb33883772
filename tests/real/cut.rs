//! Members that somebody cuts while they are mounted.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::support::images::{Images, io};
use crate::support::mounted::{Mounted, is_running};
use crate::support::oracle::same;
use crate::support::{M, index};

/// What a read of `len` bytes at `offset` of a disk gives, past the kernel's cache.
fn read(disk: &Path, offset: u64, len: usize) -> Result<Vec<u8>, Option<i32>> {
    let mut open = OpenOptions::new();
    let disk = open.read(true).custom_flags(libc::O_DIRECT).open(disk).expect("open");
    let mut bytes = vec![0; len + 4096];
    let start = bytes.as_ptr().align_offset(4096);
    match disk.read_at(&mut bytes[start..start + len], offset) {
        Ok(read) => Ok(bytes[start..start + read].to_vec()),
        Err(error) => Err(error.raw_os_error()),
    }
}

#[test]
fn what_was_cut_off_a_member_is_an_error_and_never_zeroes() {
    for (format, kept) in [("qcow2", 5 * M), ("raw", 4 * M)] {
        for options in ["-r", "-w"] {
            let images = Images::new();
            let base = match format {
                "raw" => images.raw("base.raw", &vec![7; index(8 * M)]),
                _ => {
                    let base = images.create("base.qcow2", 8 * M, "");
                    io(&base, &["write -P 7 0 8M"]);
                    base
                }
            };
            let name = base.file_name().and_then(|name| name.to_str()).expect("a name");
            let top = images.overlay("top.qcow2", name, "");
            io(&top, &["write -P 9 0 64k"]);
            let mounted = match options {
                "-r" => Mounted::read_only(&top),
                _ => Mounted::new(&top),
            };
            // So that its pages are in use when they go.
            same("the disk", &[7; 1 << 20], &read(&mounted.disk(), 6 * M, 1 << 20).expect("read"));
            File::options().write(true).open(&base).expect("open").set_len(kept).expect("cut");
            for disk in ["disk.raw", "chain/1/disk.raw"] {
                let disk = mounted.path(disk);
                for len in [4096, 64 << 10, 1 << 20] {
                    let found = read(&disk, 7 * M, len).map(|bytes| bytes.len());
                    assert_eq!(found, Err(Some(libc::EIO)), "{format}, {len}");
                }
                same("what is left", &[7; 65536], &read(&disk, M, 65536).expect("read"));
            }
            same("the top", &[9; 4096], &read(&mounted.disk(), 0, 4096).expect("read"));
            let mut copy = File::create(images.path("copy")).expect("create");
            let mut view = File::open(mounted.path("chain/1/disk.raw")).expect("open");
            let error = std::io::copy(&mut view, &mut copy).expect_err("a copy of what is lost");
            assert_ne!(error.kind(), ErrorKind::NotFound, "{error}");
            assert!(is_running(mounted.daemon()));
        }
    }
}
