//! Two equal images of any kind: ours is written through a mount, its twin by QEMU.

use std::fs;
use std::path::PathBuf;

use super::Operation;
use crate::cli_check;
use crate::matrix::build::{Member, Workshop};
use crate::matrix::shape::Dimension::{Compression, Data, Encryption, L2, Refcount, Version};
use crate::matrix::shape::{Counted, Shape, cover};
use crate::support::images::{Images, Untouched, allocated};
use crate::support::keys::Opening;
use crate::support::oracle::{converted, holds, read_at, same};
use crate::support::random::Random;
use crate::support::tools::{args, qchainfs, run};
use crate::support::writer::Writer;
use crate::support::{K, M, index};

/// The shapes of a chain; with the numbers from 0 on, every legal pair of values occurs in a top image, again and again.
pub fn chain(mut number: u64) -> Vec<Shape> {
    for round in 0.. {
        let chains = cover(&mut Random::fixed(round), Counted::Top);
        match chains.get(index(number)) {
            Some(shapes) => return shapes.clone(),
            None => number -= chains.len() as u64,
        }
    }
    unreachable!("the rounds do not end")
}

/// The twins, and what they must hold.
pub struct Twins {
    ours: Opening,
    twin: Opening,
    shape: Shape,
    size: u64,
    /// The internal snapshots that both have.
    snapshots: Vec<(String, Vec<u8>)>,
    below: Untouched,
    images: Images,
}

impl Twins {
    /// Makes a chain of these shapes, of which the last is doubled.
    pub fn of(shapes: &[Shape], random: &mut Random) -> Self {
        for shape in shapes {
            eprintln!("{shape}");
        }
        let mut workshop = Workshop::new(random);
        let mut members = workshop.chain(shapes);
        let images = workshop.into_images();
        let below: Vec<PathBuf> = members[1..].iter().flat_map(|m| m.files.clone()).collect();
        let Member { opening, files, bytes, snapshots, .. } = members.swap_remove(0);
        let shape = shapes[shapes.len() - 1].clone();
        // A bit of the header that is not worth a dimension.
        let lazy = shape[Version] != "0.10" && random.below(4) == 0;
        let double = |name: &str| {
            let copy = images.path(&format!("{name}.qcow2"));
            run("cp", &args![files[0], copy]);
            let copy = opening.copied_to(&copy);
            if let Some(data) = files.get(1) {
                let data_copy = images.path(&format!("{name}.data"));
                run("cp", &args![data, data_copy]);
                copy.img(&args!["amend", "-o", format!("data_file={}", data_copy.display())], &[]);
            }
            if lazy {
                copy.img(&args!["amend", "-o", "lazy_refcounts=on"], &[]);
            }
            copy
        };
        let (ours, twin) = (double("ours"), double("twin"));
        // Nobody may touch these any more, least of all through a wrong name.
        files.iter().for_each(|file| fs::remove_file(file).expect("remove what was doubled"));
        let snapshots = snapshots.into_iter().map(|(name, bytes)| (name.into(), bytes)).collect();
        let below = Untouched::now(&below);
        Self { ours, twin, shape, size: bytes.len() as u64, snapshots, below, images }
    }

    /// Mounts, does the same to both and to the vector, reads at random on the way, unmounts and
    /// compares all three.
    pub fn round(&self, random: &mut Random, operations: usize) {
        let mut writer = Writer::open_with_keys(&self.ours);
        let mut script = Vec::new();
        for _ in 0..operations {
            let operation = Operation::random(random, self.size);
            operation.apply(&mut writer);
            script.push(operation.for_qemu());
            let (offset, len) = random.range(self.size, 64 * K);
            let found = read_at(writer.file(), offset, index(len));
            let expected = &writer.bytes()[index(offset)..index(offset + len)];
            same(&format!("at {offset}, after {operation:?}"), expected, &found);
        }
        for (name, bytes) in &self.snapshots {
            holds(&writer.mounted().path(&format!("snapshots/{name}/disk.raw")), bytes);
        }
        let expected = writer.bytes().to_vec();
        writer.close();
        cli_check::says_the_same(&self.ours.words(), self.ours.path());
        self.twin.io(&script);
        same("the twin", &expected, &converted(&self.twin.words()));
        if self.shape[Data] == "external raw" && !self.is_encrypted() {
            let raw = fs::read(self.images.path("ours.data")).expect("read a data file");
            // QEMU makes it whole clusters long.
            same("the data file by itself", &expected, &raw[..expected.len().min(raw.len())]);
        }
        for (name, bytes) in &self.snapshots {
            // QEMU knows no other size than that of the active disk.
            let found = converted(&[&args!["-l", name][..], &self.ours.words()].concat());
            let both = found.len().min(bytes.len());
            same(&format!("snapshot {name}"), &bytes[..both], &found[..both]);
        }
        self.is_not_bloated();
    }

    /// What else happens to an image from one mount to the next.
    pub fn between(&mut self, random: &mut Random, round: usize) {
        if self.takes_snapshots() && random.below(3) > 0 {
            let name = format!("after round {round}");
            self.ours.snapshot(&name);
            self.twin.snapshot(&name);
            self.snapshots.push((name, converted(&self.ours.words())));
        }
        if self.has_any_size() && random.below(3) == 0 {
            self.resize(512 * (1 + random.below(2 * self.size / 512)).min(12 * K));
        }
        if random.below(3) == 0 {
            // QEMU's discards leave parts of clusters as they are, which is as good for both.
            let (offset, len) = random.range(self.size, self.size);
            let mut script = vec![format!("discard {offset} {len}")];
            script.extend((0..8).map(|_| Operation::random(random, self.size).for_qemu()));
            self.ours.io(&script);
            self.twin.io(&script);
            self.hold_the_same(&format!("QEMU did {script:?}"));
        }
    }

    fn hold_the_same(&self, after: &str) {
        let [ours, twin] = [&self.ours, &self.twin].map(|image| converted(&image.words()));
        same(&format!("the twin after {after}"), &ours, &twin);
    }

    fn resize(&mut self, size: u64) {
        let mut words = args!["resize", "-q", "--shrink"].to_vec();
        words.extend(self.ours.our_options());
        words.extend(args![self.ours.path(), size.to_string()]);
        qchainfs(&words).ok();
        cli_check::says_the_same(&self.ours.words(), self.ours.path());
        self.twin.resize(size);
        if let Some(new) = size.checked_sub(self.size).filter(|&new| new > 0) {
            // QEMU brings back what a larger disk once had in the last cluster.
            self.twin.io(&[format!("write -z {} {new}", self.size)]);
        }
        self.size = size;
        self.hold_the_same(&format!("resized to {size}"));
    }

    /// Panics unless both hold the same to the end, and what is below them is as it was.
    pub fn are_equal(self) {
        let words = args!["compare", "-q"];
        let both = [self.ours.image().to_vec(), args![self.twin.options()].to_vec()].concat();
        run("qemu-img", &[&words[..], &self.ours.objects(), &both].concat());
        self.below.verify();
    }

    /// Freed clusters are used again: ours may not need much more than QEMU's.
    fn is_not_bloated(&self) {
        let (ours, twin) = (allocated(self.ours.path()), allocated(self.twin.path()));
        assert!(ours <= 2 * twin + 2 * M, "ours takes {ours} bytes, its twin {twin}");
    }

    fn is_encrypted(&self) -> bool {
        self.shape[Encryption] != "none"
    }

    /// Whether refcounts have room for three more snapshots, and what else QEMU asks for.
    fn takes_snapshots(&self) -> bool {
        let wide: &[&str] = match self.shape[Compression] {
            "none" => &["4", "8", "16", "32", "64"],
            // One host cluster may have many compressed ones.
            _ => &["16", "32", "64"],
        };
        self.shape[Data] == "inside" && wide.contains(&self.shape[Refcount])
    }

    /// Whether both programs give it another size.
    fn has_any_size(&self) -> bool {
        // Entries of snapshots in version 2 don't know their size.
        let fixed = self.shape[Version] == "0.10" && !self.snapshots.is_empty();
        // QEMU does not zero parts of compressed clusters.
        let in_parts = self.shape[Compression] != "none" && self.shape[L2] == "on";
        // QEMU takes what a new part of the file has for encrypted.
        let noise = self.shape[Data] == "external raw" && self.is_encrypted();
        !fixed && !in_parts && !noise
    }
}
