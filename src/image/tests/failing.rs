//! Images on stores of which any operation may fail, reads and those of the backing file among them.

use super::kinds::{Data, KINDS, Kind};
use super::*;
use crate::error::{Doing, Problem};
use crate::image::pages::Pages;
use crate::store::fault::{FaultStore, Operation, Survivors};
use crate::units::HostOffset;
use checker::check;
use history::SECTOR;

/// An image before anything fails.
pub struct Subject {
    pub name: String,
    pub kind: Kind,
    pub image: Vec<u8>,
    pub data: Vec<u8>,
    backing: Vec<u8>,
    /// Without it nearly every look at a table is a read of its file.
    pub cache: Cache,
}

/// What is kept in memory of tables that have been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    Usual,
    TwoPages,
}

/// The files of an image that fail together.
pub struct Files {
    pub image: Arc<FaultStore>,
    pub data: Arc<FaultStore>,
    pub below: Backing,
}

/// A backing file that is a store.
pub struct Backing {
    store: FaultStore,
}

impl Below for Backing {
    fn read(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.store.read_at(buf, HostOffset::new(offset.get())).doing("read the backing file")
    }

    fn is_zero(&self, range: GuestRange) -> Result<bool> {
        let mut bytes = vec![1; range.len as usize];
        self.read(range.start, &mut bytes)?;
        Ok(bytes.iter().all(|&byte| byte == 0))
    }
}

const PLAIN: Kind = Kind {
    cluster_bits: 9,
    l2_form: L2Form::Standard,
    data: Data::Inside,
    encrypted: None,
    backing_len: 0,
};

impl Subject {
    /// An image of `shape`, which says all that a [`Kind`] does not.
    pub fn of_shape(shape: Shape, cache: Cache) -> Self {
        let kind = Kind { cluster_bits: shape.cluster_bits, l2_form: shape.l2_form, ..PLAIN };
        let name = format!("{shape:?}, {cache:?}");
        Self {
            name,
            kind,
            image: shape.create(),
            data: Vec::new(),
            backing: pattern(shape.backing_len),
            cache,
        }
    }

    /// An empty image of `kind` with a disk of `size` bytes.
    pub fn of_kind(kind: Kind, size: u64, cache: Cache) -> Self {
        let backing = pattern(kind.backing_len.min(size));
        let name = format!("{kind:?}, {cache:?}");
        Self { name, kind, image: kind.create(size), data: Vec::new(), backing, cache }
    }

    /// An image with a disk of `size` bytes in compressed clusters.
    pub fn compressed(size: u64, options: &str, kind: Kind, cache: Cache) -> Self {
        let disk: Vec<u8> = (0..size).map(|at| (at / 40) as u8 | 1).collect();
        let name = format!("compressed, {options}, {cache:?}");
        let backing = pattern(kind.backing_len.min(size));
        Self { name, kind, image: qemu::packed(&disk, options), data: Vec::new(), backing, cache }
    }

    /// An image of which the next few clusters need a longer refcount table.
    pub fn with_a_full_refcount_table(cache: Cache) -> Self {
        let shape = Shape {
            version: Version::V3,
            cluster_bits: 9,
            refcount_order: 6,
            l2_form: L2Form::Standard,
            size: 2 << 20,
            backing_len: 0,
        };
        let subject = Self::of_shape(shape, cache);
        let files = subject.files();
        let image = subject.open(&files);
        // 64 blocks with 64 counts each, of which tables take some.
        image.write(&files.below, GuestOffset::ZERO, &vec![7; 1890 << 10]).unwrap();
        image.flush_all().unwrap();
        drop(image);
        subject.after_power_cut(&files, Survivors::Nothing, "an image with a full table")
    }

    /// Images of every kind, a small one of each.
    pub fn all() -> Vec<Self> {
        let size = 64 << 10;
        let shape = |version, cluster_bits, refcount_order, backing_len| Shape {
            version,
            cluster_bits,
            refcount_order,
            l2_form: L2Form::Standard,
            size,
            backing_len,
        };
        let extended = Kind { cluster_bits: 14, l2_form: L2Form::Extended, ..PLAIN };
        let mut all = Vec::new();
        for cache in [Cache::Usual, Cache::TwoPages] {
            all.push(Self::of_shape(shape(Version::V2, 9, 4, 50_000), cache));
            all.push(Self::of_shape(shape(Version::V2, 10, 4, 0), cache));
            all.push(Self::of_shape(shape(Version::V3, 9, 4, 150_000), cache));
            all.push(Self::of_shape(shape(Version::V3, 9, 1, 60_000), cache));
            // Its refcounts fill more pages than the small cache has.
            let wide = Shape { size: 2 * size, ..shape(Version::V3, 9, 6, 30_000) };
            all.push(Self::of_shape(wide, cache));
            all.push(Self::of_shape(shape(Version::V3, 12, 6, 30_000), cache));
            let packed = "compat=0.10,cluster_size=4k";
            all.push(Self::compressed(size, packed, Kind { backing_len: 50_000, ..PLAIN }, cache));
            let packed = "cluster_size=16k,extended_l2=on";
            all.push(Self::compressed(size, packed, extended, cache));
            all.extend(KINDS.map(|kind| Self::of_kind(kind, 2 * size, cache)));
        }
        all
    }

    /// New files that hold what these do.
    pub fn files(&self) -> Files {
        let image = Arc::new(FaultStore::new(self.image.clone()));
        let data = Arc::new(image.beside(self.data.clone()));
        let below = Backing { store: image.beside(self.backing.clone()) };
        Files { image, data, below }
    }

    pub fn open(&self, files: &Files) -> Image {
        let (image, data) = (files.image.clone(), files.data.clone());
        let image = self.kind.open(image, data, Writability::Writable);
        if self.cache == Cache::TwoPages {
            let cluster_size = image.geometry().cluster_size();
            // A look at a snapshot needs two at a time: of its L1 table and of an L2 table.
            image.metadata().pages = Pages::new(cluster_size, 2 * cluster_size.min(4096));
        }
        image
    }

    /// The same image after some use, with up to two snapshots on the way where it can have any.
    pub fn used(&self, seed: u64, snapshots: usize) -> Self {
        let mut random = Random::new(seed);
        let files = self.files();
        let image = self.open(&files);
        for half in 0..2 {
            for _ in 0..8 {
                let change = Change::of_sectors(&mut random, image.size());
                change.apply_to_image(&image, &files.below).unwrap();
            }
            if half < snapshots && self.kind.data == Data::Inside {
                image.create_snapshot(["first", "second"][half]).unwrap();
            }
        }
        image.flush_all().unwrap();
        drop(image);
        let context = format!("{}, used with seed {seed}, {snapshots} snapshots", self.name);
        Self { name: context.clone(), ..self.after_power_cut(&files, Survivors::Nothing, &context) }
    }

    /// The same image with all of its disk written.
    pub fn filled(&self) -> Self {
        let files = self.files();
        let image = self.open(&files);
        let disk: Vec<u8> = (0..image.size()).map(|at| (at / 100) as u8 | 1).collect();
        image.write(&files.below, GuestOffset::ZERO, &disk).unwrap();
        image.flush_all().unwrap();
        drop(image);
        let name = format!("{}, filled", self.name);
        Self { name, ..self.after_power_cut(&files, Survivors::Nothing, &self.name) }
    }

    pub fn version(&self) -> Version {
        self.open(&self.files()).header().version
    }

    /// What is on the disk of an image that nothing has happened to.
    pub fn disk(&self) -> Vec<u8> {
        let files = self.files();
        read_all(&self.open(&files), &files.below)
    }

    /// What the snapshots hold.
    pub fn snapshots(&self) -> Vec<Vec<u8>> {
        let files = self.files();
        let image = self.open(&files);
        let read = |tree: &Arc<SnapshotTree>| read_snapshot(&image, tree, &files.below);
        image.snapshots().iter().map(read).collect()
    }

    /// The files as a power cut leaves them, which must be sound.
    pub fn after_power_cut(&self, files: &Files, survivors: Survivors, context: &str) -> Self {
        let image = files.image.after_power_cut(survivors);
        let data = files.data.after_power_cut(survivors);
        assert_eq!(check(&image).corruptions, Vec::<String>::new(), "{context}");
        Self { name: self.name.clone(), image, data, backing: self.backing.clone(), ..*self }
    }
}

/// The first `len` bytes of the [`Pattern`].
fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|at| Pattern { len }.byte(at)).collect()
}

impl Files {
    /// From now on all operations count, and that with this number fails, or all from it on.
    pub fn fail(&self, number: u64, length: Length) {
        self.image.count_reads();
        let first = self.image.operations() + number;
        let end = if length == Length::Once { first + 1 } else { u64::MAX };
        self.image.fail(first..end);
    }

    pub fn fail_no_more(&self) {
        self.image.fail(u64::MAX..u64::MAX);
    }

    /// What has failed.
    pub fn failed(&self) -> Option<Operation> {
        self.image.failed()
    }
}

/// For how long a store fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    Once,
    ForEver,
}

/// What each sector of a disk may hold while operations fail.
pub struct Outcomes {
    /// As it reads.
    now: Vec<Vec<u8>>,
    /// After a power cut.
    durable: Vec<Vec<u8>>,
}

impl Outcomes {
    pub fn new(disk: Vec<u8>) -> Self {
        Self { now: vec![disk.clone()], durable: vec![disk] }
    }

    /// `change` was made, or was told to have failed: then it may be there in part.
    pub fn after(&mut self, change: Change, done: &Result<()>) {
        match done {
            Ok(()) if matches!(change, Change::Flush) => return self.durable.clone_from(&self.now),
            Ok(()) => self.now.iter_mut().for_each(|disk| change.apply_to_model(disk)),
            Err(error) if matches!(error.problem(), Problem::ClosedForWriting) => return,
            Err(_) => {
                let mut next = self.now[self.now.len() - 1].clone();
                change.apply_to_model(&mut next);
                self.now.push(next);
            }
        }
        self.durable.extend(self.now.iter().cloned());
    }

    /// The disk got another size, or was told not to; what is new reads as zero.
    pub fn resized(&mut self, size: u64, done: &Result<()>) {
        let resized = |disk: &Vec<u8>| {
            let mut disk = disk.clone();
            disk.resize(size as usize, 0);
            disk
        };
        let new: Vec<_> = self.now.iter().map(resized).collect();
        match done {
            Ok(()) => (self.now, self.durable) = (new.clone(), new),
            Err(_) => {
                self.now.extend(new.iter().cloned());
                self.durable.extend(new);
            }
        }
    }

    /// Only disks of `size` bytes are left: that is what it has been found to have.
    pub fn has_size(&mut self, size: usize) {
        self.now.retain(|disk| disk.len() == size);
    }

    pub fn assert_now(&self, found: &[u8], context: &str) {
        assert_sectors_of(&self.now, found, context);
    }

    pub fn assert_durable(&self, found: &[u8], context: &str) {
        assert_sectors_of(&self.durable, found, context);
    }
}

/// Panics unless each sector of `found` is that of one of `disks`.
pub fn assert_sectors_of(disks: &[Vec<u8>], found: &[u8], context: &str) {
    assert!(disks.iter().any(|disk| disk.len() == found.len()), "{context}: {} bytes", found.len());
    for (number, sector) in found.chunks(SECTOR).enumerate() {
        let at = number * SECTOR;
        assert!(
            disks.iter().any(|disk| disk.get(at..at + sector.len()) == Some(sector)),
            "{context}: the sector at {at} (now {:#x}) is neither old nor new",
            sector[0]
        );
    }
}
