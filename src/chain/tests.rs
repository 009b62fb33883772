//! A chain whose image another writes, at every moment that there is between two reads of its file.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::member::{Disk, Member};
use super::{Chain, View};
use crate::error::{Problem, Result};
use crate::image::{CreateOptions, Image, NewImage, Nothing, Writability};
use crate::qcow2::{Geometry, Version};
use crate::store::fault::{FaultStore, Operation};
use crate::store::memory::MemoryStore;
use crate::store::{Access, FileStore, Store};
use crate::units::{GuestOffset, HostOffset};

const CLUSTER: usize = 512;
const CLUSTERS: usize = 100;
/// No read of the file changes it.
const NEVER: i64 = -1;

/// The image while it has its snapshot, which is full of ones, and when its writer has deleted that and written threes where
/// it was.
struct States {
    with: Vec<u8>,
    without: Vec<u8>,
}

fn states() -> States {
    let store = Arc::new(MemoryStore::default());
    let options = CreateOptions {
        size: (CLUSTERS * CLUSTER) as u64,
        version: Version::V3,
        geometry: Geometry::new(CLUSTER.ilog2(), 4),
        backing: None,
    };
    NewImage::plan(&options).unwrap().write(&*store).unwrap();
    let image = Image::open(store.clone(), Writability::Writable).unwrap();
    let write = |byte: u8| {
        // Every other cluster first, so that the disk is in many runs.
        for number in (0..CLUSTERS).step_by(2).chain((1..CLUSTERS).step_by(2)) {
            let at = GuestOffset::new((number * CLUSTER) as u64);
            image.write(&Nothing, at, &[byte; CLUSTER]).unwrap();
        }
        image.flush_all().unwrap();
    };
    write(1);
    let snapshot = image.create_snapshot("one").unwrap();
    write(2);
    let with = store.bytes();
    image.delete_snapshot(&snapshot.entry().id).unwrap();
    image.flush_all().unwrap();
    image.create_snapshot("another").unwrap();
    write(3);
    States { with, without: store.bytes() }
}

/// A mount's view of the snapshot; the image changes after as many reads of its file as the number says.
fn snapshot_beside_writer(states: &States) -> (View, Arc<AtomicI64>) {
    let left = Arc::new(AtomicI64::new(NEVER));
    let (countdown, without) = (left.clone(), states.without.clone());
    let observer = move |store: &FaultStore, operation| {
        if operation == Operation::Read && countdown.fetch_sub(1, Ordering::SeqCst) == 1 {
            store.write_at(&[&without], HostOffset::ZERO).unwrap();
        }
    };
    let store = Arc::new(FaultStore::observed(states.with.clone(), Box::new(observer)));
    let image = Image::open(store, Writability::BesideWriter).unwrap();
    let snapshot = image.snapshots()[0].clone();
    // The member's own file is not looked at by what reads.
    let file = tempfile::NamedTempFile::new().unwrap();
    let own = Arc::new(FileStore::open(file.path(), Access::ReadOnly).unwrap());
    let top = Member::new(file.path().to_path_buf(), None, own, Disk::Qcow2(Box::new(image)));
    let view = Arc::new(Chain::new(vec![top])).snapshot_view(0, snapshot).unwrap();
    left.store(NEVER, Ordering::SeqCst);
    (view, left)
}

fn read(view: &View) -> Result<Vec<u8>> {
    let mut found = vec![9; view.size() as usize];
    view.read(GuestOffset::ZERO, &mut found).map(|()| found)
}

/// Changes the image after each read of its file that `act` does on a view that `prepare` has seen, one after the other.
/// `act` has to find what is right, or that the snapshot is gone, which the later of these reads can't find out any more.
fn at_every_moment(prepare: fn(&View), act: fn(&View) -> Result<()>) {
    let states = states();
    assert!(states.without.len() >= states.with.len());
    let mut found_gone = 0;
    for moment in 1.. {
        let (view, left) = snapshot_beside_writer(&states);
        prepare(&view);
        left.store(moment, Ordering::SeqCst);
        let outcome = act(&view);
        let reached = left.load(Ordering::SeqCst) <= 0;
        match outcome {
            Ok(()) => {}
            Err(error) => {
                assert!(matches!(error.problem(), Problem::SnapshotGone { .. }), "{error}");
                assert!(reached, "nothing had changed");
                found_gone += 1;
            }
        }
        if !reached {
            break;
        }
    }
    assert!(found_gone > 1, "the reads that were tried are none of the snapshot");
}

#[test]
fn what_a_snapshot_held_is_read_or_that_it_is_gone_whenever_another_deletes_it() {
    let act = |view: &View| read(view).map(|found| assert!(found.iter().all(|&byte| byte == 1)));
    at_every_moment(|_| {}, act);
    // Where its data is, is known already.
    at_every_moment(|view| drop(read(view).unwrap()), act);
}

#[test]
fn what_is_allocated_in_a_snapshot_is_found_or_that_it_is_gone_whenever_another_deletes_it() {
    at_every_moment(
        |_| {},
        |view| view.allocated(view.range()).map(|len| assert_eq!(len, view.size())),
    );
}
