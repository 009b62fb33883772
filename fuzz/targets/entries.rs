//! L1 and L2 entries of both forms.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qchainfs::qcow2::{
    DataPlace, EntryRules, ExtendedL2Entry, Geometry, L1Entry, L2Entry, ZeroFlag,
};

fuzz_target!(|input: (u64, u64, u8, bool, bool)| {
    let (raw, bitmap, cluster_bits, version_2, external) = input;
    let geometry = Geometry::new(9 + u32::from(cluster_bits) % 13, 4);
    let rules = EntryRules {
        zero_flag: if version_2 { ZeroFlag::Reserved } else { ZeroFlag::Defined },
        data: if external { DataPlace::External } else { DataPlace::Internal },
    };
    if let Ok(entry) = L1Entry::decode(raw, geometry) {
        assert_eq!(L1Entry::decode(entry.encode(), geometry).expect("our own entry"), entry);
    }
    if let Ok(entry) = L2Entry::decode(raw, geometry, rules) {
        let again = L2Entry::decode(entry.encode(geometry), geometry, rules);
        assert_eq!(again.expect("our own entry"), entry);
        if let L2Entry::Compressed(cluster) = entry {
            assert!(cluster.host_clusters(geometry).count() <= 3 + (cluster.len >> cluster_bits.min(9)) as usize);
        }
    }
    let _ = ExtendedL2Entry::decode(raw, bitmap, geometry, rules);
});
