//! `mount -U`: backing members and snapshots of an image that QEMU writes at the same time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::support::daemon::{Cache, Daemon};
use crate::support::images::{Images, check, paint, snapshot};
use crate::support::mounted::Mounted;
use crate::support::mounted_file::MountedFile;
use crate::support::oracle::{bytes_of, holds};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, attempt, qchainfs};
use crate::support::{M, index};

const DISK: u64 = 8 * M;

fn beside(image: &Path) -> Mounted {
    Mounted::with(&args!["-U"], image)
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("list");
    let name = |entry: io::Result<fs::DirEntry>| {
        entry.expect("an entry").file_name().to_string_lossy().into_owned()
    };
    let mut names: Vec<_> = entries.map(name).collect();
    names.sort_unstable();
    names
}

/// Opens a file past the kernel's cache, so that each read asks the mount.
fn open_uncached(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_DIRECT).open(path)
}

/// Fills a buffer as O_DIRECT wants it: offset, length and address are multiples of a page.
fn read_uncached(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; len + 4096];
    let skip = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[skip..skip + len], offset)?;
    Ok(buffer[skip..skip + len].to_vec())
}

fn is_stale(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESTALE)
}

fn is_gone(error: &io::Error) -> bool {
    is_stale(error) || error.kind() == io::ErrorKind::NotFound
}

#[test]
fn what_is_locked_by_a_writer_is_mounted_without_its_active_layer() {
    let images = Images::new();
    let base = images.create("base.qcow2", DISK, "");
    paint(&base, &mut Random::fixed(1), DISK, 20);
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    paint(&top, &mut Random::fixed(2), DISK, 20);
    let before = bytes_of(&top);
    snapshot(&top, "before");
    let mut daemon = Daemon::open(&top, Cache::Host);
    daemon.write(0, &[7; 65536]);

    for options in [vec![], args!["-r"].to_vec()] {
        let said = Mounted::refused(&options, &top, 11);
        assert!(said.contains(&format!("(pid {})", daemon.pid())), "{said}");
        assert!(said.contains("can still be read"), "{said}");
        let advice = format!("qchainfs mount -U -r {} ", top.display());
        assert!(said.contains(&advice), "{said}");
    }
    let mounted = Mounted::with(&args!["-U", "-r"], &top);
    assert_eq!(names_in(mounted.root()), ["chain", "snapshots"]);
    assert_eq!(names_in(&mounted.path("chain/0")), ["snapshots"]);
    holds(&mounted.path("snapshots/before/disk.raw"), &before);
    holds(&mounted.path("chain/0/snapshots/before/disk.raw"), &before);
    holds(&mounted.path("chain/1/disk.raw"), &bytes_of(&base));
    for words in [
        args!["snapshot", "create", mounted.root(), "new"].to_vec(),
        args!["snapshot", "delete", mounted.root(), "before"].to_vec(),
        args!["overlay", mounted.root(), images.path("over.qcow2")].to_vec(),
    ] {
        let said = qchainfs(&words).fails(1);
        assert!(said.contains("mounted with -U"), "{said}");
    }
    let said = qchainfs(&args!["info", &top]).fails(11);
    assert!(said.contains(&format!("qchainfs info -U {}", top.display())), "{said}");
    mounted.umount();

    let mounted = Mounted::with(&args!["-o", "force_share,active"], &top);
    assert_eq!(names_in(mounted.root()), ["chain", "disk.raw", "info.json", "snapshots"]);
    daemon.flush();
    let disk = fs::read(mounted.disk()).expect("read");
    assert_eq!(disk[..65536], [7; 65536]);
    daemon.write(M, &[8; 65536]);
    daemon.flush();
    assert_eq!(fs::read(mounted.disk()).expect("read")[index(M)..][..65536], [8; 65536]);
    let said = qchainfs(&args!["clone", mounted.root(), images.path("torn.qcow2")]).fails(2);
    assert!(said.contains("at any time"), "{said}");
    mounted.umount();
    daemon.quit();
    check(&top);
}

#[test]
fn a_snapshot_beside_a_writer_is_mounted_on_a_file() {
    let images = Images::new();
    let image = images.create("disk.qcow2", DISK, "");
    paint(&image, &mut Random::fixed(3), DISK, 20);
    let before = bytes_of(&image);
    snapshot(&image, "before");
    let mut daemon = Daemon::open(&image, Cache::Direct);
    daemon.write(0, &[1; 65536]);
    let mut address = image.clone().into_os_string();
    let file = images.raw("mountpoint.raw", &[]);
    let said = qchainfs(&args!["mount", "-U", image, file]).fails(2);
    assert!(said.contains("-o active"), "{said}");
    address.push("@before");
    let mounted = MountedFile::with(&args!["-U"], &address);
    holds(mounted.path(), &before);
    let disk = open_uncached(mounted.path()).expect("open");
    daemon.delete_snapshot("before");
    assert!(is_stale(&read_uncached(&disk, 0, 4096).expect_err("it is gone")));
    drop(disk);
    mounted.umount();
    daemon.quit();
}

#[test]
fn what_would_write_beside_a_writer_is_refused_by_name() {
    let images = Images::new();
    let image = images.create("disk.qcow2", DISK, "");
    for (options, word) in [
        (args!["-U", "-o", "rw"], "rw"),
        (args!["-U", "-o", "growable"], "growable"),
        (args!["-U", "-o", "scratch"], "scratch"),
    ] {
        let said = Mounted::refused(&options, &image, 2);
        assert!(said.contains("-U") && said.contains(word), "{said}");
    }
    let said = Mounted::refused(&args!["-o", "active"], &image, 2);
    assert!(said.contains("-U"), "{said}");
}

#[test]
fn qemu_may_write_the_image_but_not_its_base_while_it_is_mounted_beside_it() {
    let images = Images::new();
    images.create("base.qcow2", DISK, "");
    let top = images.overlay("top.qcow2", "base.qcow2", "");
    let mounted = beside(&top);
    let mut daemon = Daemon::open(&top, Cache::Host);
    daemon.write(0, &[1; 4096]);
    daemon.quit();
    let outcome = attempt("qemu-img", &args!["commit", "-q", top]);
    assert!(outcome.code != Some(0) && outcome.stderr.contains("lock"), "{outcome}");
    mounted.umount();
}

#[test]
fn snapshots_come_and_go_with_the_writer_and_a_name_used_again_is_another_file() {
    for cache in [Cache::Host, Cache::Direct] {
        let images = Images::new();
        let image = images.create("disk.qcow2", DISK, "");
        let mut daemon = Daemon::open(&image, cache);
        let mounted = beside(&image);
        assert!(names_in(&mounted.path("snapshots")).is_empty());
        let path = mounted.path("snapshots/point/disk.raw");
        let mut last_inode = 0;
        for round in 1..=20_u8 {
            let bytes = vec![round; index(DISK)];
            daemon.write(0, &bytes);
            daemon.create_snapshot("point");
            // Through the kernel's cache, which must not have kept the one before.
            holds(&path, &bytes);
            let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).expect("stat"));
            assert_ne!(inode, last_inode);
            last_inode = inode;
            assert_eq!(names_in(&mounted.path("snapshots")), ["point"]);
            let (cached, uncached) =
                (File::open(&path).expect("open"), open_uncached(&path).expect("open"));
            assert!(read_uncached(&uncached, 0, 4096).expect("read") == bytes[..4096]);
            daemon.delete_snapshot("point");
            daemon.write(0, &vec![round ^ 0x80; index(DISK)]);
            for _ in 0..2 {
                let error = read_uncached(&uncached, M, 4096).expect_err("it is gone");
                assert!(is_stale(&error), "{error}");
            }
            let mut found = vec![0; 4096];
            match cached.read_exact_at(&mut found, 5 * M) {
                Ok(()) => assert!(found == bytes[..4096], "round {round}"),
                Err(error) => assert!(is_stale(&error), "{error}"),
            }
            assert_eq!(File::open(&path).expect_err("it is gone").kind(), io::ErrorKind::NotFound);
            assert!(names_in(&mounted.path("snapshots")).is_empty());
        }
        mounted.umount();
        daemon.quit();
        check(&image);
    }
}

/// Points in time by the number that the disk begins with.
#[derive(Default)]
struct Points {
    bytes: HashMap<u64, Vec<u8>>,
    deleted: HashSet<u64>,
}

/// What readers share with the writer.
struct Shared {
    points: Mutex<Points>,
    root: PathBuf,
    base: Vec<u8>,
    right: AtomicU64,
    gone: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn deleted(&self) -> HashSet<u64> {
        self.points.lock().expect("points").deleted.clone()
    }

    /// Panics unless `found` is what the point in time with this number has at `offset`.
    fn compare(&self, number: u64, offset: u64, found: &[u8]) {
        let points = self.points.lock().expect("points");
        let expected = points.bytes.get(&number);
        let expected = expected.unwrap_or_else(|| panic!("there never was a disk {number:#x}"));
        let expected = &expected[index(offset)..][..found.len()];
        if let Some(at) = expected.iter().zip(found).position(|(a, b)| a != b) {
            panic!(
                "point {number}: {} bytes at {offset} differ from {at} on: {:#x}, not {:#x}",
                found.len(),
                found[at],
                expected[at]
            );
        }
        self.right.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self, random: &mut Random) {
        if random.below(8) == 0 {
            let file = File::open(self.root.join("chain/1/disk.raw")).expect("open the base");
            let (offset, len) = random.range(DISK, M);
            let mut found = vec![0; index(len)];
            file.read_exact_at(&mut found, offset).expect("the base is always there");
            assert!(found == self.base[index(offset)..][..found.len()], "{offset} of the base");
        }
        let names = names_in(&self.root.join("snapshots"));
        if names.is_empty() {
            return;
        }
        let name = &names[index(random.below(names.len() as u64))];
        let path = self.root.join("snapshots").join(name).join("disk.raw");
        let deleted = self.deleted();
        if let Err(error) = self.read_view(&path, &deleted, random) {
            assert!(is_gone(&error), "{}: {error}", path.display());
            self.gone.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read_view(
        &self,
        path: &Path,
        deleted: &HashSet<u64>,
        random: &mut Random,
    ) -> io::Result<()> {
        let uncached = open_uncached(path)?;
        let cached = File::open(path)?;
        let number = |bytes: &[u8]| u64::from_be_bytes(bytes[..8].try_into().expect("8 bytes"));
        let [one, other] = [number(&read_uncached(&uncached, 0, 4096)?), {
            let mut bytes = [0; 8];
            cached.read_exact_at(&mut bytes, 0)?;
            number(&bytes)
        }];
        for point in [one, other] {
            assert!(!deleted.contains(&point), "{} was deleted before: {point}", path.display());
        }
        for _ in 0..10 {
            if random.below(2) == 0 {
                let (offset, len) = random.range(DISK / 4096, 256);
                let found = read_uncached(&uncached, offset * 4096, index(len * 4096))?;
                self.compare(one, offset * 4096, &found);
            } else {
                let (offset, len) = random.range(DISK, M);
                let mut found = vec![0; index(len)];
                cached.read_exact_at(&mut found, offset)?;
                self.compare(other, offset, &found);
            }
            self.look_for_a_hole(&cached, other, random.below(DISK))?;
        }
        Ok(())
    }

    /// Panics if the file calls something a hole that is none.
    fn look_for_a_hole(&self, file: &File, number: u64, from: u64) -> io::Result<()> {
        let seek = |from: u64, whence| match lseek(file, from.cast_signed(), whence) {
            Ok(found) => Ok(found.cast_unsigned()),
            Err(Errno::ENXIO) => Ok(DISK),
            Err(errno) => Err(io::Error::from(errno)),
        };
        let hole = seek(from, Whence::SeekHole)?;
        let data = seek(hole, Whence::SeekData)?;
        self.compare(number, hole, &vec![0; index(data - hole)]);
        Ok(())
    }
}

/// Stops the readers when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The writer, and what its disk holds.
struct Machine<'a> {
    daemon: Daemon,
    shared: &'a Shared,
    random: Random,
    disk: Vec<u8>,
    /// Snapshots by name, each with the number of its point in time.
    snapshots: BTreeMap<String, u64>,
    last: u64,
}

impl Machine<'_> {
    fn write(&mut self) {
        let (offset, len) = self.random.range(DISK - 4096, DISK / 8);
        let at = 4096 + offset;
        let place = index(at)..index(at + len);
        if self.random.below(5) == 0 {
            self.disk[place].fill(0);
            self.daemon.zero(at, len);
        } else {
            let data = self.random.bytes(index(len));
            self.daemon.write(at, &data);
            self.disk[place].copy_from_slice(&data);
        }
    }

    fn create(&mut self, name: String) {
        self.last += 1;
        self.disk[..4096].copy_from_slice(&self.last.to_be_bytes().repeat(512));
        self.daemon.write(0, &self.disk[..4096]);
        // Readers may see it before the daemon has said that it is done.
        let points = &self.shared.points;
        points.lock().expect("points").bytes.insert(self.last, self.disk.clone());
        self.daemon.create_snapshot(&name);
        let path = self.path(&name);
        let found = read_uncached(&open_uncached(&path).expect("it is there"), 0, 4096);
        assert!(found.expect("read") == self.disk[..4096], "{name} is another one");
        self.snapshots.insert(name, self.last);
    }

    fn delete(&mut self, name: &str) {
        let path = self.path(name);
        let held = open_uncached(&path).expect("it is there");
        read_uncached(&held, 0, 4096).expect("read");
        self.daemon.delete_snapshot(name);
        let number = self.snapshots.remove(name).expect("a snapshot");
        self.shared.points.lock().expect("points").deleted.insert(number);
        // Its space is taken for other data at once.
        (0..3).for_each(|_| self.write());
        let offset = self.random.below(DISK / 4096) * 4096;
        let error = read_uncached(&held, offset, 4096).expect_err("it is gone");
        assert!(is_stale(&error), "{name}: {error}");
        assert_eq!(File::open(&path).expect_err("it is gone").kind(), io::ErrorKind::NotFound);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.shared.root.join("snapshots").join(name).join("disk.raw")
    }

    fn step(&mut self) {
        (0..self.random.below(6)).for_each(|_| self.write());
        // Few names, so that one is soon used again, with the same id.
        let name = format!("s{}", self.random.below(5));
        if self.snapshots.contains_key(&name) {
            self.delete(&name);
        } else {
            self.create(name);
        }
        if self.random.below(8) == 0 {
            self.daemon.flush();
        }
    }
}

#[test]
fn every_read_beside_a_writer_gives_the_bytes_of_its_point_in_time_or_estale() {
    for seed in seeds(3) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let base = images.create("base.qcow2", DISK, "");
        paint(&base, &mut random, DISK, 20);
        let options = ["", "cluster_size=4k", "cluster_size=512", "extended_l2=on", "compat=0.10"];
        let image = images.overlay("disk.qcow2", "base.qcow2", random.pick(&options));
        let cache = random.pick(&[Cache::Host, Cache::Direct]);
        let daemon = Daemon::open(&image, cache);
        let mounted = beside(&image);
        let disk = bytes_of(&base);
        let shared = Shared {
            points: Mutex::default(),
            root: mounted.root().to_path_buf(),
            base: disk.clone(),
            right: AtomicU64::new(0),
            gone: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        };
        let seeds_of_readers = [random.any(), random.any(), random.any()];
        let mut machine =
            Machine { daemon, shared: &shared, random, disk, snapshots: BTreeMap::new(), last: 0 };
        thread::scope(|scope| {
            let shared = &shared;
            // However this ends, the readers do, too.
            let _stop = Stop(&shared.stop);
            let readers = seeds_of_readers.map(|seed| {
                scope.spawn(move || {
                    let mut random = Random::fixed(seed);
                    while !shared.stop.load(Ordering::SeqCst) {
                        shared.read(&mut random);
                    }
                })
            });
            for _ in 0..200 {
                machine.step();
                if readers.iter().any(|reader| reader.is_finished()) {
                    break;
                }
            }
        });
        let (right, gone) =
            (shared.right.load(Ordering::Relaxed), shared.gone.load(Ordering::Relaxed));
        eprintln!("seed {seed}, {cache:?}: {right} reads were right, {gone} times it was gone");
        assert!(right > 0);
        mounted.umount();
        machine.daemon.quit();
        check(&image);
    }
}
