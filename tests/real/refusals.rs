//! What is not understood is refused by name, and left as it is.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::support::images::{Images, Untouched, io, poke};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, holds};
use crate::support::tools::{QCHAINFS, args, qchainfs, run, start};
use crate::support::{M, index};

const INCOMPATIBLE_BITS: u64 = 72;

/// Mounting `image` fails with `code`, in both modes; what is said has all `words`. The image is
/// not changed.
#[track_caller]
fn refuses(image: &Path, code: i32, words: &[&str]) {
    let untouched = Untouched::now(&[image]);
    for options in [vec![], args!["-r"].to_vec()] {
        let said = Mounted::refused(&options, image, code);
        for word in words {
            let found = said.to_lowercase().contains(&word.to_lowercase());
            assert!(found, "\"{word}\" is not in: {said}");
        }
    }
    untouched.verify();
}

#[test]
fn an_unknown_incompatible_feature_is_refused() {
    let images = Images::new();
    for bit in [5, 17, 63] {
        let image = images.create("future.qcow2", M, "");
        poke(&image, INCOMPATIBLE_BITS, &(1_u64 << bit).to_be_bytes());
        refuses(&image, 14, &["future.qcow2", &bit.to_string()]);
    }
}

#[test]
fn an_unknown_compatible_feature_is_no_hindrance() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 8 0 1M"]);
    poke(&image, INCOMPATIBLE_BITS + 8, &(1_u64 << 40).to_be_bytes());
    let mounted = Mounted::new(&image);
    holds(&mounted.disk(), &vec![8; index(M)]);
    mounted.umount();
}

#[test]
fn an_unsupported_member_below_is_refused_and_named() {
    let images = Images::new();
    images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    poke(&images.path("base.qcow2"), INCOMPATIBLE_BITS, &(1_u64 << 9).to_be_bytes());
    refuses(&top, 14, &["base.qcow2", "bit 9"]);
}

#[test]
fn lazy_refcounts_are_no_hindrance() {
    let images = Images::new();
    let image = images.create("lazy.qcow2", M, "lazy_refcounts=on");
    io(&image, &["write -P 8 0 1M"]);
    let mounted = Mounted::new(&image);
    holds(&mounted.disk(), &vec![8; index(M)]);
    mounted.umount();
    crate::support::images::check(&image);
}

#[test]
fn a_marked_image_is_mounted_read_only_and_not_writable() {
    let images = Images::new();
    for (name, bit) in [("dirty", 1_u64), ("corrupt", 2)] {
        let image = images.create(&format!("{name}.qcow2"), M, "");
        io(&image, &["write -P 7 0 512k"]);
        let expected = bytes_of(&image);
        poke(&image, INCOMPATIBLE_BITS, &bit.to_be_bytes());
        let untouched = Untouched::now(&[&image]);
        let said = Mounted::refused(&[], &image, 1);
        assert!(said.contains(name) && said.contains("qchainfs check -r all"), "{said}");
        let mounted = Mounted::read_only(&image);
        holds(&mounted.disk(), &expected);
        mounted.umount();
        untouched.verify();
    }
}

#[test]
fn a_marked_base_is_no_hindrance_since_it_is_only_read() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    io(&base, &["write -P 7 0 512k"]);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let expected = bytes_of(&top);
    poke(&base, INCOMPATIBLE_BITS, &1_u64.to_be_bytes());
    let mounted = Mounted::new(&top);
    holds(&mounted.disk(), &expected);
    mounted.umount();
}

/// Renames the header extension that says which format the backing file has.
fn forget_backing_format(image: &Path) {
    let header = fs::read(image).expect("read");
    let magic = [0xe2, 0x79, 0x2a, 0xca];
    let at = header.windows(4).position(|bytes| bytes == magic).expect("a backing format");
    poke(image, at as u64, &[0x11, 0x22, 0x33, 0x44]);
}

#[test]
fn a_backing_file_without_a_format_is_refused_with_the_command_that_gives_it_one() {
    for compat in ["0.10", "1.1"] {
        let images = Images::new();
        images.create("base.qcow2", M, "");
        let top = images.overlay("top.qcow2", "base.qcow2", &format!("compat={compat}"));
        forget_backing_format(&top);
        refuses(&top, 1, &["top.qcow2", "base.qcow2", "qemu-img rebase -u -F"]);
    }
}

#[test]
fn a_backing_loop_is_refused_and_its_files_are_named() {
    let images = Images::new();
    let one = images.create("one.qcow2", M, "");
    images.overlay("two.qcow2", "one.qcow2", "");
    run("qemu-img", &args!["rebase", "-u", "-b", "two.qcow2", "-F", "qcow2", one]);
    refuses(&one, 1, &["one.qcow2", "two.qcow2", "loop"]);
    run("qemu-img", &args!["rebase", "-u", "-b", "one.qcow2", "-F", "qcow2", one]);
    refuses(&one, 1, &["one.qcow2", "loop"]);
}

#[test]
fn a_missing_backing_file_is_named() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    fs::remove_file(base).expect("remove the base");
    refuses(&top, 10, &["top.qcow2", "base.qcow2"]);
    // Also where the image is named from its own directory.
    let mut command = std::process::Command::new(QCHAINFS);
    command.current_dir(images.path("")).args(["map", "top.qcow2"]);
    let ended = start(command.stdout(Stdio::null()).stderr(Stdio::null())).wait().expect("wait");
    assert_eq!(ended.code(), Some(10));
}

#[test]
fn a_backing_name_that_leads_in_circles_is_no_matter_of_policy() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    fs::remove_file(&base).expect("remove the base");
    symlink("base.qcow2", &base).expect("link");
    refuses(&top, 1, &["base.qcow2", "symbolic links"]);
}

#[test]
fn what_is_not_there_is_said_to_be_missing() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let missing = images.path("missing.qcow2");
    let address = |text: &str| -> OsString {
        let mut address = image.clone().into_os_string();
        address.push(text);
        address
    };
    let (snapshot, id, member) = (address("@none"), address("@#9"), address("[3]"));
    let name = address("[other.qcow2]");
    for addr in [missing.as_os_str(), &snapshot, &id, &member, &name] {
        Mounted::refused(&args!["-r"], addr, 10);
        qchainfs(&args!["info", addr]).fails(10);
        qchainfs(&args!["map", addr]).fails(10);
    }
}

#[test]
fn what_is_no_image_is_refused() {
    let images = Images::new();
    let text = images.path("text.qcow2");
    fs::write(&text, "this is no disk image\n".repeat(1000)).expect("write");
    let short = images.path("short.qcow2");
    fs::write(&short, b"QFI\xfb\0\0\0\x03").expect("write");
    let empty = images.path("empty.qcow2");
    fs::write(&empty, "").expect("write");
    for image in [&text, &short, &empty] {
        let untouched = Untouched::now(&[image]);
        Mounted::refused(&[], image, 1);
        untouched.verify();
    }
    Mounted::refused(&[], images.path(""), 1);
}

/// Every header field of four bytes set to its greatest value, one at a time.
fn spoiled(images: &Images, at: u64) -> PathBuf {
    let image = images.create("spoiled.qcow2", M, "");
    io(&image, &["write -P 1 0 64k"]);
    poke(&image, at, &[0xff; 4]);
    image
}

#[test]
fn an_impossible_header_is_refused_or_read_but_nothing_breaks() {
    let images = Images::new();
    for at in (4..104).step_by(4) {
        let image = spoiled(&images, at);
        let untouched = Untouched::now(&[&image]);
        let outcome = qchainfs(&args!["map", "--output", "json", image]);
        let code = outcome.code;
        assert!(
            [Some(0), Some(1), Some(10), Some(13), Some(14)].contains(&code),
            "{at}: {outcome}"
        );
        if code != Some(0) {
            outcome.fails(code.expect("a code"));
        }
        untouched.verify();
    }
}

#[test]
fn a_file_that_was_cut_is_not_written_since_its_lost_refcounts_would_call_all_free() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let table = |at: u64| {
        let mut bytes = [0; 8];
        fs::File::open(&image).expect("open").read_exact_at(&mut bytes, at).expect("read");
        u64::from_be_bytes(bytes)
    };
    let block = table(table(48));
    // The block at the end of the file, as after it grew there.
    let moved = 0x80000_u64;
    let old = fs::read(&image).expect("read an image");
    poke(&image, moved, &old[index(block)..index(block) + 65536]);
    poke(&image, table(48), &moved.to_be_bytes());
    Mounted::new(&image).umount();
    let file = fs::File::options().write(true).open(&image).expect("open");
    for (len, field) in [(moved + 100, "refcount block offset"), (0x10100, "refcount_table_offset")]
    {
        file.set_len(len).expect("cut the file");
        let said = Mounted::refused(&[], &image, 1);
        assert!(said.contains(field), "\"{field}\" is not in: {said}");
        Mounted::read_only(&image).umount();
    }
}

#[test]
fn a_backing_file_that_is_no_image_is_named_with_the_image_that_names_it() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    fs::write(&base, "this is no disk image\n".repeat(1000)).expect("write");
    refuses(
        &top,
        1,
        &["base.qcow2 is not a qcow2 image", "it is the backing file of", "top.qcow2"],
    );
    fs::remove_file(&base).expect("remove");
    fs::create_dir(&base).expect("make a directory");
    let words = ["base.qcow2 is not a regular file", "it is the backing file of", "top.qcow2"];
    refuses(&top, 1, &words);
}

/// Makes an image of 1 MiB whose data file is `data`, which exists and stays as it is.
fn create_with_data(images: &Images, name: &str, data: &str) -> PathBuf {
    let kept = fs::read(images.path(data)).ok();
    let place = images.path(data);
    let image = images.create(name, M, &format!("data_file={}", place.display()));
    if let Some(bytes) = kept {
        fs::write(images.path(data), bytes).expect("put the file back");
    }
    image
}

#[test]
fn an_image_that_is_its_own_data_file_is_not_written() {
    let images = Images::new();
    let other = create_with_data(&images, "other.qcow2", "disk.img");
    let image = images.path("disk.img");
    fs::copy(other, &image).expect("copy");
    let untouched = Untouched::now(&[&image]);
    for options in [vec![], args!["-o", "lock=off"].to_vec()] {
        let said = Mounted::refused(&options, &image, 1);
        assert!(said.contains("data file name") && said.contains("itself"), "{said}");
    }
    untouched.verify();
}

#[test]
fn a_data_file_that_is_another_member_is_not_written() {
    let images = Images::new();
    let base = images.create("base.qcow2", M, "");
    io(&base, &["write -q -P 3 0 1M"]);
    let top = create_with_data(&images, "top.qcow2", "base.qcow2");
    run("qemu-img", &args!["rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", &top]);
    let untouched = Untouched::now(&[&base, &top]);
    for options in [vec![], args!["-o", "lock=off"].to_vec()] {
        let said = Mounted::refused(&options, &top, 1);
        assert!(said.contains("data file name") && said.contains("top.qcow2"), "{said}");
    }
    untouched.verify();
}
