//! fio writes to a disk whose chain changes until its daemon is killed: each point that was made is one moment of what fio
//! wrote, and stays so.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::killed_changes::check_for_flags_and_leaks_only;
use crate::support::images::Images;
use crate::support::mounted::{Mounted, is_running};
use crate::support::oracle::{bytes_of, bytes_of_snapshot};
use crate::support::random::{Random, seeds};
use crate::support::stamped::{BLOCK, Extent, Fio, Stamp, Written, stamps};
use crate::support::tools::{args, attempt, qchainfs};
use crate::support::watchdog::wait_until;
use crate::support::{M, index};

const BLOCKS: usize = (8 * M / BLOCK) as usize;
/// With smaller ones, a block can be in several clusters, and so be written in part.
const OPTIONS: [&str; 4] =
    ["cluster_size=4k", "", "cluster_size=16k,refcount_bits=8", "cluster_size=128k,extended_l2=on"];

/// A point in time that was reported as made.
struct Point {
    /// The image that has it.
    file: PathBuf,
    /// Or it is the image itself.
    snapshot: Option<String>,
    holds: Vec<Stamp>,
}

impl Point {
    fn look(&self) -> Vec<Stamp> {
        let (what, bytes) = match &self.snapshot {
            Some(name) => (name.clone(), bytes_of_snapshot(&self.file, name)),
            None => (self.file.display().to_string(), bytes_of(&self.file)),
        };
        stamps(&what, &bytes)
    }

    #[track_caller]
    fn verify(&self) {
        assert!(
            self.look() == self.holds,
            "{:?} of {} changed",
            self.snapshot,
            self.file.display()
        );
    }
}

/// A chain whose lowest image is full of fio's blocks.
struct Disk {
    images: Images,
    random: Random,
    fios: u32,
    names: u32,
    /// Images that were made on top, the oldest first.
    files: Vec<PathBuf>,
    /// Members below the top, the lowest first.
    below: Vec<PathBuf>,
    points: Vec<Point>,
    holds: Vec<Stamp>,
}

impl Disk {
    fn new(seed: u64) -> Self {
        let (images, mut random) = (Images::new(), Random::new(seed));
        let base = images.raw("base.raw", &vec![0; BLOCKS * BLOCK as usize]);
        let dir = base.parent().expect("a directory");
        let fio = Fio::start(&base, dir, 1, 0..BLOCKS, Extent::EachOnce, &mut random);
        assert!(fio.end().completed, "fio fills the base");
        let holds = stamps("the base", &bytes_of(&base));
        let top = images.overlay("0.qcow2", "base.raw", random.pick(&OPTIONS));
        let points = vec![Point { file: base.clone(), snapshot: None, holds: holds.clone() }];
        Self {
            images,
            random,
            fios: 1,
            names: 0,
            files: vec![top],
            below: vec![base],
            points,
            holds,
        }
    }

    fn top(&self) -> &Path {
        self.files.last().expect("an image")
    }

    fn new_name(&mut self, what: &str) -> String {
        self.names += 1;
        format!("{what}{}", self.names)
    }

    fn new_file(&mut self) -> PathBuf {
        let name = self.new_name("top") + ".qcow2";
        self.images.path(&name)
    }

    fn fio(&mut self, mounted: &Mounted, half: usize, extent: Extent) -> Fio {
        self.fios += 1;
        let blocks = half * BLOCKS / 2..(half + 1) * BLOCKS / 2;
        let dir = self.images.path("");
        Fio::start(&mounted.disk(), &dir, self.fios, blocks, extent, &mut self.random)
    }

    fn any_snapshot(&mut self) -> Option<usize> {
        let top = self.top();
        let of_top = |point: &Point| point.file == top && point.snapshot.is_some();
        let found: Vec<_> = (0..self.points.len()).filter(|&at| of_top(&self.points[at])).collect();
        (!found.is_empty()).then(|| self.random.pick(&found))
    }

    fn holds_of(&self, file: &Path) -> Vec<Stamp> {
        let is_it = |point: &&Point| point.file == file && point.snapshot.is_none();
        self.points.iter().find(is_it).expect("a point").holds.clone()
    }

    /// Panics unless the images are whole and all points are as they were.
    fn verify(&self) {
        for file in &self.files {
            check_for_flags_and_leaks_only(file);
        }
        self.points.iter().for_each(Point::verify);
    }

    /// Panics unless a mount shows the disk and the snapshots of the top as QEMU reads them.
    fn views_agree(&self, mounted: &Mounted) {
        let read = |name: &str| fs::read(mounted.path(name)).expect("read a view");
        assert!(stamps("disk.raw", &read("disk.raw")) == self.holds, "disk.raw is another");
        for point in self.points.iter().filter(|point| point.file == self.top()) {
            let name = point.snapshot.as_ref().expect("a snapshot");
            let found = stamps(name, &read(&format!("snapshots/{name}/disk.raw")));
            assert!(found == point.holds, "{name} is another");
        }
    }
}

fn is_image(file: &Path) -> bool {
    attempt("qemu-img", &args!["info", "-U", "-f", "qcow2", file]).code == Some(0)
}

/// Kills the daemon after `delay`, while `change` is called again and again until then.
fn change_until_killed(mounted: &Mounted, delay: Duration, mut change: impl FnMut(&AtomicBool)) {
    let (daemon, killed) = (mounted.daemon(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(delay);
            killed.store(true, Ordering::SeqCst);
            kill(daemon, Signal::SIGKILL).expect("kill the daemon");
        });
        while !killed.load(Ordering::SeqCst) {
            change(&killed);
        }
    });
    wait_until("the daemon dies", || !is_running(daemon));
}

/// What a command said, which may have failed only if the daemon was killed.
#[track_caller]
fn done(words: &[std::ffi::OsString], killed: &AtomicBool) -> bool {
    let outcome = qchainfs(words);
    let done = outcome.code == Some(0);
    assert!(done || killed.load(Ordering::SeqCst), "{outcome}");
    done
}

#[test]
fn points_made_under_fio_until_the_daemon_is_killed_are_moments_of_what_it_wrote() {
    for seed in seeds(2) {
        let mut disk = Disk::new(seed);
        for round in 0..3 {
            let mounted = Mounted::new(disk.top());
            disk.views_agree(&mounted);
            let sync_after = 2 + disk.random.below(20);
            let fios =
                [0, 1].map(|half| disk.fio(&mounted, half, Extent::UntilTheEnd { sync_after }));
            fios.iter().for_each(Fio::writes);
            let delay = Duration::from_millis(20 + disk.random.below(400));
            let (root, old_count) = (mounted.root().to_path_buf(), disk.points.len());
            change_until_killed(&mounted, delay, |killed| {
                let old_top = disk.top().to_path_buf();
                let point = |snapshot| Point { file: old_top.clone(), snapshot, holds: Vec::new() };
                match (disk.random.below(4), disk.any_snapshot()) {
                    (0, Some(at)) if at >= old_count => {
                        let name = disk.points.remove(at).snapshot.expect("a snapshot");
                        done(&args!["snapshot", "delete", root, name], killed);
                    }
                    (1, _) => {
                        let file = disk.new_file();
                        if done(&args!["overlay", root, file], killed) {
                            disk.points.push(point(None));
                        }
                        if is_image(&file) {
                            disk.files.push(file);
                        }
                    }
                    _ => {
                        let name = disk.new_name("s");
                        if done(&args!["snapshot", "create", root, name], killed) {
                            disk.points.push(point(Some(name)));
                        }
                    }
                }
            });
            let written = fios.map(Fio::end);
            drop(mounted);
            judge(&mut disk, &written, old_count, &format!("seed {seed}, round {round}"));
        }
        assert!(disk.points.len() > 3, "seed {seed}: hardly a point was made");
    }
}

/// Panics unless the points from `old_count` on are moments of `written`, in their order, and what was synced is there.
fn judge(disk: &mut Disk, written: &[Written], old_count: usize, round: &str) {
    let mut counts = vec![0; written.len()];
    for point in &mut disk.points[old_count..] {
        point.holds = point.look();
        let what = format!("{round}, {:?} of {}", point.snapshot, point.file.display());
        for (fio, before) in written.iter().zip(&mut counts) {
            let count = fio.is_one_moment(&what, &disk.holds, &point.holds);
            assert!(count >= *before, "{what} is older than the point before it");
            *before = count;
        }
    }
    let found = stamps(round, &bytes_of(disk.top()));
    for fio in written {
        assert!(!fio.completed, "{round}: fio did not notice that its disk was gone");
        fio.kept_what_was_synced(round, &disk.holds, &found);
    }
    disk.holds = found;
    disk.verify();
}

#[test]
fn a_disk_that_goes_back_and_forth_between_runs_of_fio_is_killed_in_one_state_or_the_other() {
    for seed in seeds(2) {
        let mut disk = Disk::new(seed);
        for round in 0..3 {
            let round = format!("seed {seed}, round {round}");
            let mounted = Mounted::new(disk.top());
            disk.views_agree(&mounted);
            let root = mounted.root().to_path_buf();
            let delay = Duration::from_millis(300 + disk.random.below(1500));
            // What the disk may hold besides, or what was being written.
            let (mut instead, mut under_way) = (None, Vec::new());
            change_until_killed(&mounted, delay, |killed| {
                let old_top = disk.top().to_path_buf();
                let holds = disk.holds.clone();
                let point = |snapshot| Point { file: old_top.clone(), snapshot, holds };
                match (disk.random.below(7), disk.any_snapshot()) {
                    (0, Some(at)) => {
                        let name = disk.points.remove(at).snapshot.expect("a snapshot");
                        done(&args!["snapshot", "delete", root, name], killed);
                    }
                    (1 | 2, Some(at)) => {
                        let name = disk.points[at].snapshot.as_ref().expect("a snapshot");
                        let then = disk.points[at].holds.clone();
                        match done(&args!["snapshot", "apply", root, name], killed) {
                            true => disk.holds = then,
                            false => instead = Some(then),
                        }
                    }
                    (3, _) => {
                        let file = disk.new_file();
                        if done(&args!["overlay", root, file], killed) {
                            disk.points.push(point(None));
                            disk.below.push(old_top);
                            disk.files.push(file);
                        }
                    }
                    (4, _) => {
                        let at = index(disk.random.below(disk.below.len() as u64));
                        let file = disk.new_file();
                        let member = disk.below[at].clone();
                        if done(&args!["revert", root, member, file], killed) {
                            disk.holds = disk.holds_of(&member);
                            disk.points.push(point(None));
                            disk.below.truncate(at + 1);
                            disk.files.push(file);
                        }
                    }
                    (5, _) => {
                        let name = disk.new_name("s");
                        if done(&args!["snapshot", "create", root, name], killed) {
                            disk.points.push(point(Some(name)));
                        }
                    }
                    _ => {
                        let half = usize::from(disk.random.below(2) == 0);
                        let count = 5 + disk.random.below(60);
                        let written = disk.fio(&mounted, half, Extent::Writes(count)).end();
                        if written.completed {
                            written.apply_to(&mut disk.holds);
                        } else {
                            assert!(killed.load(Ordering::SeqCst), "{round}: fio failed");
                            under_way.push(written);
                        }
                    }
                }
            });
            drop(mounted);
            let found = stamps(&round, &bytes_of(disk.top()));
            for fio in &under_way {
                fio.kept_what_was_synced(&round, &disk.holds, &found);
            }
            let is_known = found == disk.holds || Some(&found) == instead.as_ref();
            assert!(is_known || !under_way.is_empty(), "{round}: the disk is neither of both");
            disk.holds = found;
            disk.verify();
        }
    }
}
