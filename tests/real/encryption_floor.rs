//! Encrypted images, read and written with the encryption floor alone: no mount, no open image.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use qchainfs::error::{Kind, Problem, Result};
use qchainfs::qcow2::Header;
use qchainfs::qcow2::encryption::{
    CRYPT_AES, CRYPT_LUKS, LuksArea, LuksHeader, SectorCipher, VolumeKey,
};

use crate::support::images::{Images, poke};
use crate::support::oracle::same;
use crate::support::tools::{args, run};
use crate::support::{K, M, index};

const SECRET: &str = "correct horse";
const CLUSTER: u64 = 64 * K;
/// Guest offsets of clusters and the bytes that they are full of; the last is behind the first L2 table.
const PATTERNS: [(u64, u8); 3] = [(0, 0xa1), (3 * M, 0x5c), (513 * M, 0x07)];

/// Objects for QEMU's tools: secrets `s0`, `s1`, …
fn secrets(secrets: &[&str]) -> Vec<OsString> {
    let objects = secrets.iter().enumerate();
    objects
        .flat_map(|(id, data)| args!["--object", format!("secret,id=s{id},data={data}")])
        .collect()
}

/// How QEMU's tools open `image` with secret `s0`.
fn opened(image: &Path) -> String {
    format!("driver=qcow2,file.filename={},encrypt.key-secret=s0", image.display())
}

/// An encrypted image with [`PATTERNS`], made by QEMU.
fn encrypted(images: &Images, options: &str) -> PathBuf {
    let path = images.path("encrypted.qcow2");
    let mut words = args!["create", "-q", "-f", "qcow2"].to_vec();
    words.extend(secrets(&[SECRET]));
    let options = format!("cluster_size=64k,encrypt.key-secret=s0,{options}");
    words.extend(args!["-o", options, path, "600M"]);
    run("qemu-img", &words);
    let writes = PATTERNS.map(|(at, byte)| format!("write -P {byte} {at} {CLUSTER}"));
    qemu_io(&path, &writes);
    path
}

/// A LUKS image with [`PATTERNS`] whose key slots take hardly any time.
fn luks(images: &Images, options: &str) -> PathBuf {
    encrypted(images, &format!("encrypt.format=luks,encrypt.iter-time=1{options}"))
}

fn qemu_io<S: AsRef<str>>(image: &Path, commands: &[S]) {
    let mut words = secrets(&[SECRET]);
    for command in commands {
        words.extend(args!["-c", command.as_ref()]);
    }
    words.extend(args!["--image-opts", opened(image)]);
    let said = run("qemu-io", &words);
    assert!(!said.contains("verification failed"), "{}: {said}", image.display());
}

fn bytes(image: &Path, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; index(len)];
    File::open(image).expect("open").read_exact_at(&mut bytes, offset).expect("read");
    bytes
}

fn header(image: &Path) -> Header {
    Header::parse(&bytes(image, 0, CLUSTER)).expect("parse the header")
}

fn unlock(image: &Path, passphrase: &str) -> Result<VolumeKey> {
    let header = header(image);
    assert_eq!(header.crypt_method, CRYPT_LUKS);
    let area = LuksArea::find(&header.extensions, header.geometry)?.expect("a LUKS header");
    let area = bytes(image, area.offset.get(), area.len);
    LuksHeader::parse(&area)?.unlock(&area, passphrase.as_bytes())
}

/// Where the cluster at `guest` is in the file.
fn host_offset(image: &Path, guest: u64) -> u64 {
    let header = header(image);
    let per_table = CLUSTER / 8;
    let entry = |table: u64, entry: u64| {
        u64::from_be_bytes(bytes(image, table + entry * 8, 8).try_into().expect("8 bytes"))
    };
    let cluster = guest / CLUSTER;
    let table = entry(header.l1_offset.get(), cluster / per_table) & 0x00ff_ffff_ffff_fe00;
    let data = entry(table, cluster % per_table) & 0x00ff_ffff_ffff_fe00;
    assert_ne!(data, 0, "the cluster at {guest} is not there");
    data
}

/// What decides a sector's number.
#[derive(Clone, Copy)]
enum Numbered {
    ByFile,
    ByDisk,
}

/// Reads what QEMU encrypted, and lets QEMU read what we encrypt.
fn both_ways(image: &Path, cipher: &SectorCipher, numbered: Numbered) {
    for (guest, byte) in PATTERNS {
        let host = host_offset(image, guest);
        let first = match numbered {
            Numbered::ByFile => host / 512,
            Numbered::ByDisk => guest / 512,
        };
        let what = format!("{cipher:?} at {guest}");
        let clear = vec![byte; index(CLUSTER)];
        let mut data = bytes(image, host, CLUSTER);
        assert_ne!(data, clear, "{what} is not encrypted");
        let theirs = data.clone();
        cipher.decrypt(first, &mut data);
        same(&what, &clear, &data);
        cipher.encrypt(first, &mut data);
        same(&what, &theirs, &data);
        let mut ours = vec![!byte; index(CLUSTER)];
        cipher.encrypt(first, &mut ours);
        poke(image, host, &ours);
    }
    let reads = PATTERNS.map(|(at, byte)| format!("read -P {} {at} {CLUSTER}", !byte));
    qemu_io(image, &reads);
}

fn luks_both_ways(options: &str) {
    let images = Images::new();
    let image = luks(&images, options);
    let key = unlock(&image, SECRET).unwrap_or_else(|error| panic!("{options}: {error}"));
    both_ways(&image, &SectorCipher::luks(&key).expect("a cipher"), Numbered::ByFile);
}

/// Every mode of a cipher whose key has any of these lengths, beginning with the IV generator and the
/// hash whose `turn` it is.
///
/// QEMU takes seconds for every image that it makes, so IV generators and hashes are not tried with
/// each of them but in turn. ECB has no initialization vector.
fn every_mode(cipher: &str, turn: usize) {
    let modes =
        ["128-xts", "128-cbc", "128-ctr", "192-xts", "256-xts", "256-cbc", "256-ctr", "256-ecb"];
    let ivs = ["plain64:sha1", "essiv:md5", "essiv:sha256", "plain:sha256", "essiv:sm3"];
    let hashes = ["sha512", "sha1", "md5", "sha224", "ripemd160", "sha256", "sm3", "sha384"];
    for (index, mode) in (turn..).zip(modes) {
        let (bits, mode) = mode.split_once('-').expect("a length and a mode");
        let (iv, iv_hash) = ivs[index % ivs.len()].split_once(':').expect("a generator and a hash");
        let hash = hashes[index % hashes.len()];
        luks_both_ways(&format!(
            ",encrypt.cipher-alg={cipher}-{bits},encrypt.cipher-mode={mode},encrypt.ivgen-alg={iv},\
             encrypt.ivgen-hash-alg={iv_hash},encrypt.hash-alg={hash}"
        ));
    }
}

#[test]
fn aes_in_every_mode_of_qemu_is_read_and_written() {
    every_mode("aes", 0);
}

#[test]
fn serpent_in_every_mode_of_qemu_is_read_and_written() {
    every_mode("serpent", 1);
}

#[test]
fn twofish_in_every_mode_of_qemu_is_read_and_written() {
    every_mode("twofish", 2);
}

#[test]
fn cast5_in_every_mode_of_qemu_is_read_and_written() {
    for (mode, iv) in [("cbc", "essiv"), ("ctr", "plain64"), ("ecb", "plain")] {
        luks_both_ways(&format!(
            ",encrypt.cipher-alg=cast5-128,encrypt.cipher-mode={mode},encrypt.ivgen-alg={iv},\
             encrypt.ivgen-hash-alg=md5"
        ));
    }
}

#[test]
fn an_image_with_qemus_default_options_opens() {
    let images = Images::new();
    let image = encrypted(&images, "encrypt.format=luks");
    let key = unlock(&image, SECRET).expect("unlock");
    assert_eq!(key.spec().to_string(), "aes-256 xts-plain64");
    both_ways(&image, &SectorCipher::luks(&key).expect("a cipher"), Numbered::ByFile);
}

#[test]
fn a_wrong_passphrase_is_a_wrong_key() {
    let images = Images::new();
    let image = luks(&images, "");
    for wrong in ["", "correct", "correct horse ", "Correct horse"] {
        let error = unlock(&image, wrong).expect_err("a wrong passphrase opened an image");
        assert!(matches!(error.problem(), Problem::WrongKey), "{error}");
        assert_eq!(error.kind(), Kind::Key);
    }
}

#[test]
fn a_slot_that_was_added_opens_and_one_that_was_erased_does_not() {
    let images = Images::new();
    let image = luks(&images, "");
    let amend = |options: &str| {
        let mut words = args!["amend"].to_vec();
        words.extend(secrets(&[SECRET, "second"]));
        words.extend(args!["-o", options, "--image-opts", opened(&image)]);
        run("qemu-img", &words);
    };
    amend("encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=1");
    for passphrase in [SECRET, "second"] {
        unlock(&image, passphrase).expect("unlock");
    }
    amend("encrypt.state=inactive,encrypt.old-secret=s1");
    unlock(&image, SECRET).expect("unlock");
    let error = unlock(&image, "second").expect_err("an erased slot opened an image");
    assert!(matches!(error.problem(), Problem::WrongKey), "{error}");
}

#[test]
fn legacy_aes_is_read_and_written() {
    let images = Images::new();
    let image = encrypted(&images, "encrypt.format=aes");
    assert_eq!(header(&image).crypt_method, CRYPT_AES);
    let cipher = SectorCipher::legacy_aes(SECRET.as_bytes()).expect("a cipher");
    both_ways(&image, &cipher, Numbered::ByDisk);
}
