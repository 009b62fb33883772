//! `snapshot` on a live mount, alone and in random turns with overlays, reverts and remounts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::support::images::{Images, check, paint};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, bytes_of_snapshot, holds, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs, start};
use crate::support::watchdog::wait_until;
use crate::support::{M, index};

#[test]
fn a_snapshot_is_made_shown_applied_and_deleted_under_an_open_mount() {
    let images = Images::new();
    let mut random = Random::new(401);
    let base = images.create("base.qcow2", 8 * M, "");
    paint(&base, &mut random, 8 * M, 10);
    let image = images.overlay("disk.qcow2", "base.qcow2", "");
    let mounted = Mounted::new(&image);
    let before = fs::read(mounted.disk()).expect("read");
    let said = qchainfs(&args!["snapshot", "create", mounted.root(), "one"]).ok();
    assert!(said.contains("\"one\""), "{said}");
    fs::write(images.path("patch"), random.bytes(500_000)).expect("write a file");
    let disk = File::options().write(true).open(mounted.disk()).expect("open");
    disk.write_all_at(&fs::read(images.path("patch")).expect("read"), M).expect("write");
    let after = fs::read(mounted.disk()).expect("read");
    holds(&mounted.path("snapshots/one/disk.raw"), &before);
    let listed = qchainfs(&args!["snapshot", "list", mounted.root()]).ok();
    assert!(listed.contains("one"), "{listed}");

    let said = qchainfs(&args!["snapshot", "apply", mounted.root(), "one"]).fails(1);
    assert!(said.contains("open for writing"), "{said}");
    drop(disk);
    let reader = File::open(mounted.disk()).expect("open");
    qchainfs(&args!["snapshot", "create", &image, "two"]).ok();
    qchainfs(&args!["snapshot", "apply", "-n", mounted.root(), "one"]).ok();
    holds(&mounted.disk(), &after);
    qchainfs(&args!["snapshot", "apply", mounted.root(), "one"]).ok();
    let mut bytes = vec![0; before.len()];
    reader.read_exact_at(&mut bytes, 0).expect("read");
    same("the disk for one who had it open", &before, &bytes);
    holds(&mounted.path("snapshots/two/disk.raw"), &after);

    let held = File::open(mounted.path("snapshots/two/disk.raw")).expect("open");
    let said = qchainfs(&args!["snapshot", "delete", mounted.root(), "two"]).fails(1);
    assert!(said.contains("still in use"), "{said}");
    holds(&mounted.path("snapshots/two/disk.raw"), &after);
    drop(held);
    qchainfs(&args!["snapshot", "delete", mounted.root(), "#2"]).ok();
    assert!(!mounted.path("snapshots/two").exists());
    let names = fs::read_dir(mounted.path("snapshots")).expect("list").count();
    assert_eq!(names, 1);
    qchainfs(&args!["snapshot", "delete", mounted.root(), "two"]).fails(10);
    drop(reader);
    mounted.umount();
    check(&image);
    same("the disk", &before, &bytes_of(&image));
    same("the snapshot", &before, &bytes_of_snapshot(&image, "one"));
}

#[test]
fn who_is_in_the_way_of_a_change_is_named_and_nobody_else() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    for name in ["one", "two"] {
        qchainfs(&args!["snapshot", "create", mounted.root(), name]).ok();
    }
    let hold = |file: &Path, writes: bool| {
        let file = File::options().read(true).write(writes).open(file).expect("open");
        start(Command::new("sleep").arg("60").stdin(Stdio::from(file)))
    };
    let mut writer = hold(&mounted.disk(), true);
    let mut reader = hold(&mounted.disk(), false);
    let mut reader_of_one = hold(&mounted.path("snapshots/one/disk.raw"), false);
    let apply = qchainfs(&args!["snapshot", "apply", mounted.root(), "one"]).fails(1);
    let by = |pid: u32| format!("by sleep (pid {pid})\n");
    assert!(apply.contains(&format!("open for writing {}", by(writer.id()))), "{apply}");
    let delete = qchainfs(&args!["snapshot", "delete", mounted.root(), "one"]).fails(1);
    let expected = format!("still in use {}", by(reader_of_one.id()));
    assert!(delete.contains("\"one\"") && delete.contains(&expected), "{delete}");
    qchainfs(&args!["snapshot", "delete", mounted.root(), "two"]).ok();
    for child in [&mut writer, &mut reader, &mut reader_of_one] {
        child.kill().expect("end sleep");
        child.wait().expect("wait for sleep");
    }
    // Closing a file is told to the mount a moment later.
    let apply = || qchainfs(&args!["snapshot", "apply", mounted.root(), "one"]);
    wait_until("nobody is in the way", || apply().code == Some(0));
}

#[test]
fn snapshots_under_parallel_writers_are_points_in_time() {
    const WRITERS: u64 = 4;
    const SNAPSHOTS: usize = 4;
    let images = Images::new();
    let image = images.create("disk.qcow2", 64 * M, "");
    paint(&image, &mut Random::new(402), 64 * M, 60);
    let mounted = Mounted::new(&image);
    let stop = AtomicBool::new(false);
    let done: [AtomicU64; WRITERS as usize] = Default::default();
    let begun: [AtomicU64; WRITERS as usize] = Default::default();
    let numbers = |array: &[AtomicU64]| -> Vec<u64> {
        array.iter().map(|number| number.load(Ordering::SeqCst)).collect()
    };
    let place = |writer: u64, half: u64| half * 32 * M + writer * 20_480;
    let mut windows = Vec::new();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (stop, begun, done) = (&stop, &begun[index(writer)], &done[index(writer)]);
            let disk = File::options().write(true).open(mounted.disk()).expect("open");
            scope.spawn(move || {
                for number in 1_u64.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    begun.store(number, Ordering::SeqCst);
                    let block = number.to_be_bytes().repeat(512);
                    for half in [0, 1] {
                        disk.write_all_at(&block, place(writer, half)).expect("write");
                    }
                    done.store(number, Ordering::SeqCst);
                }
            });
        }
        for snapshot in 0..SNAPSHOTS {
            let written = numbers(&done);
            wait_until("the writers write", || {
                numbers(&done).iter().zip(&written).all(|(now, then)| now > then)
            });
            let before = numbers(&done);
            qchainfs(&args!["snapshot", "create", mounted.root(), format!("s{snapshot}")]).ok();
            windows.push((before, numbers(&begun)));
        }
        stop.store(true, Ordering::SeqCst);
    });
    for (snapshot, (before, after)) in windows.iter().enumerate() {
        let view = File::open(mounted.path(&format!("snapshots/s{snapshot}/disk.raw")));
        let view = view.expect("open a snapshot");
        for writer in 0..WRITERS {
            let number = |half: u64| {
                let mut bytes = [0; 8];
                view.read_exact_at(&mut bytes, place(writer, half)).expect("read a snapshot");
                u64::from_be_bytes(bytes)
            };
            let (first, second) = (number(0), number(1));
            let window = before[index(writer)]..=after[index(writer)];
            assert!(window.contains(&first), "s{snapshot}: {first} is not in {window:?}");
            let order = second == first || second + 1 == first;
            assert!(order, "s{snapshot}: {second} was written behind {first}");
        }
    }
    mounted.umount();
    check(&image);
}

/// A mount and what each of its views must hold.
struct Model<'a> {
    images: &'a Images,
    random: Random,
    mounted: Option<Mounted>,
    /// Files of the chain, the top first, each with its snapshots and, but for the top, what it holds.
    members: Vec<Member>,
    /// Members that a revert took out of the chain.
    left: Vec<Member>,
    disk: Vec<u8>,
    made: u64,
}

struct Member {
    file: PathBuf,
    snapshots: BTreeMap<String, Vec<u8>>,
    holds: Vec<u8>,
}

impl Model<'_> {
    fn mounted(&self) -> &Mounted {
        self.mounted.as_ref().expect("it is mounted")
    }

    fn new_name(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}{}", self.made)
    }

    fn step(&mut self) -> String {
        let root = self.mounted().root().to_path_buf();
        match self.random.below(10) {
            0..=2 => {
                let disk = File::options().write(true).open(self.mounted().disk()).expect("open");
                for _ in 0..self.random.below(6) + 1 {
                    let (at, len) = self.random.range(self.disk.len() as u64, 300_000);
                    let data = self.random.bytes(index(len));
                    disk.write_all_at(&data, at).expect("write");
                    self.disk[index(at)..][..data.len()].copy_from_slice(&data);
                }
                if self.random.below(2) == 0 {
                    disk.sync_all().expect("sync");
                }
                "write".to_owned()
            }
            3 | 4 => {
                let name = self.new_name("s");
                qchainfs(&args!["snapshot", "create", &root, &name]).ok();
                self.members[0].snapshots.insert(name.clone(), self.disk.clone());
                format!("create {name}")
            }
            5 => match self.any_snapshot() {
                None => "nothing to apply".to_owned(),
                Some(name) => {
                    qchainfs(&args!["snapshot", "apply", &root, &name]).ok();
                    self.disk = self.members[0].snapshots[&name].clone();
                    format!("apply {name}")
                }
            },
            6 => match self.any_snapshot() {
                None => "nothing to delete".to_owned(),
                Some(name) => {
                    qchainfs(&args!["snapshot", "delete", &root, &name]).ok();
                    self.members[0].snapshots.remove(&name);
                    format!("delete {name}")
                }
            },
            7 => {
                let name = self.new_name("overlay") + ".qcow2";
                let file = self.images.path(&name);
                qchainfs(&args!["overlay", &root, &file]).ok();
                self.members[0].holds = self.disk.clone();
                let top = Member { file, snapshots: BTreeMap::new(), holds: Vec::new() };
                self.members.insert(0, top);
                format!("overlay {name}")
            }
            8 => {
                let below = 1 + index(self.random.below(self.members.len() as u64 - 1));
                let name = self.new_name("revert") + ".qcow2";
                let file = self.images.path(&name);
                qchainfs(&args!["revert", &root, format!("[{below}]"), &file]).ok();
                self.members[0].holds = self.disk.clone();
                self.disk = self.members[below].holds.clone();
                let top = Member { file, snapshots: BTreeMap::new(), holds: Vec::new() };
                self.left.extend(self.members.splice(..below, [top]));
                format!("revert to {below}")
            }
            _ => {
                self.mounted.take().expect("it is mounted").umount();
                self.check_files();
                same("the image at rest", &self.disk, &bytes_of(&self.members[0].file));
                self.mounted = Some(Mounted::new(&self.members[0].file));
                "remount".to_owned()
            }
        }
    }

    fn check_files(&self) {
        for member in self.members.iter().chain(&self.left) {
            check(&member.file);
        }
        for member in &self.left {
            same("an image that was left", &member.holds, &bytes_of(&member.file));
            for (name, bytes) in &member.snapshots {
                same("its snapshot", bytes, &bytes_of_snapshot(&member.file, name));
            }
        }
    }

    fn any_snapshot(&mut self) -> Option<String> {
        let names: Vec<&String> = self.members[0].snapshots.keys().collect();
        let count = names.len() as u64;
        (count > 0).then(|| names[index(self.random.below(count))].clone())
    }

    fn every_view_holds_what_it_must(&self) {
        holds(&self.mounted().disk(), &self.disk);
        for (number, member) in self.members.iter().enumerate() {
            let directory = match number {
                0 => self.mounted().root().to_path_buf(),
                _ => self.mounted().path(&format!("chain/{number}")),
            };
            if number > 0 {
                holds(&directory.join("disk.raw"), &member.holds);
            }
            let listed = fs::read_dir(directory.join("snapshots")).expect("list").count();
            assert_eq!(listed, member.snapshots.len());
            for (name, bytes) in &member.snapshots {
                holds(&directory.join("snapshots").join(name).join("disk.raw"), bytes);
            }
        }
    }
}

#[test]
fn random_turns_of_writes_snapshots_overlays_reverts_and_mounts_keep_every_view() {
    for seed in seeds(4) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let base = images.create("base.qcow2", 3 * M, "");
        paint(&base, &mut random, 3 * M, 10);
        let options = [
            "",
            "cluster_size=4k",
            "cluster_size=512,refcount_bits=8",
            "cluster_size=16k,extended_l2=on",
        ];
        let options = random.pick(&options);
        let top = images.overlay("top.qcow2", "base.qcow2", options);
        let member = |file: &PathBuf| Member {
            file: file.clone(),
            snapshots: BTreeMap::new(),
            holds: bytes_of(file),
        };
        let mut model = Model {
            images: &images,
            random,
            disk: bytes_of(&top),
            members: vec![member(&top), member(&base)],
            mounted: Some(Mounted::new(&top)),
            left: Vec::new(),
            made: 0,
        };
        let mut steps = Vec::new();
        for _ in 0..28 {
            steps.push(model.step());
            eprintln!("seed {seed}: {}", steps.join(", "));
            model.every_view_holds_what_it_must();
        }
        model.mounted.take().expect("it is mounted").umount();
        model.check_files();
    }
}
