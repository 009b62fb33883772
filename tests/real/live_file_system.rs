//! A file system that is mounted from the disk and written to while snapshots and overlays of it are made: each of them is mounted,
//! holds what was synced before, and passes its check.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::scratch::scratch;
use crate::support::M;
use crate::support::images::{Images, check};
use crate::support::loopdev::{FileSystem, LoopDevice};
use crate::support::mounted::Mounted;
use crate::support::tools::{args, qchainfs, run};
use crate::support::watchdog::wait_until;

/// Names of files before they come round again.
const NAMES: u64 = 40;

/// What the file of a number holds.
fn content(number: u64) -> Vec<u8> {
    number.to_be_bytes().repeat(3000)
}

/// The number that a file holds; panics if it holds parts of several.
fn number_in(file: &PathBuf) -> u64 {
    let bytes = fs::read(file).expect("read a file");
    let (numbers, _) = bytes.as_chunks::<8>();
    let number = u64::from_be_bytes(numbers[0]);
    assert!(bytes == content(number), "{} is torn", file.display());
    number
}

/// A point in time: its view, what was synced before it, and whether the file system held still.
struct Point {
    view: String,
    synced: u64,
    quiesced: bool,
}

#[test]
fn every_point_of_a_mounted_ext4_is_whole_and_has_what_was_synced_before() {
    let (images, directory) = (Images::new(), tempfile::tempdir().expect("make a directory"));
    let image = images.create("disk.qcow2", 64 * M, "");
    let mounted = Mounted::with(&scratch(directory.path(), ""), &image);
    let device = LoopDevice::attach(&mounted.disk());
    run("mkfs.ext4", &args!["-q", device.path()]);
    let inner = FileSystem::mount(device.path(), "rw");
    let (stop, synced) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut points: Vec<Point> = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let path = inner.path(&format!("new-{}", number % NAMES));
                let mut file = File::create(&path).expect("make a file");
                file.write_all(&content(number)).expect("write");
                file.sync_all().expect("sync");
                fs::rename(&path, inner.path(&format!("file-{}", number % NAMES))).expect("rename");
                File::open(inner.path(".")).and_then(|root| root.sync_all()).expect("sync");
                synced.store(number, Ordering::SeqCst);
            }
        });
        let root = mounted.root();
        for round in 0..3 {
            for (name, flag) in [("still", Some("--quiesce")), ("moving", None)] {
                let before = synced.load(Ordering::SeqCst);
                wait_until("files are written", || synced.load(Ordering::SeqCst) > before + 3);
                let known = synced.load(Ordering::SeqCst);
                let snapshot = format!("{name}-{round}");
                let mut words = args!["snapshot", "create"].to_vec();
                words.extend(flag.map(Into::into));
                words.extend(args![root, &snapshot]);
                qchainfs(&words).ok();
                let view = format!("snapshots/{snapshot}");
                points.push(Point { view, synced: known, quiesced: flag.is_some() });

                let known = synced.load(Ordering::SeqCst);
                let new = images.path(&format!("{name}-{round}.qcow2"));
                let mut words = args!["overlay"].to_vec();
                words.extend(flag.map(Into::into));
                words.extend(args![root, &new]);
                qchainfs(&words).ok();
                // Everything is one member deeper now, and what was the disk is the first.
                for point in &mut points {
                    let deeper = match point.view.strip_prefix("chain/") {
                        None => format!("chain/1/{}", point.view),
                        Some(rest) => {
                            let (number, rest) = rest.split_once('/').unwrap_or((rest, ""));
                            let number: u32 = number.parse().expect("a number");
                            format!("chain/{}/{rest}", number + 1)
                        }
                    };
                    point.view = deeper;
                }
                let (view, quiesced) = ("chain/1/".to_owned(), flag.is_some());
                points.push(Point { view, synced: known, quiesced });
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    drop(inner);
    drop(device);
    for Point { view, synced, quiesced } in &points {
        let place = if *quiesced { view.clone() } else { format!("scratch/{view}") };
        let device = LoopDevice::attach(&mounted.path(&place).join("disk.raw"));
        let said = run("dumpe2fs", &args!["-h", device.path()]);
        assert!(!quiesced || !said.contains("needs_recovery"), "{view} has a journal to replay");
        let inner = FileSystem::mount(device.path(), if *quiesced { "ro" } else { "rw" });
        let file = inner.path(&format!("file-{}", synced % NAMES));
        let found = number_in(&file);
        assert!(found >= *synced, "{view}: {synced} was synced, {found} is there");
        drop(inner);
        run("e2fsck", &args!["-fn", device.path()]);
    }
    mounted.umount();
    check(&image);
}
