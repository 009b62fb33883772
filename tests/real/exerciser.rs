//! Every way to read and write a file, mixed at random on one disk: plain calls, O_DIRECT, shared maps, holes, reopening
//! and remounting, each against a plain vector.

use std::fs::File;

use crate::direct::{aligned, open_direct};
use crate::support::images::{Images, paint};
use crate::support::mapped::mapped;
use crate::support::oracle::{read_at, same};
use crate::support::random::{Random, seeds};
use crate::support::writer::Writer;
use crate::support::{K, M, index};

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const SESSIONS: usize = 3;
const STEPS: usize = 150;
const SECTOR: u64 = 512;

/// By which calls bytes come and go.
#[derive(Debug, Clone, Copy)]
enum Way {
    Plain,
    Direct,
    Map,
}

/// One step, on a range of the disk.
#[derive(Debug, Clone, Copy)]
enum Step {
    Read(Way),
    Write(Way),
    Punch,
    Zero,
    Sync,
    Reopen,
}

impl Step {
    fn random(random: &mut Random) -> Self {
        let way = random.pick(&[Way::Plain, Way::Direct, Way::Map]);
        match random.below(16) {
            0..5 => Self::Read(way),
            5..11 => Self::Write(way),
            11 | 12 => Self::Punch,
            13 => Self::Zero,
            14 => Self::Sync,
            _ => Self::Reopen,
        }
    }
}

/// A mounted disk, open with and without O_DIRECT.
struct Session {
    plain: File,
    direct: File,
    writer: Writer,
}

impl Session {
    fn start(image: &Path) -> Self {
        let writer = Writer::open(image);
        let (plain, direct) = open_both(&writer.mounted().disk());
        Self { plain, direct, writer }
    }

    fn end(self) {
        drop((self.plain, self.direct));
        self.writer.close();
    }

    fn step(&mut self, step: Step, random: &mut Random) {
        let size = self.writer.bytes().len() as u64;
        let (mut offset, mut len) = random.range(size, 200 * K);
        if let Step::Read(Way::Direct) | Step::Write(Way::Direct) = step {
            let end = (offset + len).next_multiple_of(SECTOR).min(size);
            offset = offset / SECTOR * SECTOR;
            len = end - offset;
        }
        match step {
            Step::Read(way) => {
                let expected = &self.writer.bytes()[index(offset)..index(offset + len)];
                same(&format!("{step:?} at {offset}"), expected, &self.read(way, offset, len));
            }
            Step::Write(way) => {
                let data = random.bytes(index(len));
                self.write(way, offset, &data);
                self.writer.bytes_mut()[index(offset)..index(offset + len)].copy_from_slice(&data);
            }
            Step::Punch => self.writer.punch(offset, len),
            Step::Zero => self.writer.zero(offset, len),
            Step::Sync => self.plain.sync_all().expect("fsync"),
            Step::Reopen => {
                (self.plain, self.direct) = open_both(&self.writer.mounted().disk());
            }
        }
    }

    fn read(&self, way: Way, offset: u64, len: u64) -> Vec<u8> {
        match way {
            Way::Plain => read_at(&self.plain, offset, index(len)),
            Way::Direct => aligned(&vec![0; index(len)], |place| {
                self.direct.read_exact_at(place, offset).expect("a direct read");
                place.to_vec()
            }),
            Way::Map => mapped(&self.plain, offset, len, |bytes| bytes.to_vec()),
        }
    }

    fn write(&self, way: Way, offset: u64, data: &[u8]) {
        match way {
            Way::Plain => self.plain.write_all_at(data, offset).expect("a write"),
            Way::Direct => aligned(data, |place| {
                self.direct.write_all_at(place, offset).expect("a direct write");
            }),
            Way::Map => {
                mapped(&self.plain, offset, data.len() as u64, |bytes| bytes.copy_from_slice(data));
            }
        }
    }
}

fn open_both(disk: &Path) -> (File, File) {
    let plain = File::options().read(true).write(true).open(disk).expect("open");
    (plain, open_direct(disk))
}

fn any_image(images: &Images, random: &mut Random) -> PathBuf {
    let size = SECTOR * (1 + random.below(4 * K));
    let cluster = random.pick(&["512", "4k", "64k", "2M"]);
    let compat = random.pick(&["0.10", "1.1", "1.1"]);
    let options = format!("compat={compat},cluster_size={cluster}");
    eprintln!("{size} bytes, {options}");
    if random.below(2) == 0 {
        return images.create("disk.qcow2", size, &options);
    }
    let base = images.create("base.qcow2", M, "");
    paint(&base, random, M, 8);
    images.overlay_sized("disk.qcow2", "base.qcow2", size, &options)
}

#[test]
fn plain_direct_and_mapped_reads_and_writes_agree_with_a_vector() {
    for seed in seeds(4) {
        let mut random = Random::new(seed);
        let images = Images::new();
        let image = any_image(&images, &mut random);
        for _ in 0..SESSIONS {
            let mut session = Session::start(&image);
            for _ in 0..STEPS {
                let step = Step::random(&mut random);
                session.step(step, &mut random);
            }
            session.end();
        }
    }
}
