//! The sound images that are then spoiled.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::images::{Images, io, snapshot};
use crate::support::tools::{args, run};
use crate::support::{K, M};

/// What kind of image it is. All have clusters of 64 KiB and a disk of 4 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Data in the clusters 0 to 7, an allocated zero cluster 8, a plain one 9.
    Plain,
    Version2,
    /// Over a raw file.
    Overlay,
    /// Compressed clusters 0 to 7.
    Zlib,
    Zstd,
    Extended,
    DataFile,
    RawDataFile,
    /// A snapshot "one", which is what is read; the active disk has other clusters.
    Snapshot,
    /// The same, and the active disk is read.
    BesideSnapshot,
    Bitmaps,
    Luks,
}

/// Where images are made and copied.
pub struct Workshop {
    images: Images,
    made: BTreeMap<Kind, PathBuf>,
    key: PathBuf,
}

impl Workshop {
    pub fn new() -> Self {
        let images = Images::new();
        let key = images.raw("key", b"key");
        images.raw("base.raw", &[0xba; 4 << 20]);
        Self { images, made: BTreeMap::new(), key }
    }

    /// The key of encrypted images.
    pub fn key(&self) -> &Path {
        &self.key
    }

    /// A fresh image.
    pub fn copy(&mut self, kind: Kind) -> PathBuf {
        let images = &self.images;
        let sound = self.made.entry(kind).or_insert_with(|| make(images, kind));
        let copy = images.path("spoiled.qcow2");
        fs::copy(sound, &copy).expect("copy an image");
        copy
    }
}

fn make(images: &Images, kind: Kind) -> PathBuf {
    let name = &format!("{kind:?}.qcow2");
    let plain =
        ["write -P 1 0 512k", "write -P 2 512k 64k", "write -z 512k 64k", "write -z -u 576k 64k"];
    let external = |raw: &str| {
        let data = images.path(&format!("{kind:?}.data"));
        format!("data_file={},data_file_raw={raw}", data.display())
    };
    let create = |options: &str| images.create(name, 4 * M, options);
    let image = match kind {
        Kind::Version2 => create("compat=0.10"),
        Kind::Overlay => return images.overlay(name, "base.raw", ""),
        Kind::Zlib | Kind::Zstd => {
            let image = create(&format!("compression_type={}", name[..4].to_lowercase()));
            let write =
                |cluster: u64| format!("write -c -P {} {} 64k", cluster + 1, cluster * 64 * K);
            io(&image, &(0..8).map(write).collect::<Vec<_>>());
            return image;
        }
        Kind::Extended => create("extended_l2=on"),
        Kind::DataFile => create(&external("off")),
        Kind::RawDataFile => create(&external("on")),
        Kind::Luks => return luks(images, name),
        _ => create(""),
    };
    match kind {
        Kind::Version2 => io(&image, &plain[..2]),
        _ => io(&image, &plain),
    }
    match kind {
        Kind::Snapshot | Kind::BesideSnapshot => {
            snapshot(&image, "one");
            io(&image, &["write -P 3 0 256k"]);
        }
        Kind::Bitmaps => {
            run("qemu-img", &args!["bitmap", "--add", image, "nightly"]);
        }
        _ => {}
    }
    image
}

fn luks(images: &Images, name: &str) -> PathBuf {
    let image = images.path(name);
    let object = format!("secret,id=key,file={}", images.path("key").display());
    let options = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=key";
    let words =
        args!["create", "-q", "-f", "qcow2", "--object", object, "-o", options, image, "4M"];
    run("qemu-img", &words);
    let options = format!("driver=qcow2,file.filename={},encrypt.key-secret=key", image.display());
    run("qemu-io", &args!["--object", object, "--image-opts", "-c", "write -P 1 0 512k", options]);
    image
}
