//! A daemon that is killed under load, again and again, keeps all that was synced.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nix::sys::signal::{Signal, kill};

use crate::killed::check_for_leaks_only;
use crate::support::images::{Images, Untouched, io, paint, snapshot};
use crate::support::load::Load;
use crate::support::mounted::{Mounted, is_running};
use crate::support::oracle::{bytes_of, bytes_of_snapshot, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, attempt};
use crate::support::watchdog::wait_until;
use crate::support::{M, index};

const SIZE: u64 = 16 * M;
const SECTOR: usize = 512;
/// Bytes of a cell: neither a cluster nor a divisor of one.
const CELL: usize = 7 * SECTOR;
const CELLS: u64 = SIZE / 2 / CELL as u64;
const WRITERS: u64 = 2;
const KILLS: u64 = 3;

/// What a cell may hold: the last generation that was synced, or one that was begun since.
#[derive(Debug, Clone, Copy, Default)]
struct Generations {
    synced: u64,
    begun: u64,
}

/// The bytes of a generation of a cell; the first is what an image without data reads as.
fn content(cell: u64, generation: u64) -> Vec<u8> {
    match generation {
        0 => vec![0; CELL],
        _ => Random::fixed(cell << 32 | generation).bytes(CELL),
    }
}

/// Writes and syncs cells of its own until the disk is gone.
fn write_until_the_end(
    disk: &File,
    cells: &mut [Generations],
    random: &mut Random,
    first: u64,
    syncs: &AtomicU64,
) {
    loop {
        let mut written = Vec::new();
        for _ in 0..1 + random.below(8) {
            let number = random.below(cells.len() as u64);
            let cell = &mut cells[index(number)];
            cell.begun += 1;
            written.push(index(number));
            let at = (first + number) * CELL as u64;
            if disk.write_all_at(&content(first + number, cell.begun), at).is_err() {
                return;
            }
        }
        if disk.sync_data().is_err() {
            return;
        }
        // A cell whose write an earlier kill has cut off is still in doubt.
        written.into_iter().for_each(|number| cells[number].synced = cells[number].begun);
        syncs.fetch_add(1, Ordering::SeqCst);
    }
}

/// Mounts `image`, loads it, and kills the daemon in the middle of that.
fn kill_under_load(image: &Path, cells: &mut [Generations], random: &mut Random) {
    let mounted = Mounted::new(image);
    let load = Load::on_second_half(&mounted.disk(), SIZE);
    let syncs = AtomicU64::new(0);
    let enough = 1 + random.below(30);
    let random = Mutex::new(random);
    thread::scope(|scope| {
        let share = index(CELLS / WRITERS) + 1;
        for (number, mine) in cells.chunks_mut(share).enumerate() {
            let disk = File::options().write(true).open(mounted.disk()).expect("open");
            let mut random = Random::fixed(random.lock().expect("a seed").any());
            let (syncs, first) = (&syncs, (number * share) as u64);
            scope.spawn(move || write_until_the_end(&disk, mine, &mut random, first, syncs));
        }
        wait_until("the writers sync", || syncs.load(Ordering::SeqCst) >= enough);
        let daemon = mounted.daemon();
        kill(daemon, Signal::SIGKILL).expect("kill the daemon");
        wait_until("the daemon dies", || !is_running(daemon));
    });
    load.fails();
}

/// Panics unless each sector of each cell is as old as the last sync or newer.
fn verify(image: &Path, cells: &[Generations]) {
    let disk = bytes_of(image);
    for (number, cell) in (0..).zip(cells) {
        let at = index(number) * CELL;
        let possible: Vec<_> =
            (cell.synced..=cell.begun).map(|generation| content(number, generation)).collect();
        for from in (0..CELL).step_by(SECTOR) {
            let found = &disk[at + from..at + from + SECTOR];
            assert!(
                possible.iter().any(|content| &content[from..from + SECTOR] == found),
                "cell {number} at byte {from} is none of {cell:?}"
            );
        }
    }
}

#[test]
fn a_daemon_killed_under_load_again_and_again_keeps_what_was_synced() {
    for seed in seeds(1) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let cluster = random.pick(&["512", "4k", "64k"]);
        let base = images.create("base.qcow2", SIZE, "");
        paint(&base, &mut random, SIZE / 64, 5);
        let top = images.overlay("top.qcow2", "base.qcow2", &format!("cluster_size={cluster}"));
        let mut cells = vec![Generations::default(); index(CELLS)];
        // All cells are known before the first kill, whatever the base holds.
        io(&top, &[format!("write -z 0 {}", SIZE / 2)]);
        snapshot(&top, "before");
        let before = bytes_of_snapshot(&top, "before");
        let untouched = Untouched::now(&[base]);
        for _ in 0..KILLS {
            kill_under_load(&top, &mut cells, &mut random);
            check_for_leaks_only(&top);
            verify(&top, &cells);
            same("the snapshot", &before, &bytes_of_snapshot(&top, "before"));
            if random.below(2) == 0 {
                attempt("qemu-img", &args!["check", "-q", "-r", "leaks", top]).ok();
            }
        }
        untouched.verify();
    }
}
