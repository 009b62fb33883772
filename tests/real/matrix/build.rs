//! Makes the images of the matrix, and remembers what QEMU read from them at each moment.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::shape::Dimension::{
    Below, Cluster, Compression, Data, Encryption, Erased, L2, Length, Preallocation, Refcount,
    Snapshots, Version,
};
use super::shape::Shape;
use crate::support::images::{Images, format_of, poke};
use crate::support::keys::{Key, Opening};
use crate::support::oracle::converted;
use crate::support::random::Random;
use crate::support::tools::{args, run};
use crate::support::{K, M, index};

/// A member of a chain of the matrix.
pub struct Member {
    /// How QEMU opens it.
    pub opening: Opening,
    /// What it is like, if it is a qcow2 image.
    pub shape: Option<Shape>,
    /// All files that belong to it.
    pub files: Vec<PathBuf>,
    /// What QEMU reads from it.
    pub bytes: Vec<u8>,
    /// What QEMU read from it when its snapshots were made.
    pub snapshots: Vec<(&'static str, Vec<u8>)>,
}

impl Member {
    pub fn path(&self) -> &Path {
        self.opening.path()
    }

    /// Bytes in a cluster, or in a block of a raw file's file system.
    pub fn cluster(&self) -> u64 {
        self.shape.as_ref().map_or(4 * K, cluster)
    }
}

fn cluster(shape: &Shape) -> u64 {
    let digits = shape[Cluster].trim_end_matches(['k', 'M']);
    let unit = match &shape[Cluster][digits.len()..] {
        "k" => K,
        "M" => M,
        _ => 1,
    };
    unit * digits.parse::<u64>().expect("a number")
}

/// Where a chain is made.
pub struct Workshop<'a> {
    images: Images,
    random: &'a mut Random,
    /// Files of bytes to write; the later half compresses.
    patterns: Vec<PathBuf>,
}

impl<'a> Workshop<'a> {
    pub fn new(random: &'a mut Random) -> Self {
        let images = Images::new();
        let patterns = (0..8)
            .map(|number| {
                let len = 20_000 + index(random.below(200_000));
                let noise = random.bytes(len);
                let bytes = if number < 4 { noise } else { compressible(&noise, random) };
                images.raw(&format!("{number}.pattern"), &bytes)
            })
            .collect();
        Self { images, random, patterns }
    }

    /// The directory of all files.
    pub fn into_images(self) -> Images {
        self.images
    }

    /// Makes a chain of these shapes; the members are given from the top down.
    pub fn chain(&mut self, shapes: &[Shape]) -> Vec<Member> {
        let mut members: Vec<Member> = Vec::new();
        if shapes[0][Below] == "raw" {
            members.push(self.raw());
        }
        for shape in shapes {
            let member = self.member(shape, members.last(), members.len());
            members.push(member);
        }
        members.reverse();
        members
    }

    /// A raw file with holes that need not end with a sector.
    fn raw(&mut self) -> Member {
        let path = self.images.raw("0.raw", &[]);
        let len = M + self.random.below(3 * M);
        File::options().write(true).open(&path).and_then(|f| f.set_len(len)).expect("lengthen");
        let opening = Opening::new(&path, None, None);
        self.painter(&opening).paint(len, "not");
        let bytes = bytes_of(&opening);
        Member { files: vec![path], opening, shape: None, bytes, snapshots: Vec::new() }
    }

    fn member(&mut self, shape: &Shape, below: Option<&Member>, number: usize) -> Member {
        let path = self.images.path(&format!("{number}.qcow2"));
        let size = self.size(shape, below.map(|below| below.bytes.len() as u64));
        let key = (shape[Encryption] != "none")
            .then(|| Key::make(self.images.path(&format!("key-{number}"))));
        let image = &Opening::new(&path, key.clone(), below.map(|below| &below.opening));
        let mut options = options_of(shape);
        let mut files = vec![path.clone()];
        if shape[Data] != "inside" {
            let data = self.images.path(&format!("{number}.data"));
            let raw = if shape[Data] == "external raw" { "on" } else { "off" };
            options += &format!(",data_file_raw={raw},data_file={}", data.display());
            files.push(data);
        }
        if let Some(key) = &key {
            options += &format!(",{},encrypt.key-secret={}", self.cipher(shape), key.id());
        }
        create(image, size, &options, below);
        if shape[Compression].ends_with("convert") {
            let source = self.images.path("source.qcow2");
            let source = &Opening::new(&source, None, below.map(|below| &below.opening));
            create(source, size, "compat=1.1", below);
            self.painter(source).paint(size, shape[Erased]);
            let base = below.map_or(Vec::new(), |below| args!["-B", below.path()].to_vec());
            let words = [&args!["convert", "-n", "-c", "--target-image-opts"][..], &base].concat();
            source.img(&words, &args![image.options()]);
        } else if shape[Compression] != "none" {
            self.painter(image).compress(size, cluster(shape));
        }
        self.painter(image).paint(size, shape[Erased]);
        let snapshots = self.snapshots(shape, image, size);
        let bytes = bytes_of(image);
        Member { opening: image.clone(), shape: Some(shape.clone()), files, bytes, snapshots }
    }

    /// Options for a cipher. That of LUKS is drawn and no dimension, since QEMU measures the speed of the host for
    /// seconds before it makes such an image.
    fn cipher(&mut self, shape: &Shape) -> String {
        let options = match shape[Encryption] {
            "luks" => self.random.pick(LUKS),
            _ => "",
        };
        format!("encrypt.format={}{options}", shape[Encryption])
    }

    /// The size of a disk over one of `below` bytes.
    fn size(&mut self, shape: &Shape, below: Option<u64>) -> u64 {
        let cluster = cluster(shape);
        let below = below.unwrap_or_else(|| 512 * (1 + self.random.below(6 * K)));
        let other = match shape[Length].rsplit(' ').next() {
            Some("shorter") => 1 + self.random.below(below),
            Some("longer") => below + 1 + self.random.below(2 * M),
            _ => return below,
        };
        let whole = other.next_multiple_of(cluster);
        let part = |random: &mut Random| 512 * (1 + random.below(cluster / 512 - 1));
        match shape[Length] {
            "odd shorter" => whole - part(self.random),
            "odd longer" => whole + part(self.random),
            _ => whole,
        }
    }

    /// Makes the snapshots of a shape and changes the disk after each.
    fn snapshots(
        &mut self,
        shape: &Shape,
        image: &Opening,
        size: u64,
    ) -> Vec<(&'static str, Vec<u8>)> {
        let mut taken = Vec::new();
        let mut take = |name: &'static str| {
            image.snapshot(name);
            taken.push((name, bytes_of(image)));
        };
        let mut after = size;
        match shape[Snapshots] {
            "none" => return taken,
            "one" => take("one"),
            "two" => {
                take("7");
                self.painter(image).paint(size, shape[Erased]);
                take("a later one");
            }
            "grown" => {
                take("small");
                after = size + 512 * (1 + self.random.below(4 * K));
                image.resize(after);
            }
            "shrunk" => {
                take("large");
                after = 512 * (1 + self.random.below(size / 512));
                image.resize(after);
            }
            "VM state" => taken.push(("with VM state", with_vm_state(shape, image, size))),
            other => panic!("snapshots: {other}"),
        }
        self.painter(image).paint(after, shape[Erased]);
        taken
    }

    fn painter<'b>(&'b mut self, image: &'b Opening) -> Painter<'b> {
        Painter { image, random: self.random, patterns: &self.patterns }
    }
}

/// What the ciphers of LUKS images are.
const LUKS: &[&str] = &[
    ",encrypt.iter-time=10",
    ",encrypt.iter-time=10,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,\
     encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    ",encrypt.iter-time=10,encrypt.cipher-alg=serpent-256,encrypt.hash-alg=sha512",
    ",encrypt.iter-time=10,encrypt.cipher-alg=twofish-128,encrypt.cipher-mode=ctr,\
     encrypt.ivgen-alg=plain",
];

/// What `qemu-img -o` is told about the file itself.
fn options_of(shape: &Shape) -> String {
    let method = match shape[Compression].split_once(' ') {
        Some((method, _)) => method,
        None if shape[Compression] == "none" => "zlib",
        None => shape[Compression],
    };
    format!(
        "compat={},cluster_size={},refcount_bits={},extended_l2={},preallocation={},\
         compression_type={method}",
        shape[Version], shape[Cluster], shape[Refcount], shape[L2], shape[Preallocation]
    )
}

fn create(image: &Opening, size: u64, options: &str, below: Option<&Member>) {
    let words = args!["create", "-q", "-f", "qcow2", "-o", options];
    let backing = below.map_or(Vec::new(), |below| {
        args!["-b", below.path(), "-F", format_of(below.path())].to_vec()
    });
    let place = args![image.path(), size.to_string()];
    run("qemu-img", &[&words[..], &image.objects(), &backing, &place].concat());
}

/// What QEMU reads.
fn bytes_of(image: &Opening) -> Vec<u8> {
    converted(&image.words())
}

/// Gives an image a snapshot like that of a running machine, whose state lies behind the disk where
/// no L2 table of the disk reaches.
fn with_vm_state(shape: &Shape, image: &Opening, size: u64) -> Vec<u8> {
    let cluster = cluster(shape);
    let entry_len = if shape[L2] == "on" { 16 } else { 8 };
    let state = size.next_multiple_of(cluster / entry_len * cluster);
    let state_len = cluster + 512;
    let disk = bytes_of(image);
    image.resize(state + state_len);
    image.io(&[format!("write -P 0xee {state} {state_len}")]);
    image.snapshot("with VM state");
    image.resize(size);

    let image = image.path();
    let file = fs::read(image).expect("read an image");
    let number = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().expect("eight bytes"));
    let entry = number(64);
    poke(image, entry + 32, &u32::try_from(state_len).expect("a short state").to_be_bytes());
    poke(image, entry + 40, &state_len.to_be_bytes());
    poke(image, entry + 48, &size.to_be_bytes());
    disk
}

/// Noise in parts, so that clusters shrink to lengths of all kinds.
fn compressible(noise: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = noise.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let len = 1 + index(random.below(900));
        let end = (at + len).min(bytes.len());
        bytes[at..end].fill(random.any() as u8);
        at = end + index(random.below(700));
    }
    bytes
}

/// Writes to an image by QEMU.
struct Painter<'a> {
    image: &'a Opening,
    random: &'a mut Random,
    patterns: &'a [PathBuf],
}

impl Painter<'_> {
    /// Compresses runs of clusters; none of them twice, since QEMU doesn't write compressed clusters
    /// over others.
    fn compress(&mut self, size: u64, cluster: u64) {
        let mut commands = Vec::new();
        let step = (size / cluster / 6).max(1);
        let mut at = cluster * self.random.below(2);
        while at < size {
            let len = (cluster * (1 + self.random.below(step))).min(size - at);
            let pattern = self.pattern(4..8);
            commands.push(format!("write -c -s {pattern} {at} {len}"));
            at += len + cluster * self.random.below(step);
        }
        self.image.io(&commands);
    }

    /// Writes runs of bytes, erases some and writes again.
    fn paint(&mut self, size: u64, erased: &str) {
        let mut commands = Vec::new();
        for round in 0..10 {
            let (offset, len) = self.random.range(size, size / 8);
            commands.push(match (round, erased) {
                (4..8, "zeroed") => format!("write -z {offset} {len}"),
                (4..8, "unmapped") => format!("write -z -u {offset} {len}"),
                (4..8, "discarded") => format!("discard {offset} {len}"),
                _ => format!("write -s {} {offset} {len}", self.pattern(0..8)),
            });
        }
        self.image.io(&commands);
    }

    fn pattern(&mut self, among: Range<usize>) -> String {
        self.random.pick(&self.patterns[among].iter().collect::<Vec<_>>()).display().to_string()
    }
}
