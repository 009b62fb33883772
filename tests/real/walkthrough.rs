//! The whole idea in one scene: three moments of a disk, each a file.

use crate::support::images::{Images, Untouched, io, snapshot};
use crate::support::mounted::Mounted;
use crate::support::oracle::holds;
use crate::support::{K, M, index};

const SIZE: u64 = 100 * M;

fn write(disk: &mut [u8], offset: u64, len: u64, byte: u8) {
    disk[index(offset)..index(offset + len)].fill(byte);
}

#[test]
fn a_snapshot_its_image_and_an_overlay_are_three_files_with_the_bytes_of_their_moments() {
    let images = Images::new();
    let mut disk = vec![0; index(SIZE)];

    let base = images.create("base.qcow2", SIZE, "");
    let border = 99 * M;
    io(&base, &[format!("write -P 0x11 {} 65k", border - 512)]);
    write(&mut disk, border - 512, 65 * K, 0x11);
    let at_the_snapshot = disk.clone();
    snapshot(&base, "one");

    io(&base, &[format!("write -P 0x22 {} 512", border - 64 * K + 512)]);
    write(&mut disk, border - 64 * K + 512, 512, 0x22);
    let below_the_overlay = disk.clone();

    let wrap = images.overlay("wrap.qcow2", "base.qcow2", "");
    io(&wrap, &[format!("write -P 0xff {} 64k", border - 63 * K)]);
    write(&mut disk, border - 63 * K, 64 * K, 0xff);

    let untouched = Untouched::now(&[base, wrap.clone()]);
    let mounted = Mounted::new(&wrap);
    holds(&mounted.disk(), &disk);
    holds(&mounted.path("chain/0/disk.raw"), &disk);
    holds(&mounted.path("chain/1/disk.raw"), &below_the_overlay);
    holds(&mounted.path("chain/by-name/base.qcow2/disk.raw"), &below_the_overlay);
    holds(&mounted.path("chain/1/snapshots/one/disk.raw"), &at_the_snapshot);
    mounted.umount();
    untouched.verify();
}
