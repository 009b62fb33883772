//! What a writer that does not know everything must leave alone.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::support::M;
use crate::support::images::{Images, check, io, poke};
use crate::support::mounted::Mounted;
use crate::support::oracle::{bytes_of, holds, reads_as};
use crate::support::tools::{args, run};
use crate::support::writer::Writer;

const COMPATIBLE_BITS: u64 = 80;
const AUTOCLEAR_BITS: u64 = 88;

fn bits(image: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(image).expect("open").read_exact_at(&mut bytes, offset).expect("read");
    u64::from_be_bytes(bytes)
}

#[test]
fn an_image_with_bitmaps_is_read_and_not_written() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    run("qemu-img", &args!["bitmap", "--add", image, "nightly"]);
    io(&image, &["write -P 7 0 64k"]);
    let said = Mounted::refused(&[], &image, 14);
    assert!(said.contains("bitmaps"), "{said}");
    let mounted = Mounted::read_only(&image);
    reads_as(&mounted.disk(), &image);
    mounted.umount();
    assert_eq!(bits(&image, AUTOCLEAR_BITS), 1, "the bitmaps still count");
}

#[test]
fn unknown_autoclear_bits_are_cleared_by_the_first_write_and_not_before() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    poke(&image, AUTOCLEAR_BITS, &(1_u64 << 40).to_be_bytes());
    Mounted::new(&image).umount();
    assert_eq!(bits(&image, AUTOCLEAR_BITS), 1 << 40);
    let mut writer = Writer::open(&image);
    writer.fill(0, 10, 1);
    writer.close();
    assert_eq!(bits(&image, AUTOCLEAR_BITS), 0);
}

#[test]
fn unknown_compatible_bits_and_extensions_survive_a_write() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    poke(&image, COMPATIBLE_BITS, &(1_u64 << 40 | 1).to_be_bytes());
    // The first extension becomes one that nobody knows.
    poke(&image, 112, &0x1234_5678_u32.to_be_bytes());
    let mut before = [0; 512];
    File::open(&image).expect("open").read_exact_at(&mut before, 0).expect("read");
    let mut writer = Writer::open(&image);
    writer.fill(5000, 100_000, 9);
    writer.close();
    let mut after = [0; 512];
    File::open(&image).expect("open").read_exact_at(&mut after, 0).expect("read");
    assert_eq!(before[72..], after[72..]);
}

#[test]
fn a_snapshot_that_the_library_makes_is_one_to_qemu() {
    use qchainfs::chain::{Chain, OpenOptions};
    use qchainfs::image::Writability;
    use qchainfs::units::GuestOffset;
    use std::sync::Arc;

    for options in ["compat=0.10", "cluster_size=512", "cluster_size=64k", "refcount_bits=8"] {
        let images = Images::new();
        let image = images.create("disk.qcow2", 2 * M, options);
        io(&image, &["write -P 1 0 1M", "write -c -P 2 1M 256k"]);
        let open = OpenOptions { writability: Writability::Writable, ..OpenOptions::default() };
        let chain = Arc::new(Chain::open(&image, &open).expect("open"));
        let view = chain.view(0).expect("a view");
        let before = bytes_of(&image);
        chain.active_image().expect("a qcow2 image").create_snapshot("one").expect("a snapshot");
        view.write(GuestOffset::new(1000), &[3; 200_000]).expect("write");
        view.write(GuestOffset::new(M + 1000), &[4; 100_000]).expect("write");
        chain.active_image().expect("a qcow2 image").create_snapshot("two").expect("a snapshot");
        view.write(GuestOffset::new(2000), &[5; 1000]).expect("write");
        chain.close().expect("close");
        let after = {
            let mut bytes = vec![0; 2 * M as usize];
            view.read(GuestOffset::ZERO, &mut bytes).expect("read");
            bytes
        };
        drop((view, chain));
        check(&image);
        let mounted = Mounted::read_only(&image);
        holds(&mounted.path("snapshots/one/disk.raw"), &before);
        holds(&mounted.disk(), &after);
        mounted.umount();
        // QEMU goes back to the first, forgets both, and finds nothing to repair.
        run("qemu-img", &args!["snapshot", "-a", "one", image]);
        assert_eq!(bytes_of(&image), before, "{options}");
        run("qemu-img", &args!["snapshot", "-d", "one", image]);
        run("qemu-img", &args!["snapshot", "-d", "two", image]);
        check(&image);
    }
}
