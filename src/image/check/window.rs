//! A part of the file in which references are counted: as much as fits into memory.

use super::findings::Use;
use super::survey::Survey;
use crate::qcow2::refcount;
use crate::units::HostOffset;

/// Host clusters that are looked at in one pass: 48 MiB of counts.
pub(super) const MAX_CLUSTERS: u64 = 2 << 20;

/// What is known of a host cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// What its refcount block says.
    pub refcount: u64,
    /// What was counted.
    pub references: u32,
    /// Which of the things of its kind it is (see [`Holder`]).
    at: u32,
    usage: Use,
    contested: bool,
}

/// Who refers to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Holder {
    usage: Use,
    /// Where the guest has it; snapshots may share a cluster only at the same place.
    at: u32,
}

impl Holder {
    /// A table of which there is no second.
    pub fn table(usage: Use) -> Self {
        Self { usage, at: 0 }
    }

    /// The L2 table of an L1 index.
    pub fn l2(index: usize) -> Self {
        Self { usage: Use::L2, at: index as u32 }
    }

    /// The guest cluster with this index, the lower half of which tells it from all but hostile others.
    pub fn data(guest_cluster: u64) -> Self {
        Self { usage: Use::Data, at: guest_cluster as u32 }
    }

    /// A part of a cluster.
    pub fn compressed() -> Self {
        Self { usage: Use::Compressed, at: 0 }
    }

    /// Whether others may refer to the same cluster.
    fn shares_with(self, other: Self) -> bool {
        self == other && matches!(self.usage, Use::L2 | Use::Data | Use::Compressed)
    }
}

/// A cluster with two owners.
pub(super) struct Contest {
    pub cluster: u64,
    pub first: Use,
    pub second: Use,
}

/// The clusters from `first` on.
pub(super) struct Window {
    pub first: u64,
    slots: Vec<Slot>,
    /// The first cluster behind the window that something refers to.
    beyond: Option<u64>,
}

impl Window {
    /// The window from `first` on, its refcounts read.
    ///
    /// # Errors
    /// The host's answer; refcounts that can't be read are 0.
    pub fn load(survey: &Survey<'_>, first: u64, max: u64) -> (Self, std::io::Result<()>) {
        let len = survey.limit().saturating_sub(first).min(max);
        let empty =
            Slot { refcount: 0, references: 0, at: 0, usage: Use::Nothing, contested: false };
        let mut window = Self { first, slots: vec![empty; len as usize], beyond: None };
        let read = window.load_refcounts(survey);
        (window, read)
    }

    fn load_refcounts(&mut self, survey: &Survey<'_>) -> std::io::Result<()> {
        let per_block = survey.geometry.refcounts_per_block();
        let order = survey.geometry.refcount_order();
        let mut block = vec![0; survey.geometry.cluster_size() as usize];
        let mut read = Ok(());
        let blocks = self.first / per_block..self.end().div_ceil(per_block);
        for index in blocks {
            let Some(&host) = survey.blocks.get(index as usize).filter(|&&host| host != 0) else {
                continue;
            };
            if let Err(error) = survey.store.read_at(&mut block, HostOffset::new(host)) {
                read = Err(error);
                continue;
            }
            let start = (index * per_block).max(self.first);
            let end = ((index + 1) * per_block).min(self.end());
            for cluster in start..end {
                let count = refcount::get(&block, (cluster % per_block) as usize, order);
                self.slots[(cluster - self.first) as usize].refcount = count;
            }
        }
        read
    }

    /// The first cluster behind the window.
    pub fn end(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    /// The clusters, by index in the file.
    pub fn clusters(&self) -> impl Iterator<Item = (u64, &Slot)> {
        (self.first..).zip(&self.slots)
    }

    /// What is known of `cluster`, if it is in the window.
    pub fn slot(&self, cluster: u64) -> Option<&Slot> {
        self.slots.get(cluster.checked_sub(self.first)? as usize)
    }

    /// Counts `times` references to each of the clusters from `first` to before `end`, as far as they are in the window.
    /// Tells `contest` of clusters with two owners, of each once.
    pub fn refer(
        &mut self,
        clusters: std::ops::Range<u64>,
        times: u32,
        holder: Holder,
        mut contest: impl FnMut(Contest),
    ) {
        if clusters.end > self.end() {
            let beyond = clusters.start.max(self.end());
            self.beyond = Some(self.beyond.map_or(beyond, |known| known.min(beyond)));
        }
        for cluster in clusters.start.max(self.first)..clusters.end.min(self.end()) {
            let slot = &mut self.slots[(cluster - self.first) as usize];
            slot.references = slot.references.saturating_add(times);
            let before = Holder { usage: slot.usage, at: slot.at };
            if slot.usage == Use::Nothing {
                (slot.usage, slot.at) = (holder.usage, holder.at);
            } else if !slot.contested && !holder.shares_with(before) {
                slot.contested = true;
                contest(Contest { cluster, first: before.usage, second: holder.usage });
            }
        }
    }

    /// The first cluster behind the window that something refers to, or that may have a refcount.
    pub fn next(&self, survey: &Survey<'_>) -> Option<u64> {
        let per_block = survey.geometry.refcounts_per_block();
        let first = self.end() / per_block;
        let holds_data = |host: u64| {
            let data = survey.store.next_data(HostOffset::new(host));
            let end = host.saturating_add(survey.geometry.cluster_size());
            // Who can't tell may have data.
            data.map_or(true, |data| data.is_some_and(|data| data.start < end))
        };
        let blocks = survey.blocks.iter().enumerate().skip(first as usize);
        let mut used = blocks.filter(|(_, host)| **host != 0 && holds_data(**host));
        let counted = used.next().map(|(index, _)| (index as u64 * per_block).max(self.end()));
        match (self.beyond, counted) {
            (Some(beyond), Some(counted)) => Some(beyond.min(counted)),
            (beyond, counted) => beyond.or(counted),
        }
    }
}
