//! The main job from beginning to end: three points in time of one disk, as files.
//!
//!     cargo run --release --example walkthrough
//!
//! Needs /dev/fuse and nothing else: the images are made by this library, too.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use qchainfs::chain::{Chain, OpenOptions};
use qchainfs::error::{Error, Result};
use qchainfs::image::{CreateOptions, NewBacking, NewImage, Writability};
use qchainfs::mount::{
    Audience, BesideWriter, DiscardMode, Growth, MountOptions, Ownership, Session, TreeOptions, Way,
};
use qchainfs::qcow2::{Geometry, Version};
use qchainfs::store::FileStore;
use qchainfs::units::GuestOffset;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The three writes of the story: where, how long, which byte.
const FIRST: (u64, u64, u8) = (99 * MIB - 512, 65 * KIB, 0x11);
const SECOND: (u64, u64, u8) = (99 * MIB - 64 * KIB + 512, 512, 0x22);
const THIRD: (u64, u64, u8) = (99 * MIB - 63 * KIB, 64 * KIB, 0xff);

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let (base, wrap) = (directory.path().join("base.qcow2"), directory.path().join("wrap.qcow2"));

    println!("1. base.qcow2, a disk of 100 MiB: 65 KiB of 0x11 just below 99 MiB");
    create(&base, 100 * MIB, None)?;
    let chain = open(&base)?;
    write(&chain, FIRST)?;
    println!("2. an internal snapshot of it, \"one\"; then 512 bytes of 0x22");
    if let Some(image) = chain.active_image() {
        image.create_snapshot("one")?;
    }
    write(&chain, SECOND)?;
    chain.close()?;
    drop(chain);
    println!("3. wrap.qcow2, an overlay on it: 64 KiB of 0xff");
    create(&wrap, 100 * MIB, Some("base.qcow2"))?;
    let chain = open(&wrap)?;
    write(&chain, THIRD)?;
    chain.close()?;

    let mountpoint = directory.path().join("disk");
    fs::create_dir(&mountpoint)?;
    println!("4. mounted:");
    let session = Session::mount(chain.view(0)?, &mount_options(&wrap, &mountpoint))?;
    let stop = session.stop();
    let server = thread::spawn(move || session.run());
    let shown = show(&mountpoint);
    stop.request();
    server.join().map_err(|_| "the server ran into a bug")??;
    shown?;
    println!("8. unmounted; wrap.qcow2 is closed and clean.");
    Ok(())
}

fn create(path: &Path, size: u64, backing: Option<&str>) -> Result<()> {
    let options = CreateOptions {
        size,
        version: Version::V3,
        geometry: Geometry::new(16, 4),
        backing: backing.map(|name| NewBacking {
            name: name.as_bytes().to_vec(),
            format: "qcow2".to_owned(),
            record: None,
        }),
    };
    NewImage::plan(&options)?.write(&FileStore::create_new(path)?)
}

fn open(path: &Path) -> Result<Arc<Chain>> {
    let options = OpenOptions { writability: Writability::Writable, ..OpenOptions::default() };
    Ok(Arc::new(Chain::open(path, &options)?))
}

fn write(chain: &Arc<Chain>, (at, len, byte): (u64, u64, u8)) -> Result<()> {
    chain.view(0)?.write(GuestOffset::new(at), &vec![byte; len as usize])
}

fn mount_options(image: &Path, mountpoint: &Path) -> MountOptions {
    let (uid, gid) = fs::metadata(image).map_or((0, 0), |file| (file.uid(), file.gid()));
    MountOptions {
        mountpoint: mountpoint.to_path_buf(),
        tree: TreeOptions {
            image: image.to_path_buf(),
            first_member: 0,
            ownership: Ownership { uid, gid, umask: 0o027 },
            growth: Growth::Fixed,
            discard: DiscardMode::Unmap,
            scratch: None,
            beside_writer: BesideWriter::Immutable,
        },
        audience: Audience::Owner,
        flags: Vec::new(),
        threads: None,
        way: Way::Best,
    }
}

fn show(mountpoint: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
    list(mountpoint, 1)?;
    let views = [
        ("disk.raw", "the active layer"),
        ("chain/1/disk.raw", "base.qcow2 as it is"),
        ("chain/1/snapshots/one/disk.raw", "base.qcow2 at snapshot one"),
    ];
    println!("5. one byte of each of the three writes, at three points in time:");
    println!("   {:<32}0x11  0x22  0xff", "");
    for (name, meaning) in views {
        let file = File::open(mountpoint.join(name))?;
        let mut seen = Vec::new();
        for (at, len, _) in [FIRST, SECOND, THIRD] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at + if at == FIRST.0 { len - 1 } else { 0 })?;
            seen.push(format!("{:#04x}", byte[0]));
        }
        println!("   {name:<32}{}   {meaning}", seen.join("  "));
        let expected: &[&str] = match name {
            "disk.raw" => &["0x11", "0x22", "0xff"],
            "chain/1/disk.raw" => &["0x11", "0x22", "0x00"],
            _ => &["0x11", "0x00", "0x00"],
        };
        if seen != expected {
            return Err(Error::corrupt(format!("{name}: expected {expected:?}")).into());
        }
    }

    println!("6. a write to disk.raw lands in wrap.qcow2 and nowhere else:");
    let disk = File::options().read(true).write(true).open(mountpoint.join("disk.raw"))?;
    disk.write_all_at(b"written through the mount", 0)?;
    disk.sync_all()?;
    for (name, _) in views {
        let mut begin = [0; 25];
        File::open(mountpoint.join(name))?.read_exact_at(&mut begin, 0)?;
        let begin = String::from_utf8_lossy(&begin).replace('\0', ".");
        println!("   {name:<32}{begin}");
    }

    println!("7. a copy of the snapshot, taken with nothing but a file copy:");
    let copy = mountpoint.with_file_name("one.raw");
    fs::copy(mountpoint.join(views[2].0), &copy)?;
    let (view, copied) = (fs::metadata(mountpoint.join(views[2].0))?, fs::metadata(&copy)?);
    println!(
        "   {} bytes, of which the view has {} KiB allocated",
        copied.len(),
        view.blocks() / 2
    );
    Ok(())
}

fn list(directory: &Path, depth: usize) -> std::io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(directory)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let (name, metadata) = (entry.file_name(), entry.metadata()?);
        let about = if metadata.is_symlink() {
            format!(" -> {}", fs::read_link(entry.path())?.display())
        } else if metadata.is_dir() {
            "/".to_owned()
        } else {
            format!("  {} bytes, {} KiB allocated", metadata.len(), metadata.blocks() / 2)
        };
        println!("{}{}{about}", "   ".repeat(depth), name.display());
        if metadata.is_dir() {
            list(&entry.path(), depth + 1)?;
        }
    }
    Ok(())
}
