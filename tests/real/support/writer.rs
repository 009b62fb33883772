//! A mounted active layer together with the bytes that it must hold.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::images::is_clean;
use super::keys::Opening;
use super::mounted::Mounted;
use super::random::Random;
use super::{index, oracle};

/// Writes to a mount and to a plain vector alike.
pub struct Writer {
    // Closed before the mount ends: fields are dropped in this order.
    file: File,
    mounted: Mounted,
    image: Opening,
    bytes: Vec<u8>,
}

impl Writer {
    /// Mounts `image` read-write. It must then hold what QEMU read from it before.
    #[track_caller]
    pub fn open(image: &Path) -> Self {
        Self::open_with_keys(&Opening::new(image, None, None))
    }

    /// As [`Writer::open`], with the keys of the image's chain.
    #[track_caller]
    pub fn open_with_keys(image: &Opening) -> Self {
        let bytes = oracle::converted(&image.words());
        let mounted = Mounted::with(&image.our_options(), image.path());
        let disk = File::options().read(true).write(true).open(mounted.disk());
        let file = disk.expect("open the active layer for writing");
        Self { file, mounted, image: image.clone(), bytes }
    }

    /// The mount.
    pub fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// The active layer.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What the active layer must hold.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What the active layer must hold, after a test has written it by other means.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Writes `data` at `offset`.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.file.write_all_at(data, offset).expect("pwrite");
        self.expected(offset, data.len() as u64).copy_from_slice(data);
    }

    /// Writes `len` times the same byte.
    #[track_caller]
    pub fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        self.write(offset, &vec![byte; index(len)]);
    }

    /// Writes a few runs of random bytes, on and off the borders of clusters.
    #[track_caller]
    pub fn scribble(&mut self, random: &mut Random, count: usize) {
        let size = self.bytes.len() as u64;
        for _ in 0..count {
            let (offset, len) = random.range(size, size / 8);
            let data = random.bytes(index(len));
            self.write(offset, &data);
        }
    }

    /// Punches a hole.
    #[track_caller]
    pub fn punch(&mut self, offset: u64, len: u64) {
        self.try_punch(offset, len).expect("punch a hole");
        self.expected(offset, len).fill(0);
    }

    /// Punches a hole where that may be refused; expects no change.
    pub fn try_punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, mode, offset.cast_signed(), len.cast_signed())?)
    }

    /// Zeroes a range.
    #[track_caller]
    pub fn zero(&mut self, offset: u64, len: u64) {
        let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, mode, offset.cast_signed(), len.cast_signed()).expect("zero a range");
        self.expected(offset, len).fill(0);
    }

    /// Puts everything on stable storage.
    #[track_caller]
    pub fn sync(&self) {
        self.file.sync_all().expect("fsync");
    }

    /// Panics unless the mount shows what was written.
    #[track_caller]
    pub fn reads_back(&self) {
        let found = oracle::read_at(&self.file, 0, self.bytes.len() + 1);
        oracle::same("the mounted active layer", &self.bytes, &found);
    }

    /// Unmounts. The image must then be without error or leak, and QEMU must read what was written.
    #[track_caller]
    pub fn close(self) {
        self.reads_back();
        drop(self.file);
        self.mounted.umount();
        is_clean(&self.image.words());
        let found = oracle::converted(&self.image.words());
        oracle::same("what QEMU reads from the image", &self.bytes, &found);
    }

    fn expected(&mut self, offset: u64, len: u64) -> &mut [u8] {
        &mut self.bytes[index(offset)..index(offset + len)]
    }
}
