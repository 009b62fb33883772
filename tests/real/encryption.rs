//! Encrypted images, made and read by QEMU with the same keys.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cli_info::{says_what_qemu_says, settle};
use crate::cli_map::json_is_the_same;
use crate::support::M;
use crate::support::images::{Images, Untouched, paint};
use crate::support::mounted::Mounted;
use crate::support::oracle::{holds, reads_as, same};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, run};

/// How QEMU is told to open an encrypted image.
fn open_options(image: &Path) -> String {
    format!("driver=qcow2,file.filename={},encrypt.key-secret=key", image.display())
}

fn secret(key: &str) -> String {
    format!("secret,id=key,data={key}")
}

/// An encrypted image of 2 MiB with random content, and what QEMU reads in it.
fn encrypted(images: &Images, name: &str, key: &str, options: &str) -> (PathBuf, Vec<u8>) {
    let image = images.path(name);
    let options = format!("encrypt.key-secret=key,{options}");
    let create = args!["create", "-q", "-f", "qcow2", "--object", secret(key), "-o", options];
    run("qemu-img", &[&create[..], &args![image, "2M"]].concat());
    let mut random = Random::new(181);
    let mut write = args!["--object", secret(key), "--image-opts"].to_vec();
    for _ in 0..12 {
        let (offset, len) = random.range(2 * M, 300_000);
        write.extend(args!["-c", format!("write -P {} {offset} {len}", 1 + random.below(255))]);
    }
    write.extend(args![open_options(&image)]);
    run("qemu-io", &write);
    let bytes = decrypted(images, &image, key);
    (image, bytes)
}

fn decrypted(images: &Images, image: &Path, key: &str) -> Vec<u8> {
    let raw = images.path("decrypted.raw");
    let convert = args!["convert", "--object", secret(key), "--image-opts", "-O", "raw"];
    run("qemu-img", &[&convert[..], &args![open_options(image), raw]].concat());
    fs::read(raw).expect("read what qemu-img wrote")
}

fn key_file(images: &Images, name: &str, key: &str) -> PathBuf {
    let file = images.path(name);
    fs::write(&file, key).expect("write a key");
    file
}

fn with_secret(source: impl AsRef<Path>) -> Vec<OsString> {
    args!["-r", "-o", format!("secret={}", source.as_ref().display())].to_vec()
}

const LUKS: &str = "encrypt.format=luks,encrypt.iter-time=10";

#[test]
fn an_encrypted_image_reads_as_qemu_reads_it_with_the_same_key() {
    let images = Images::new();
    let key = key_file(&images, "key", "correct horse");
    for (number, options) in [
        LUKS.to_owned(),
        format!("{LUKS},cluster_size=512"),
        format!("{LUKS},cluster_size=2M,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc"),
        format!("{LUKS},encrypt.cipher-alg=serpent-256,encrypt.hash-alg=sha512"),
        format!(
            "{LUKS},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256"
        ),
        format!("{LUKS},extended_l2=on"),
        "encrypt.format=aes".to_owned(),
    ]
    .iter()
    .enumerate()
    {
        let (image, bytes) =
            encrypted(&images, &format!("{number}.qcow2"), "correct horse", options);
        let untouched = Untouched::now(&[&image]);
        let mounted = Mounted::with(&with_secret(&key), &image);
        holds(&mounted.disk(), &bytes);
        mounted.umount();
        untouched.verify();
    }
}

#[test]
fn without_the_right_key_no_byte_is_served() {
    let images = Images::new();
    let (image, _) = encrypted(&images, "disk.qcow2", "right", LUKS);
    let said = Mounted::refused(&args!["-r"], &image, 12);
    assert!(said.contains("disk.qcow2") && said.contains("secret="), "{said}");
    let wrong = key_file(&images, "wrong", "wrong");
    let said = Mounted::refused(&with_secret(wrong), &image, 12);
    assert!(said.contains("disk.qcow2"), "{said}");
    qchainfs(&args!["map", image]).fails(12);
    Mounted::refused(&with_secret(images.path("no-such-file")), &image, 10);
    // Looking at it needs no key.
    assert!(qchainfs(&args!["info", image]).ok().contains("encrypted: yes"));
}

#[test]
fn looking_at_a_chain_needs_neither_keys_nor_data_files() {
    let images = Images::new();
    encrypted(&images, "base.qcow2", "right", LUKS);
    let top = images.path("top.qcow2");
    let data = images.path("top.data");
    let options = format!("data_file={}", data.display());
    let create = args!["create", "-q", "-u", "-f", "qcow2", "-o", options];
    run("qemu-img", &[&create[..], &args!["-b", "base.qcow2", "-F", "qcow2", top, "2M"]].concat());
    fs::remove_file(data).expect("remove the data file");
    for file in [&top, &images.path("base.qcow2")] {
        settle(file);
    }
    says_what_qemu_says(&args!["--backing-chain", top]);
    let mut below = top.clone().into_os_string();
    below.push("[1]");
    assert!(qchainfs(&args!["info", below]).ok().contains("encrypted: yes"));
    qchainfs(&args!["map", top]).fails(10);
}

#[test]
fn the_map_of_an_encrypted_image_names_no_places_where_its_bytes_could_be_read() {
    let images = Images::new();
    let key = key_file(&images, "key", "right");
    for options in [LUKS, "encrypt.format=aes"] {
        let (image, _) = encrypted(&images, "disk.qcow2", "right", options);
        let option = format!("secret={}", key.display());
        let said = qchainfs(&args!["map", "-o", option, image]).ok();
        assert!(said.lines().skip(1).all(|line| line.contains("encrypted")), "{said}");
        let theirs = args!["--object", secret("right"), "--image-opts", open_options(&image)];
        json_is_the_same(&theirs, &args!["-o", option, image]);
        fs::remove_file(image).expect("make room for the next");
    }
}

#[test]
fn a_key_may_end_with_the_end_of_a_line_or_come_from_the_environment() {
    let images = Images::new();
    let (image, bytes) = encrypted(&images, "disk.qcow2", "right", LUKS);
    let line = key_file(&images, "line", "right\n");
    let mounted = Mounted::with(&with_secret(line), &image);
    holds(&mounted.disk(), &bytes);
    mounted.umount();
    let path = std::env::var("PATH").expect("PATH is set");
    // Any variable will do; this one is there.
    let (image, bytes) = encrypted(&images, "path.qcow2", &path.replace(',', ",,"), LUKS);
    let mounted = Mounted::with(&with_secret("env:PATH"), &image);
    holds(&mounted.disk(), &bytes);
    mounted.umount();
}

#[test]
fn members_of_a_chain_have_keys_of_their_own() {
    let images = Images::new();
    let (base, base_bytes) = encrypted(&images, "base.qcow2", "one", LUKS);
    let middle = images.overlay_sized("middle.qcow2", "base.qcow2", 2 * M, "");
    let middle_bytes = {
        let mut bytes = base_bytes.clone();
        bytes[4096..70_000].fill(7);
        bytes
    };
    run(
        "qemu-io",
        &args![
            "--object",
            secret("one"),
            "--image-opts",
            "-c",
            "write -P 7 4096 65904",
            format!(
                "driver=qcow2,file.filename={},backing.driver=qcow2,backing.file.filename={},\
             backing.encrypt.key-secret=key",
                middle.display(),
                base.display()
            )
        ],
    );
    let options = format!("encrypt.key-secret=key,{LUKS}");
    let top = images.path("top.qcow2");
    let create =
        args!["create", "-q", "-u", "-f", "qcow2", "--object", secret("two"), "-o", options];
    run(
        "qemu-img",
        &[&create[..], &args!["-b", "middle.qcow2", "-F", "qcow2", top, "2M"]].concat(),
    );
    let (one, two) = (key_file(&images, "one", "one"), key_file(&images, "two", "two"));
    let (one, two) = (one.display(), two.display());
    for secrets in [
        format!("secret={two},secret[base.qcow2]={one}"),
        format!("secret[0]={two},secret[2]={one}"),
    ] {
        let mounted = Mounted::with(&args!["-r", "-o", secrets], &top);
        holds(&mounted.disk(), &middle_bytes);
        holds(&mounted.path("chain/1/disk.raw"), &middle_bytes);
        holds(&mounted.path("chain/2/disk.raw"), &base_bytes);
        mounted.umount();
    }
    Mounted::refused(&args!["-r", "-o", format!("secret={two}")], &top, 12);
}

#[test]
fn an_encrypted_base_of_a_plain_overlay_is_copied_from_when_that_is_written() {
    let images = Images::new();
    let (_, mut bytes) = encrypted(&images, "base.qcow2", "one", LUKS);
    let top = images.overlay_sized("top.qcow2", "base.qcow2", 2 * M, "");
    let key = key_file(&images, "key", "one");
    let mounted = Mounted::with(&args!["-o", format!("secret={}", key.display())], &top);
    use std::os::unix::fs::FileExt as _;
    let disk = fs::File::options().write(true).open(mounted.disk()).expect("open for writing");
    disk.write_all_at(&[9; 1000], 65_000).expect("write");
    drop(disk);
    bytes[65_000..66_000].fill(9);
    holds(&mounted.disk(), &bytes);
    mounted.umount();
    // Without its backing file, which QEMU would need the key for.
    let file = format!(r#"{{"driver":"file","filename":"{}"}}"#, top.display());
    let alone = format!(r#"json:{{"driver":"qcow2","file":{file},"backing":null}}"#);
    run("qemu-img", &args!["check", "-q", alone]);
}

#[test]
fn what_is_written_to_an_encrypted_image_is_what_qemu_reads_with_the_same_key() {
    use std::os::unix::fs::FileExt as _;
    let images = Images::new();
    let key = key_file(&images, "key", "right");
    for (number, options) in [
        LUKS.to_owned(),
        format!("{LUKS},cluster_size=512"),
        format!("{LUKS},extended_l2=on,refcount_bits=64"),
        format!(
            "{LUKS},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256"
        ),
        format!("{LUKS},data_file={}", images.path("guest.data").display()),
        "encrypt.format=aes".to_owned(),
    ]
    .iter()
    .enumerate()
    {
        let name = format!("{number}.qcow2");
        let (image, mut bytes) = encrypted(&images, &name, "right", options);
        let mut random = Random::new(182 + number as u64);
        for _ in 0..3 {
            let option = format!("secret={}", key.display());
            let mounted = Mounted::with(&args!["-o", option], &image);
            let disk = fs::File::options().read(true).write(true).open(mounted.disk());
            let disk = disk.expect("open for writing");
            for _ in 0..40 {
                let (offset, len) = random.range(2 * M, 90_000);
                let data = random.bytes(len as usize);
                disk.write_all_at(&data, offset).expect("write");
                bytes[offset as usize..(offset + len) as usize].copy_from_slice(&data);
            }
            drop(disk);
            holds(&mounted.disk(), &bytes);
            mounted.umount();
            same(options, &bytes, &decrypted(&images, &image, "right"));
            run(
                "qemu-img",
                &args!["check", "-q", "--object", secret("right"), "--image-opts"]
                    .iter()
                    .cloned()
                    .chain([open_options(&image).into()])
                    .collect::<Vec<_>>(),
            );
        }
    }
}

#[test]
fn a_key_that_nothing_needs_changes_nothing() {
    let images = Images::new();
    let key = key_file(&images, "key", "right");
    let mut random = Random::new(182);
    let plain = images.create("plain.qcow2", M, "");
    paint(&plain, &mut random, M, 5);
    let mounted = Mounted::with(&args!["-o", format!("secret={}", key.display())], &plain);
    reads_as(&mounted.disk(), &plain);
    mounted.umount();
}

#[test]
fn what_is_written_to_a_twin_of_an_encrypted_disk_would_not_be_encrypted_so_nothing_is() {
    let images = Images::new();
    let (image, bytes) = encrypted(&images, "disk.qcow2", "sesame", LUKS);
    let key = key_file(&images, "key", "sesame");
    let mut options = with_secret(key);
    options.extend(args!["-o", "scratch"]);
    let mounted = Mounted::with(&options, &image);
    let twin = mounted.path("scratch/disk.raw");
    holds(&twin, &bytes);
    let error = fs::File::options().write(true).open(&twin).expect_err("it can't be written");
    assert_eq!(error.raw_os_error(), Some(nix::libc::EOPNOTSUPP));
    mounted.umount();
}
