//! Compares every view of a chain with what QEMU read.

use std::sync::Arc;

use qchainfs::chain::{Chain, OpenOptions, View};
use qchainfs::units::GuestOffset;

use super::build::Member;
use crate::cli_check;
use crate::cli_info::{says_what_qemu_says, settle};
use crate::cli_map::json_is_the_same;
use crate::support::index;
use crate::support::mounted::Mounted;
use crate::support::oracle::{holds, same};
use crate::support::random::Random;
use crate::support::tools::args;

/// All views, read by the library; gives their number.
pub fn in_process(members: &[Member], random: &mut Random) -> usize {
    let opened = Chain::open(
        members[0].path(),
        &OpenOptions { secrets: members[0].opening.secrets(), ..OpenOptions::default() },
    );
    let chain = Arc::new(opened.unwrap_or_else(|error| panic!("open: {error}")));
    assert_eq!(chain.members().len(), members.len());
    let mut count = 0;
    let mut compare = |what: &str, view: &View, expected: &[u8]| {
        reads_as(what, view, expected, &borders(members, random), random);
        count += 1;
    };
    for (number, member) in members.iter().enumerate() {
        let view = chain.view(number).expect("a view of a member");
        compare(&format!("member {number}"), &view, &member.bytes);
        let image = chain.members()[number].image();
        let snapshots = image.map_or(Vec::new(), |image| image.snapshots());
        assert_eq!(snapshots.len(), member.snapshots.len(), "snapshots of member {number}");
        for (tree, (name, expected)) in snapshots.into_iter().zip(&member.snapshots) {
            assert_eq!(tree.entry().name, *name);
            let view = chain.snapshot_view(number, tree).expect("a view of a snapshot");
            compare(&format!("snapshot {name} of member {number}"), &view, expected);
        }
    }
    count
}

/// Offsets where a reader goes from one thing to another: subclusters, clusters, L2 tables, ends of
/// disks.
fn borders(members: &[Member], random: &mut Random) -> Vec<u64> {
    let mut borders = Vec::new();
    for member in members {
        let snapshots = member.snapshots.iter().map(|(_, bytes)| bytes);
        let sizes = [&member.bytes].into_iter().chain(snapshots).map(|bytes| bytes.len() as u64);
        let longest = sizes.clone().max().unwrap_or_default();
        borders.extend(sizes);
        let cluster = member.cluster();
        for grain in [cluster / 32, cluster, cluster / 16 * cluster, cluster / 8 * cluster] {
            borders.extend((0..6).map(|_| grain * random.below(longest / grain + 1)));
        }
    }
    borders
}

/// Reads all at once, around each border, and anywhere.
fn reads_as(what: &str, view: &View, expected: &[u8], borders: &[u64], random: &mut Random) {
    let size = expected.len() as u64;
    assert_eq!(view.size(), size, "the size of {what}");
    let mut reads = vec![(0, size)];
    for border in borders.iter().filter(|&&border| border < size + 512) {
        let before = random.pick(&[1, 7, 512, 5000]).min(*border);
        let after = random.pick(&[1, 9, 512, 70_000]);
        reads.push((border - before, before + after));
    }
    reads.extend((0..20).map(|_| random.range(size, size)));
    for (offset, len) in reads {
        let mut found = vec![0xa5; index(len)];
        let read = view.read(GuestOffset::new(offset), &mut found);
        read.unwrap_or_else(|error| panic!("{len} bytes of {what} at {offset}: {error}"));
        let from = &expected[index(offset.min(size))..];
        let mut wanted = from[..index(len).min(from.len())].to_vec();
        wanted.resize(index(len), 0);
        same(&format!("{len} bytes of {what} at {offset}"), &wanted, &found);
    }
}

/// All views, read through a mount.
pub fn mounted(members: &[Member]) {
    let mounted = Mounted::with(
        &[&args!["-r"][..], &members[0].opening.our_options()].concat(),
        members[0].path(),
    );
    holds(&mounted.disk(), &members[0].bytes);
    for (number, member) in members.iter().enumerate() {
        let directory = mounted.path(&format!("chain/{number}"));
        holds(&directory.join("disk.raw"), &member.bytes);
        for (name, expected) in &member.snapshots {
            holds(&directory.join("snapshots").join(name).join("disk.raw"), expected);
        }
    }
    mounted.umount();
}

/// What `info`, `map` and `check` say.
pub fn described(members: &[Member]) {
    for file in members.iter().flat_map(|member| &member.files) {
        settle(file);
    }
    says_what_qemu_says(&args!["--backing-chain", members[0].path()]);
    for member in members.iter().filter(|member| member.shape.is_some()) {
        says_what_qemu_says(&args![member.path()]);
        json_is_the_same(
            &member.opening.words(),
            &[member.opening.our_options(), args![member.path()].to_vec()].concat(),
        );
        cli_check::says_the_same(&member.opening.words(), member.path());
    }
}
