//! A daemon that is killed while its chain changes under writers keeps what was synced and damages no member.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::support::images::{Images, check, paint};
use crate::support::mounted::{Mounted, is_running};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, attempt, qchainfs};
use crate::support::watchdog::wait_until;
use crate::support::{M, index};

const WRITERS: u64 = 3;

/// Where a writer writes: each time its number, from one end of a block to the other.
fn place(writer: u64) -> u64 {
    writer * 3 * M + 4096 * writer
}

/// Panics if QEMU finds more than leaks and flags that disagree with them: while a snapshot is made, counts are raised before
/// flags are cleared, whatever the order, and a repair of leaks must mend both.
pub fn check_for_flags_and_leaks_only(image: &Path) {
    let found = attempt("qemu-img", &args!["check", image]);
    let mut errors = found.stderr.lines().filter(|line| line.starts_with("ERROR"));
    assert!(errors.all(|line| line.starts_with("ERROR OFLAG_COPIED")), "{found}");
    if found.code != Some(0) {
        qchainfs(&args!["check", "-q", "-r", "leaks", image]);
        check(image);
    }
}

#[test]
fn a_daemon_killed_while_snapshots_and_overlays_are_made_keeps_what_was_synced() {
    for seed in seeds(4) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let base = images.create("base.qcow2", 16 * M, "");
        paint(&base, &mut random, 16 * M, 20);
        let mut files: Vec<PathBuf> = vec![images.overlay("0.qcow2", "base.qcow2", "")];
        for round in 0..4_u64 {
            // The last file that is an image: one that was not finished names nothing, and nothing names it.
            let is_image = |file: &&PathBuf| {
                attempt("qemu-img", &args!["info", "-f", "qcow2", file]).code == Some(0)
            };
            let top = files.iter().rfind(is_image).expect("an image").clone();
            let mounted = Mounted::new(&top);
            let daemon = mounted.daemon();
            let stop = AtomicBool::new(false);
            let synced: [AtomicU64; WRITERS as usize] = Default::default();
            let moment = Duration::from_millis(20 + random.below(200));
            thread::scope(|scope| {
                for writer in 0..WRITERS {
                    let (stop, synced) = (&stop, &synced[index(writer)]);
                    let disk = File::options().write(true).open(mounted.disk()).expect("open");
                    scope.spawn(move || {
                        // Above all that was written before.
                        for number in (round << 32) + 1.. {
                            let block = number.to_be_bytes().repeat(512);
                            let written = disk.write_all_at(&block, place(writer));
                            if written.and_then(|()| disk.sync_data()).is_err() {
                                assert!(stop.load(Ordering::SeqCst), "nobody was killed yet");
                                return;
                            }
                            synced.store(number, Ordering::SeqCst);
                        }
                    });
                }
                let stop = &stop;
                scope.spawn(move || {
                    thread::sleep(moment);
                    stop.store(true, Ordering::SeqCst);
                    kill(daemon, Signal::SIGKILL).expect("kill the daemon");
                });
                for number in 0.. {
                    let name = format!("s{round}-{number}");
                    let file = images.path(&format!("{round}-{number}.qcow2"));
                    qchainfs(&args!["snapshot", "create", mounted.root(), &name]);
                    qchainfs(&args!["snapshot", "delete", mounted.root(), &name]);
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    qchainfs(&args!["overlay", mounted.root(), &file]);
                    if file.exists() {
                        files.push(file);
                    }
                }
            });
            wait_until("the daemon dies", || !is_running(daemon));
            drop(mounted);
            for file in files.iter().filter(is_image) {
                check_for_flags_and_leaks_only(file);
            }
            let top = files.iter().rfind(is_image).expect("an image").clone();
            let mounted = Mounted::new(&top);
            let disk = File::open(mounted.disk()).expect("open");
            for writer in 0..WRITERS {
                let mut block = [0; 4096];
                disk.read_exact_at(&mut block, place(writer)).expect("read");
                let (numbers, _) = block.as_chunks::<8>();
                let number = u64::from_be_bytes(numbers[0]);
                let known = synced[index(writer)].load(Ordering::SeqCst);
                assert!(
                    number >= known,
                    "seed {seed}, round {round}: {known} was synced, {number} is there"
                );
            }
            drop(disk);
            mounted.umount();
        }
    }
}

#[test]
fn a_daemon_killed_while_its_disk_goes_back_leaves_the_one_state_or_the_other() {
    const BLOCKS: u64 = 6;
    for seed in seeds(4) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let base = images.create("base.qcow2", 16 * M, "");
        paint(&base, &mut random, 16 * M, 20);
        let expected_below = bytes_of(&base);
        let image = images.overlay("top.qcow2", "base.qcow2", "");
        let write = |mounted: &Mounted, byte: u8| -> std::io::Result<()> {
            let disk = File::options().write(true).open(mounted.disk())?;
            for block in 0..BLOCKS {
                disk.write_all_at(&[byte; 5000], block * 2 * M + 777)?;
            }
            disk.sync_data()
        };
        let mut made = 0;
        for round in 0..4 {
            let mounted = Mounted::new(&image);
            let (old, new) = (2 * round + 1, 2 * round + 2);
            write(&mounted, old).expect("write");
            let name = format!("s{round}");
            qchainfs(&args!["snapshot", "create", mounted.root(), &name]).ok();
            write(&mounted, new).expect("write");
            let (daemon, stop) = (mounted.daemon(), AtomicBool::new(false));
            let moment = Duration::from_millis(5 + random.below(150));
            let reverts = round % 2 == 1;
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(moment);
                    stop.store(true, Ordering::SeqCst);
                    kill(daemon, Signal::SIGKILL).expect("kill the daemon");
                });
                while !stop.load(Ordering::SeqCst) {
                    if reverts {
                        made += 1;
                        let file = images.path(&format!("new-{made}.qcow2"));
                        qchainfs(&args!["revert", mounted.root(), &base, &file]);
                        continue;
                    }
                    qchainfs(&args!["snapshot", "apply", mounted.root(), &name]);
                    let written = write(&mounted, new);
                    assert!(written.is_ok() || stop.load(Ordering::SeqCst), "nobody was killed");
                }
            });
            wait_until("the daemon dies", || !is_running(daemon));
            drop(mounted);
            check_for_flags_and_leaks_only(&image);
            for number in 1..=made {
                let file = images.path(&format!("new-{number}.qcow2"));
                if attempt("qemu-img", &args!["info", "-f", "qcow2", &file]).code == Some(0) {
                    check_for_flags_and_leaks_only(&file);
                    same("what it went back to", &expected_below, &bytes_of(&file));
                }
            }
            let disk = bytes_of(&image);
            let kept = bytes_of_snapshot(&image, &name);
            for block in 0..BLOCKS {
                let at = index(block * 2 * M + 777);
                let may_be = if reverts { vec![new] } else { vec![old, new] };
                let whole = disk[at..at + 5000].iter().all(|byte| may_be.contains(byte));
                assert!(whole, "seed {seed}, round {round}: {} is there", disk[at]);
                assert!(kept[at..at + 5000].iter().all(|&byte| byte == old), "seed {seed}");
            }
        }
    }
}
