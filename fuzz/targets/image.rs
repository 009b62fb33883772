//! A whole image: open it, look at all of it, read some of it, write to it if that is allowed.
#![no_main]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use qchainfs::image::{
    Companions, GuestCipher, Image, Nothing, SectorNumbering, Tree, Writability, ZeroMode,
};
use qchainfs::qcow2::encryption::SectorCipher;
use qchainfs::store::Store;
use qchainfs::units::{GuestOffset, GuestRange, HostOffset};

/// More than that is not looked at: a hostile image may claim exabytes of holes.
const MAX_RUNS: usize = 200;
/// No image may make us write more than that.
const MAX_LEN: u64 = 16 << 20;

struct Bytes(Mutex<Vec<u8>>);

impl Store for Bytes {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("no panic before").len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        let bytes = self.0.lock().expect("no panic before");
        let start = (offset.get() as usize).min(bytes.len());
        let len = buf.len().min(bytes.len() - start);
        buf[..len].copy_from_slice(&bytes[start..start + len]);
        buf[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        let data = pieces.concat();
        let end = offset.get().saturating_add(data.len() as u64);
        if end > MAX_LEN {
            return Err(io::ErrorKind::StorageFull.into());
        }
        assert!(offset.get() >= 16, "the magic and the version are never written");
        let mut bytes = self.0.lock().expect("no panic before");
        if bytes.len() < end as usize {
            bytes.resize(end as usize, 0);
        }
        bytes[offset.get() as usize..end as usize].copy_from_slice(&data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > MAX_LEN {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.lock().expect("no panic before").resize(len as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().expect("no panic before");
        let start = (offset.get() as usize).min(bytes.len());
        let end = start.saturating_add(len as usize).min(bytes.len());
        bytes[start..end].fill(0);
        Ok(())
    }

    fn reserve(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        match offset.get().checked_add(len) {
            Some(end) if end <= MAX_LEN => Ok(()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((from.get() < len).then(|| from.get()..len))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }
}

fn look(image: &Image, tree: Tree<'_>, size: u64) {
    let mut at = 0;
    for _ in 0..MAX_RUNS {
        if at >= size {
            return;
        }
        let range = GuestRange::new(GuestOffset::new(at), size - at);
        let Ok(run) = image.map(tree, range) else { return };
        assert!(run.len > 0 && run.len <= range.len);
        let mut buf = vec![0; run.len.min(4096) as usize];
        let _ = image.read_content(range.start, run.content, &mut buf);
        at += run.len;
    }
}

fuzz_target!(|bytes: &[u8]| {
    let store = || Arc::new(Bytes(Mutex::new(bytes.to_vec())));
    // The key of the old AES costs nothing to derive; an image that is not encrypted does without.
    let companions = || {
        let cipher = SectorCipher::legacy_aes(b"key").expect("any key will do");
        let cipher = Some(GuestCipher { cipher, numbering: SectorNumbering::Guest });
        Companions { cipher, ..Companions::default() }
    };
    if let Ok(image) = Image::open_with(store(), Writability::ReadOnly, companions()) {
        look(&image, Tree::Active, image.size());
        for snapshot in image.snapshots().iter().take(8) {
            look(&image, Tree::Snapshot(snapshot), snapshot.size());
        }
        let _ = image.bitmaps();
        let _ = image.looks_preallocated();
    }
    // Tables of megabytes are legal and slow; small ones have all the same code.
    let small = |image: &Image| {
        let header = image.header();
        let cluster_size = header.geometry.cluster_size();
        header.l1_entries <= 1024 && u64::from(header.reftable_clusters) * cluster_size <= 16384
    };
    if let Some(image) =
        Image::open_with(store(), Writability::Writable, companions()).ok().filter(small)
    {
        let len = image.size().min(3000);
        let _ = image.write(&Nothing, GuestOffset::ZERO, &vec![1; len as usize]);
        let middle = GuestOffset::new(image.size() / 2);
        let _ = image.zero(
            &Nothing,
            GuestRange::new(middle, image.size().min(100_000) / 2),
            ZeroMode::Unmap,
        );
        let _ = image.create_snapshot("fuzzed");
        let _ = image.write(&Nothing, GuestOffset::ZERO, &vec![2; len as usize]);
        let _ = image.flush_all();
    }
});
