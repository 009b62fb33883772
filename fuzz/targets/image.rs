//! A whole image: open it, look at all of it, read some of it, write to it if that is allowed.
#![no_main]

mod bytes;

use std::sync::Arc;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use qchainfs::image::{
    Companions, GuestCipher, Image, Nothing, SectorNumbering, Tree, Writability, ZeroMode,
};
use qchainfs::qcow2::encryption::SectorCipher;
use qchainfs::units::{GuestOffset, GuestRange};

/// More than that is not looked at: a hostile image may claim exabytes of holes.
const MAX_RUNS: usize = 200;

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
    let store = || Arc::new(Bytes::new(bytes));
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
    let writable = Image::open_with(store(), Writability::Writable, companions());
    if let Some(image) = writable.ok().filter(small) {
        let len = image.size().min(3000);
        let _ = image.write(&Nothing, GuestOffset::ZERO, &vec![1; len as usize]);
        let middle = GuestOffset::new(image.size() / 2);
        let _ = image.zero(&Nothing, GuestRange::new(middle, image.size().min(100_000) / 2), ZeroMode::Unmap);
        let first = image.snapshots().first().map(|tree| tree.entry().id.clone());
        if let Some(id) = &first {
            let _ = image.apply_snapshot(id);
        }
        let _ = image.create_snapshot("fuzzed");
        let _ = image.write(&Nothing, GuestOffset::ZERO, &vec![2; len as usize]);
        if let Some(id) = &first {
            let _ = image.delete_snapshot(id);
        }
        let _ = image.flush_all();
    }
});
