//! The ways through the library that decide how fast a mount is, each as something that can be done again and again.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qchainfs::chain::{Chain, OpenOptions, View};
use qchainfs::image::{CreateOptions, NewBacking, NewImage, Writability};
use qchainfs::qcow2::{Geometry, Version};
use qchainfs::store::FileStore;
use qchainfs::units::{GuestOffset, GuestRange};
use tempfile::TempDir;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// The disk of most works.
const SIZE: u64 = 64 * MIB;
/// Clusters of 64 KiB, refcounts of 16 bits.
const CLUSTER: u64 = 64 * KIB;

/// Something to be done again and again.
pub struct Work {
    /// What it does.
    pub name: &'static str,
    /// Does it once; the number says how often it was done before.
    pub step: Box<dyn FnMut(u64)>,
    // Dropped behind the chain that works on it.
    _directory: TempDir,
}

/// The names of all works.
pub const NAMES: [&str; 7] = [
    "look up an extent, depth 1",
    "look up an extent, depth 64",
    "plan a read of 1 MiB in 16 runs",
    "read 4 KiB, depth 1",
    "read 4 KiB, depth 64",
    "overwrite 4 KiB",
    "write a new cluster",
];

/// The work of that name, prepared.
///
/// # Errors
/// No such work; images that can't be made.
pub fn prepare(name: &'static str) -> Result<Work> {
    let directory = tempfile::tempdir()?;
    let step: Box<dyn FnMut(u64)> = match name {
        "look up an extent, depth 1" => look_up(chain_of(&directory, 1)?),
        "look up an extent, depth 64" => look_up(chain_of(&directory, 64)?),
        "plan a read of 1 MiB in 16 runs" => {
            let view = scattered(&directory)?;
            Box::new(move |number| {
                let start = GuestOffset::new(number % (SIZE / MIB) * MIB);
                let runs = view.extents(GuestRange::new(start, MIB)).count();
                assert!(runs > 0);
            })
        }
        "read 4 KiB, depth 1" => read(chain_of(&directory, 1)?),
        "read 4 KiB, depth 64" => read(chain_of(&directory, 64)?),
        "overwrite 4 KiB" => {
            let view = open(&base(&directory)?, Writability::Writable)?;
            let data = [7; 4096];
            Box::new(move |number| {
                view.write(place(number), &data).expect("write");
            })
        }
        "write a new cluster" => {
            let image = directory.path().join("new.qcow2");
            create(&image, 1 << 40, None)?;
            let view = open(&image, Writability::Writable)?;
            let data = vec![7; CLUSTER as usize];
            Box::new(move |number| {
                view.write(GuestOffset::new(number * CLUSTER), &data).expect("write");
            })
        }
        _ => return Err(format!("there is no work \"{name}\"").into()),
    };
    Ok(Work { name, step, _directory: directory })
}

fn look_up(view: View) -> Box<dyn FnMut(u64)> {
    Box::new(move |number| {
        view.extent(GuestRange::new(place(number), 4 * KIB)).expect("look up");
    })
}

fn read(view: View) -> Box<dyn FnMut(u64)> {
    let mut buffer = vec![0; 4096];
    Box::new(move |number| view.read(place(number), &mut buffer).expect("read"))
}

/// A block of 4 KiB somewhere on the disk, another one for each number.
fn place(number: u64) -> GuestOffset {
    GuestOffset::new(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (SIZE / 4096) * 4096)
}

fn create(image: &Path, size: u64, backing: Option<&Path>) -> Result<()> {
    let backing = backing.map(|base| NewBacking {
        name: base.as_os_str().as_encoded_bytes().to_vec(),
        format: "qcow2".into(),
        record: None,
    });
    let geometry = Geometry::new(CLUSTER.trailing_zeros(), 4);
    let options = CreateOptions { size, version: Version::V3, geometry, backing };
    Ok(NewImage::plan(&options)?.write(&FileStore::create_new(image)?)?)
}

fn open(image: &Path, writability: Writability) -> Result<View> {
    let options = OpenOptions { writability, ..OpenOptions::default() };
    Ok(Arc::new(Chain::open(image, &options)?).view(0)?)
}

/// An image that is full of data.
fn base(directory: &TempDir) -> Result<PathBuf> {
    let image = directory.path().join("base.qcow2");
    create(&image, SIZE, None)?;
    let view = open(&image, Writability::Writable)?;
    let data = vec![1; MIB as usize];
    for start in (0..SIZE).step_by(MIB as usize) {
        view.write(GuestOffset::new(start), &data)?;
    }
    view.chain().close()?;
    Ok(image)
}

/// A chain of `depth` members, each with a cluster of its own above a full base.
fn chain_of(directory: &TempDir, depth: u64) -> Result<View> {
    let mut top = base(directory)?;
    for number in 1..depth {
        let image = directory.path().join(format!("{number}.qcow2"));
        create(&image, SIZE, Some(&top))?;
        let view = open(&image, Writability::Writable)?;
        view.write(GuestOffset::new(number * 7 * CLUSTER % SIZE), &[2; CLUSTER as usize])?;
        view.chain().close()?;
        top = image;
    }
    open(&top, Writability::ReadOnly)
}

/// A disk of which no two neighbouring clusters are neighbours in the file.
fn scattered(directory: &TempDir) -> Result<View> {
    let image = directory.path().join("scattered.qcow2");
    create(&image, SIZE, None)?;
    let view = open(&image, Writability::Writable)?;
    let clusters = SIZE / CLUSTER;
    for number in 0..clusters {
        // 167 has no divisor in common with the number of clusters.
        let cluster = number * 167 % clusters;
        view.write(GuestOffset::new(cluster * CLUSTER), &[3; CLUSTER as usize])?;
    }
    view.chain().close()?;
    drop(view);
    open(&image, Writability::ReadOnly)
}
