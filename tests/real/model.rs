//! Random operations through the mount, against a plain vector and against a twin that `qemu-io`
//! writes.

use std::path::{Path, PathBuf};

use crate::support::images::{Images, Untouched, allocated, io, paint, snapshot};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, read_at, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, run};
use crate::support::writer::Writer;
use crate::support::{K, M, index};

/// What can happen to a disk.
#[derive(Debug, Clone, Copy)]
enum Operation {
    Write { offset: u64, len: u64, byte: u8 },
    Punch { offset: u64, len: u64 },
    Zero { offset: u64, len: u64 },
    Sync,
}

impl Operation {
    fn random(random: &mut Random, size: u64) -> Self {
        let (offset, len) = random.range(size, (size / 6).clamp(1, 300 * K));
        match random.below(20) {
            0..11 => Self::Write { offset, len, byte: 1 + (random.below(255) as u8) },
            11..15 => Self::Punch { offset, len },
            15..18 => Self::Zero { offset, len },
            _ => Self::Sync,
        }
    }

    fn apply(self, writer: &mut Writer) {
        match self {
            Self::Write { offset, len, byte } => writer.fill(offset, len, byte),
            Self::Punch { offset, len } => writer.punch(offset, len),
            Self::Zero { offset, len } => writer.zero(offset, len),
            Self::Sync => writer.sync(),
        }
    }

    /// The same in the language of `qemu-io`, where a discard would leave parts of clusters as they
    /// are.
    fn for_qemu(self) -> String {
        match self {
            Self::Write { offset, len, byte } => format!("write -P {byte} {offset} {len}"),
            Self::Punch { offset, len } => format!("write -z -u {offset} {len}"),
            Self::Zero { offset, len } => format!("write -z {offset} {len}"),
            Self::Sync => "flush".into(),
        }
    }
}

/// Two images that are equal, what lies below them, and what to make of them.
struct Twins {
    images: Images,
    ours: PathBuf,
    twin: PathBuf,
    below: Vec<PathBuf>,
    size: u64,
    kind: Kind,
    with_snapshots: bool,
}

/// Where the twins keep their data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Clusters,
    Subclusters,
    DataFile,
    SubclustersOfDataFile,
    RawDataFile,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::Clusters,
        Self::Subclusters,
        Self::DataFile,
        Self::SubclustersOfDataFile,
        Self::RawDataFile,
    ];

    /// The options of `qemu-img create` that make it for an image named `name`.
    fn options(self, images: &Images, name: &str) -> String {
        let data = format!("data_file={}", images.path(&format!("{name}.data")).display());
        match self {
            Self::Clusters => String::new(),
            Self::Subclusters => ",extended_l2=on".into(),
            Self::DataFile => format!(",{data}"),
            Self::SubclustersOfDataFile => format!(",extended_l2=on,{data}"),
            Self::RawDataFile => format!(",data_file_raw=on,{data}"),
        }
    }
}

impl Twins {
    fn random(random: &mut Random) -> Self {
        let images = Images::new();
        let size = 512 * (1 + random.below(12 * K));
        let kind = random.pick(&[[Kind::Clusters; 5], Kind::ALL].concat());
        let cluster = match kind {
            Kind::Subclusters | Kind::SubclustersOfDataFile => random.pick(&["16k", "64k", "512k"]),
            _ => random.pick(&["512", "4k", "64k", "64k", "512k", "2M"]),
        };
        let compat = match kind {
            Kind::Clusters => random.pick(&["0.10", "1.1", "1.1"]),
            _ => "1.1",
        };
        let bits = if compat == "0.10" { 16 } else { random.pick(&[1, 2, 4, 8, 16, 16, 32, 64]) };
        let mut options = format!("compat={compat},cluster_size={cluster},refcount_bits={bits}");
        if kind == Kind::Clusters && compat == "1.1" {
            options += random.pick(&["", ",lazy_refcounts=on", ",compression_type=zstd"]);
        }
        let base = match kind {
            // It has to be readable by itself.
            Kind::RawDataFile => None,
            _ => Self::base(&images, random, size),
        };
        if kind == Kind::Clusters && base.is_none() {
            options += random.pick(&["", ",preallocation=metadata", ",preallocation=full"]);
        }
        eprintln!("{size} bytes, {kind:?}, {options}, over {base:?}");
        let create = |name: &str| {
            let options = options.clone() + &kind.options(&images, name);
            match &base {
                Some(base) => images.overlay_sized(name, base, size, &options),
                None => images.create(name, size, &options),
            }
        };
        let (ours, twin) = (create("ours.qcow2"), create("twin.qcow2"));
        if random.below(2) == 0 {
            // Warm: in use before we come.
            let script: Vec<_> =
                (0..20).map(|_| Operation::random(random, size).for_qemu()).collect();
            io(&ours, &script);
            io(&twin, &script);
        }
        let below = base.iter().map(|name| images.path(name)).collect();
        // Two bits can't count a disk and three snapshots.
        let with_snapshots = bits > 2 && matches!(kind, Kind::Clusters | Kind::Subclusters);
        Self { images, ours, twin, below, size, kind, with_snapshots }
    }

    /// The name of a base image of one of several kinds, as long as the disk, shorter or longer.
    fn base(images: &Images, random: &mut Random, size: u64) -> Option<String> {
        let len = 512 * (1 + random.below(2 * size / 512));
        match random.below(4) {
            0 => None,
            1 => {
                images.raw("base.raw", &random.bytes(index(len)));
                Some("base.raw".into())
            }
            2 => {
                let base = images.create("base.qcow2", len, "");
                paint(&base, random, len, 10);
                Some("base.qcow2".into())
            }
            _ => {
                let source = images.raw("source.raw", &random.bytes(64).repeat(index(len) / 64));
                let packed = images.path("packed.qcow2");
                run("qemu-img", &args!["convert", "-c", "-O", "qcow2", source, packed]);
                Some("packed.qcow2".into())
            }
        }
    }

    /// Mounts, does the same to both and to the vector, reads at random on the way, unmounts and
    /// compares all three.
    fn round(&self, random: &mut Random, operations: usize) {
        let mut writer = Writer::open(&self.ours);
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
        let expected = writer.bytes().to_vec();
        writer.close();
        io(&self.twin, &script);
        same("the twin", &expected, &bytes_of(&self.twin));
        if self.kind == Kind::RawDataFile {
            let raw = std::fs::read(self.images.path("ours.qcow2.data")).expect("read a data file");
            // QEMU makes it whole clusters long.
            same("the data file by itself", &expected, &raw[..expected.len().min(raw.len())]);
        }
        self.is_not_bloated();
    }

    /// Freed clusters are used again: ours may not need much more than QEMU's.
    fn is_not_bloated(&self) {
        let (ours, twin) = (allocated(&self.ours), allocated(&self.twin));
        assert!(ours <= 2 * twin + 2 * M, "ours takes {ours} bytes, its twin {twin}");
    }

    fn snapshot(&self, name: &str) {
        snapshot(&self.ours, name);
        snapshot(&self.twin, name);
    }

    fn has_equal_snapshots(&self, names: &[String]) {
        for name in names {
            let [ours, twin] =
                [&self.ours, &self.twin].map(|image: &PathBuf| bytes_of_snapshot(image, name));
            same(name, &twin, &ours);
        }
    }

    /// QEMU's own comparison, which also looks at what is allocated where it can.
    fn qemu_finds_them_equal(&self) {
        let names: [&Path; 2] = [&self.ours, &self.twin];
        run("qemu-img", &args!["compare", "-q", names[0], names[1]]);
    }
}

fn random_operations(seed: u64, rounds: usize, operations: usize) {
    let mut random = Random::new(seed);
    let twins = Twins::random(&mut random);
    let untouched = Untouched::now(&twins.below);
    let mut snapshots = Vec::new();
    for round in 0..rounds {
        twins.round(&mut random, operations);
        twins.has_equal_snapshots(&snapshots);
        if twins.with_snapshots && random.below(3) > 0 {
            snapshots.push(format!("after round {round}"));
            twins.snapshot(&snapshots[snapshots.len() - 1]);
        }
    }
    twins.qemu_finds_them_equal();
    untouched.verify();
    drop(twins.images);
}

#[test]
fn random_operations_leave_what_a_vector_and_qemu_hold() {
    for seed in seeds(8) {
        random_operations(seed, 3, 40);
    }
}

#[test]
fn a_long_run_of_random_operations_leaves_what_a_vector_and_qemu_hold() {
    for seed in seeds(2) {
        random_operations(1000 + seed, 2, 250);
    }
}
