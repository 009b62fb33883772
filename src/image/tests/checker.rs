//! A checker that shares no code with the allocator: who refers to what, and do the refcounts agree.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::image::open::read_header;
use crate::image::snapshots::SnapshotTable;
use crate::qcow2::{
    DataPlace, ExtendedL2Entry, Geometry, Header, L1Entry, L2Entry, be_u64, refcount,
};
use crate::store::memory::MemoryStore;

/// What the checker found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Clusters with more counted than actual references.
    pub leaks: Vec<String>,
    /// Everything else.
    pub corruptions: Vec<String>,
}

struct Checker<'a> {
    bytes: &'a [u8],
    geometry: Geometry,
    references: HashMap<u64, u64>,
    /// Active entries whose COPIED flag must agree with the refcount.
    flagged: Vec<(u64, bool, String)>,
    findings: Findings,
}

/// Checks the image in `bytes`.
pub fn check(bytes: &[u8]) -> Findings {
    let store = MemoryStore::new(bytes.to_vec());
    let header = read_header(&store).expect("the header is readable");
    header.check_tables().expect("the header's tables are where they can be");
    let snapshots = SnapshotTable::read(&store, &header).expect("the snapshot table is readable");
    let mut checker = Checker {
        bytes,
        geometry: header.geometry,
        references: HashMap::new(),
        flagged: Vec::new(),
        findings: Findings::default(),
    };
    checker.refer(0, 1, "header");
    checker.tree(&header, header.l1_offset.get(), header.l1_entries, Active::Yes);
    for tree in &snapshots.trees {
        let entry = tree.entry();
        checker.tree(&header, entry.l1_offset.get(), entry.l1_entries, Active::No);
    }
    checker.refer(header.snapshots_offset.get(), snapshots.bytes.len() as u64, "snapshot table");
    let cluster_size = header.geometry.cluster_size();
    let table_len = u64::from(header.reftable_clusters) * cluster_size;
    checker.refer(header.reftable_offset.get(), table_len, "refcount table");
    let blocks = checker.table(header.reftable_offset.get(), table_len / 8);
    for &block in blocks.iter().filter(|&&block| block != 0) {
        checker.refer(block, cluster_size, "refcount block");
    }
    checker.compare(&blocks);
    checker.findings
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Active {
    Yes,
    No,
}

impl Checker<'_> {
    fn table(&self, offset: u64, entries: u64) -> Vec<u64> {
        (0..entries as usize)
            .map(|index| be_u64(self.bytes.get(offset as usize..).unwrap_or_default(), index))
            .collect()
    }

    fn refer(&mut self, offset: u64, len: u64, what: &str) {
        let bits = self.geometry.cluster_bits();
        for cluster in offset >> bits..(offset + len).div_ceil(1 << bits) {
            *self.references.entry(cluster).or_default() += 1;
            if (cluster << bits) >= self.bytes.len() as u64 {
                self.findings.corruptions.push(format!("{what} behind the end of the file"));
            }
        }
    }

    fn tree(&mut self, header: &Header, l1_offset: u64, l1_entries: u32, active: Active) {
        let geometry = self.geometry;
        self.refer(l1_offset, u64::from(l1_entries) * 8, "L1 table");
        for raw in self.table(l1_offset, l1_entries.into()) {
            let L1Entry::Table { host, copied } = L1Entry::decode(raw, geometry).unwrap() else {
                continue;
            };
            self.refer(host.get(), geometry.cluster_size(), "L2 table");
            self.flag(active, host.get(), copied, "L1 entry");
            let words = geometry.l2_entry_len() / 8;
            let table = self.table(host.get(), geometry.l2_entries() * words);
            for entry in table.chunks_exact(words as usize) {
                self.entry(header, entry, active);
            }
        }
    }

    fn entry(&mut self, header: &Header, entry: &[u64], active: Active) {
        let (geometry, rules) = (self.geometry, header.entry_rules());
        let cluster = match entry {
            &[raw, bitmap] => {
                match ExtendedL2Entry::decode(raw, bitmap, geometry, rules).unwrap() {
                    ExtendedL2Entry::Compressed(cluster) => Err(cluster),
                    ExtendedL2Entry::Subclusters { host, .. } => Ok(host),
                }
            }
            raw => match L2Entry::decode(raw[0], geometry, rules).unwrap() {
                L2Entry::Compressed(cluster) => Err(cluster),
                L2Entry::Data { host, copied } => Ok(Some((host, copied))),
                L2Entry::Zero { host } => Ok(host),
                L2Entry::Unallocated => Ok(None),
            },
        };
        match cluster {
            Ok(Some(_)) if rules.data == DataPlace::External => {}
            Ok(Some((host, copied))) => {
                self.refer(host.get(), geometry.cluster_size(), "data");
                self.flag(active, host.get(), copied, "L2 entry");
            }
            Ok(None) => {}
            Err(compressed) => {
                for host in compressed.host_clusters(geometry) {
                    self.refer(host.get(), 1, "compressed data");
                }
            }
        }
    }

    fn flag(&mut self, active: Active, host: u64, copied: bool, what: &str) {
        if active == Active::Yes {
            let cluster = host >> self.geometry.cluster_bits();
            self.flagged.push((cluster, copied, what.to_owned()));
        }
    }

    fn compare(&mut self, blocks: &[u64]) {
        let geometry = self.geometry;
        let per_block = geometry.refcounts_per_block();
        let mut counts = HashMap::new();
        for (block, &at) in (0..).zip(blocks).filter(|(_, at)| **at != 0) {
            let size = geometry.cluster_size() as usize;
            let behind = self.bytes.get(at as usize..).unwrap_or_default();
            let mut bytes = behind[..size.min(behind.len())].to_vec();
            bytes.resize(size, 0);
            for index in 0..per_block {
                match refcount::get(&bytes, index as usize, geometry.refcount_order()) {
                    0 => {}
                    count => drop(counts.insert(block * per_block + index, count)),
                }
            }
        }
        let count = |cluster: u64| counts.get(&cluster).copied().unwrap_or(0);
        // Counts behind the end of the file, too: they would be leaks once it is longer.
        let mut clusters: Vec<u64> = counts.keys().chain(self.references.keys()).copied().collect();
        clusters.sort_unstable();
        clusters.dedup();
        for cluster in clusters {
            let references = self.references.get(&cluster).copied().unwrap_or(0);
            let counted = count(cluster);
            let finding =
                || format!("cluster {cluster}: refcount {counted}, references {references}");
            match counted.cmp(&references) {
                Ordering::Less => self.findings.corruptions.push(finding()),
                Ordering::Greater => self.findings.leaks.push(finding()),
                Ordering::Equal => {}
            }
        }
        for (cluster, copied, what) in &self.flagged {
            // Too high a refcount is a leak; the flag must still never promise what is not true.
            if *copied && self.references.get(cluster) != Some(&1) {
                self.findings.corruptions.push(format!("{what} for shared {cluster} has COPIED"));
            }
            if !*copied && count(*cluster) == 1 {
                self.findings.corruptions.push(format!("{what} for own {cluster} lacks COPIED"));
            }
        }
    }
}
