//! A whole image: check it, repair it, and see that no byte of the disk and its snapshots changes.
#![no_main]

mod bytes;

use std::sync::Arc;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use qchainfs::image::check::{Extent, Finding, Stage, Watch, check, repair};
use qchainfs::image::{Image, Tree, Writability};
use qchainfs::units::{GuestOffset, GuestRange};

/// More than that is not looked at: a hostile image may claim exabytes of holes.
const MAX_RUNS: usize = 100;

struct Nobody;

impl Watch for Nobody {
    fn found(&mut self, _stage: Stage, finding: &Finding) {
        assert!(!finding.to_string().is_empty());
    }

    fn progress(&mut self, _stage: Stage, done: u64, total: u64) {
        assert!(done <= total);
    }
}

/// What the first runs of a tree hold, as far as they can be read.
fn content(image: &Image, tree: Tree<'_>, size: u64, out: &mut Vec<u8>) {
    let mut at = 0;
    for _ in 0..MAX_RUNS {
        if at >= size {
            return;
        }
        let range = GuestRange::new(GuestOffset::new(at), size - at);
        let Ok(run) = image.map(tree, range) else { return };
        let mut buf = vec![0; run.len.min(4096) as usize];
        if image.read_content(range.start, run.content, &mut buf).is_ok() {
            out.extend(buf);
        }
        at += run.len;
    }
}

fn contents(store: &Arc<Bytes>) -> Option<Vec<u8>> {
    let image = Image::open(store.clone(), Writability::ReadOnly).ok()?;
    let mut out = Vec::new();
    content(&image, Tree::Active, image.size(), &mut out);
    for snapshot in image.snapshots().iter().take(4) {
        content(&image, Tree::Snapshot(snapshot), snapshot.size(), &mut out);
    }
    Some(out)
}

fuzz_target!(|bytes: &[u8]| {
    let store = Arc::new(Bytes::new(bytes));
    let Ok(found) = check(&*store, &mut Nobody) else { return };
    let before = contents(&store);
    for extent in [Extent::Leaks, Extent::All] {
        let Ok((left, fixed)) = repair(&*store, extent, &mut Nobody) else { return };
        assert!(!found.is_clean() || fixed.is_nothing(), "a clean image is not repaired");
        if before.is_some() {
            assert!(contents(&store) == before, "a repair has changed the disk");
        }
        if let Ok(again) = check(&*store, &mut Nobody) {
            assert_eq!(again, left, "a repair says what the image is like");
        }
    }
});
