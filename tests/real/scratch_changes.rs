//! Scratch twins while the chain under them changes, in random turns.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::scratch::{open, scratch};
use crate::support::images::{Images, check, paint};
use crate::support::mounted::Mounted;
use crate::support::oracle::{holds, read_at, same};
use crate::support::random::{Random, seeds};
use crate::support::tools::{args, qchainfs};
use crate::support::watchdog::wait_until;
use crate::support::{K, M, index};

const SIZE: u64 = 4 * M;

/// A view, and its twin as far as it was written.
struct View {
    bytes: Vec<u8>,
    twin: Vec<u8>,
    /// Files that are open since some earlier moment.
    open: Vec<File>,
}

impl View {
    fn of(bytes: Vec<u8>) -> Self {
        Self { twin: bytes.clone(), bytes, open: Vec::new() }
    }
}

/// A mount with twins and what each view and twin must hold.
struct Model<'a> {
    images: &'a Images,
    mounted: &'a Mounted,
    random: Random,
    disk: Vec<u8>,
    /// The members that were active once, by the number of images on top of them today less one.
    members: Vec<View>,
    /// By name, which none of two members share: the place of its member, 0 the active one, and what it holds.
    snapshots: BTreeMap<String, (usize, View)>,
    made: usize,
}

impl Model<'_> {
    /// Where the views of the member are that has `above` images on top of it.
    fn member(above: usize) -> PathBuf {
        if above == 0 { PathBuf::from(".") } else { PathBuf::from(format!("chain/{above}")) }
    }

    fn scribble(random: &mut Random, disk: &File, bytes: &mut [u8]) {
        for _ in 0..random.below(5) + 1 {
            let (at, len) = random.range(SIZE, 200 * K);
            let data = random.bytes(index(len));
            disk.write_all_at(&data, at).expect("write");
            bytes[index(at)..][..data.len()].copy_from_slice(&data);
        }
    }

    fn new_name(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}{}", self.made)
    }

    /// Writes to a twin, by a file that may have been open for long.
    fn write_to(&mut self, directory: PathBuf, mut view: View) -> View {
        let path = self.mounted.path("scratch").join(directory).join("disk.raw");
        if view.open.is_empty() || self.random.below(3) == 0 {
            view.open.push(open(&path));
        }
        let choice = self.random.below(view.open.len() as u64);
        Self::scribble(&mut self.random, &view.open[index(choice)], &mut view.twin);
        holds(&path, &view.twin);
        if self.random.below(2) == 0 {
            view.open.remove(index(choice));
        }
        view
    }

    fn step(&mut self) -> String {
        let root = self.mounted.root().to_path_buf();
        let names: Vec<String> = self.snapshots.keys().cloned().collect();
        let any = |random: &mut Random| index(random.below(names.len() as u64));
        match self.random.below(12) {
            0 | 1 => {
                Self::scribble(&mut self.random, &open(&self.mounted.disk()), &mut self.disk);
                "write".to_owned()
            }
            2 | 3 => {
                let name = self.new_name("s");
                qchainfs(&args!["snapshot", "create", root, name]).ok();
                self.snapshots.insert(name.clone(), (0, View::of(self.disk.clone())));
                format!("create {name}")
            }
            4 if self.members.len() < 4 => {
                let name = self.new_name("overlay") + ".qcow2";
                qchainfs(&args!["overlay", root, self.images.path(&name)]).ok();
                self.members.insert(0, View::of(self.disk.clone()));
                self.snapshots.values_mut().for_each(|(above, _)| *above += 1);
                format!("overlay {name}")
            }
            5 if !names.is_empty() => {
                let name = &names[any(&mut self.random)];
                let (above, view) = &self.snapshots[name];
                let changed = view.twin != view.bytes;
                let delete = || qchainfs(&args!["snapshot", "delete", root, name]);
                match (above, changed || !view.open.is_empty()) {
                    (0, false) => {
                        wait_until("it can be deleted", || delete().code == Some(0));
                        self.snapshots.remove(name);
                    }
                    (0, true) => assert!(delete().fails(1).contains("still in use")),
                    _ => assert!(delete().fails(10).contains("no internal snapshot")),
                }
                format!("delete {name}")
            }
            6..=8 if !names.is_empty() => {
                let name = &names[any(&mut self.random)];
                let (above, view) = self.snapshots.remove(name).expect("it is there");
                let directory = Self::member(above).join("snapshots").join(name);
                let view = self.write_to(directory, view);
                self.snapshots.insert(name.clone(), (above, view));
                format!("write to the twin of {name}")
            }
            9 | 10 if !self.members.is_empty() => {
                let choice = index(self.random.below(self.members.len() as u64));
                let view = self.members.remove(choice);
                let view = self.write_to(Self::member(choice + 1), view);
                self.members.insert(choice, view);
                format!("write to the twin of member {}", choice + 1)
            }
            11 if !names.is_empty() => {
                let name = &names[any(&mut self.random)];
                let (above, view) = self.snapshots.get_mut(name).expect("it is there");
                view.open.clear();
                let directory = Self::member(*above).join("snapshots").join(name);
                let directory = self.mounted.path("scratch").join(directory);
                let copy = self.images.path("copy.raw");
                qchainfs(&args!["clone", "-q", "-O", "raw", directory, &copy]).ok();
                holds(&copy, &view.twin);
                fs::remove_file(copy).expect("take it away");
                format!("clone {name}")
            }
            _ => "nothing".to_owned(),
        }
    }

    fn verify(&self) {
        let mounted = self.mounted;
        holds(&mounted.disk(), &self.disk);
        let members = self.members.iter().zip(1..).map(|(view, above)| (Self::member(above), view));
        let snapshots = self
            .snapshots
            .iter()
            .map(|(name, (above, view))| (Self::member(*above).join("snapshots").join(name), view));
        for (directory, view) in members.chain(snapshots) {
            holds(&mounted.root().join(&directory).join("disk.raw"), &view.bytes);
            holds(&mounted.path("scratch").join(&directory).join("disk.raw"), &view.twin);
            for file in &view.open {
                same("a twin that was open before", &view.twin, &read_at(file, 0, index(SIZE)));
            }
        }
    }
}

#[test]
fn twins_and_views_hold_what_they_must_whatever_becomes_of_the_chain() {
    for seed in seeds(4) {
        let images = Images::new();
        let mut random = Random::new(seed);
        let image = images.create("disk.qcow2", SIZE, "cluster_size=16k");
        paint(&image, &mut random, SIZE, 12);
        let place = TempDir::new().expect("make a directory");
        let mounted = Mounted::with(&scratch(place.path(), ""), &image);
        let disk = fs::read(mounted.disk()).expect("read");
        let mut model = Model {
            images: &images,
            mounted: &mounted,
            random,
            disk,
            members: Vec::new(),
            snapshots: BTreeMap::new(),
            made: 0,
        };
        for _ in 0..40 {
            let step = model.step();
            println!("{step}");
            model.verify();
        }
        drop(model);
        mounted.umount();
        assert_eq!(fs::read_dir(place.path()).expect("list").count(), 0);
        for file in fs::read_dir(images.path("")).expect("list") {
            let file = file.expect("an entry").path();
            check(&file);
        }
    }
}
