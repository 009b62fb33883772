//! What a check finds, and what it says of the image as a whole.

use std::collections::BTreeSet;
use std::fmt;

use crate::units::HostOffset;

/// What an image is found to be like.
///
/// The numbers are those of `qemu-img check`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Where the last cluster in use ends, in bytes.
    pub image_end: u64,
    /// Clusters of the active disk, allocated or not.
    pub total_clusters: u64,
    /// Clusters of the active disk that have a place.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow the one before them, and all compressed ones.
    pub fragmented_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// Clusters with a higher refcount than references.
    pub leaks: u64,
    /// Everything else that is wrong.
    pub corruptions: u64,
    /// Tables that could not be read from the host.
    pub errors: u64,
}

impl Report {
    /// Whether nothing at all is wrong.
    pub fn is_clean(&self) -> bool {
        self.leaks == 0 && self.is_sound()
    }

    /// Whether nothing is wrong but wasted space.
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.errors == 0
    }
}

/// What a host cluster is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Use {
    /// Nothing.
    Nothing,
    /// The header.
    Header,
    /// The active L1 table.
    ActiveL1,
    /// A snapshot's L1 table.
    SnapshotL1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The bitmap directory.
    BitmapDirectory,
    /// The table of a bitmap.
    BitmapTable,
    /// The bits of a bitmap.
    BitmapData,
    /// The LUKS header and its key material.
    EncryptionHeader,
    /// Guest data.
    Data,
    /// Compressed guest data, of any number of guest clusters.
    Compressed,
}

impl Use {
    /// Whether the format's own tables are there.
    pub fn is_metadata(self) -> bool {
        !matches!(self, Self::Nothing | Self::Data | Self::Compressed)
    }

    /// Whether refcounts are there.
    pub fn is_refcounts(self) -> bool {
        matches!(self, Self::RefcountTable | Self::RefcountBlock)
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Header => "the header",
            Self::ActiveL1 => "the active L1 table",
            Self::SnapshotL1 => "the L1 table of a snapshot",
            Self::L2 => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::SnapshotTable => "the snapshot table",
            Self::BitmapDirectory => "the bitmap directory",
            Self::BitmapTable => "the table of a bitmap",
            Self::BitmapData => "a bitmap",
            Self::EncryptionHeader => "the encryption header",
            Self::Data => "guest data",
            Self::Compressed => "compressed guest data",
        })
    }
}

/// One thing that is wrong. Printed, it is a line; where `qemu-img check` has a line for it, that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// A cluster with a higher refcount than references: wasted space.
    Leak {
        /// Index of the cluster in the file.
        cluster: u64,
        /// What the refcount block says.
        refcount: u64,
        /// What was counted.
        references: u64,
    },
    /// A cluster with a lower refcount than references: it may be given away while in use.
    TooLow {
        /// Index of the cluster in the file.
        cluster: u64,
        /// What the refcount block says.
        refcount: u64,
        /// What was counted.
        references: u64,
    },
    /// A cluster that is used twice for what can't be shared.
    TwoOwners {
        /// Index of the cluster in the file.
        cluster: u64,
        /// One use.
        first: Use,
        /// Another.
        second: Use,
    },
    /// An active entry whose COPIED flag does not say whether its cluster may be written in place.
    Copied {
        /// The entry as it is.
        raw: u64,
        /// What it points to.
        target: Target,
        /// The refcount of that.
        refcount: u64,
    },
    /// A pointer to where the file has ended a cluster before, or more.
    BehindTheEnd {
        /// What is to be there.
        what: Use,
        /// Where.
        at: HostOffset,
        /// Bytes.
        len: u64,
    },
    /// A structure that the format does not allow.
    Broken {
        /// What is wrong, and where.
        what: String,
    },
    /// A table that the host does not read.
    Unreadable {
        /// Which one, and why.
        what: String,
    },
}

/// What an entry with a COPIED flag points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// An L2 table; the index of the L1 entry.
    Table(usize),
    /// A data cluster in the image.
    Data,
    /// A data cluster in an external data file.
    External,
    /// A compressed cluster.
    Compressed,
}

impl Finding {
    /// What the finding counts as.
    pub fn class(&self) -> Class {
        match self {
            Self::Leak { .. } => Class::Leak,
            Self::Unreadable { .. } => Class::Error,
            _ => Class::Corruption,
        }
    }
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Wasted space.
    Leak,
    /// Data is or may get damaged.
    Corruption,
    /// The check could not look.
    Error,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leak { cluster, refcount, references } => {
                write!(f, "Leaked cluster {cluster} refcount={refcount} reference={references}")
            }
            Self::TooLow { cluster, refcount, references } => {
                write!(f, "ERROR cluster {cluster} refcount={refcount} reference={references}")
            }
            Self::TwoOwners { cluster, first, second } if first == second => {
                write!(f, "ERROR cluster {cluster} is used twice as {first}")
            }
            Self::TwoOwners { cluster, first, second } => {
                write!(f, "ERROR cluster {cluster} is used as {first} and as {second}")
            }
            Self::Copied { raw, target: Target::Table(index), refcount } => write!(
                f,
                "ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} refcount={refcount}"
            ),
            Self::Copied { raw, target: Target::Compressed, .. } => {
                write!(f, "ERROR OFLAG_COPIED compressed cluster: l2_entry={raw:x}")
            }
            Self::Copied { raw, refcount, .. } => {
                write!(f, "ERROR OFLAG_COPIED data cluster: l2_entry={raw:x} refcount={refcount}")
            }
            Self::BehindTheEnd { what, at, len } => {
                write!(f, "ERROR {what} at {at}, {len:#x} bytes, is behind the end of the file")
            }
            Self::Broken { what } | Self::Unreadable { what } => write!(f, "ERROR {what}"),
        }
    }
}

/// Who wants to know what a check finds and how far it is.
pub trait Watch {
    /// Something is wrong.
    fn found(&mut self, stage: Stage, finding: &Finding);
    /// `done` of `total` host clusters have been looked at in this stage.
    fn progress(&mut self, stage: Stage, done: u64, total: u64);
}

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// References and refcounts are compared.
    Check,
    /// Refcounts are corrected.
    Counts,
    /// Refcount table and blocks are written anew.
    Rebuild,
    /// COPIED flags are corrected.
    Flags,
    /// The repaired image is checked.
    Verify,
}

/// Most wrong pointers that a repair keeps in mind.
const MAX_NOTED: usize = 1 << 16;

/// Findings on their way to who wants to know, and what a repair must know of them.
pub(super) struct Tally<'w> {
    pub report: Report,
    /// Whether the refcount table and blocks can be corrected in place.
    pub refcounts: Refcounts,
    /// Whether all tables were followed: only then is a cluster without references free.
    pub coverage: Coverage,
    /// Refcounts that are too low.
    pub too_low: u64,
    /// Clusters with tables that are used for something else, too.
    pub contested: BTreeSet<u64>,
    /// Clusters behind the end of the file that something points to.
    pub dangling: BTreeSet<u64>,
    stage: Stage,
    watch: &'w mut dyn Watch,
}

/// Whether the refcount table and blocks can be corrected in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refcounts {
    /// They can.
    Usable,
    /// They overlap with something, lead nowhere, or lack blocks that are needed.
    Broken,
    /// The header overlaps with something, or there are more wrong pointers than a repair can go around.
    Hopeless,
}

/// Whether all tables were followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Coverage {
    /// All of them.
    Whole,
    /// Some lead nowhere or can't be read: there may be references that nobody has counted.
    Partial,
}

impl Coverage {
    /// What a refcount below `references` is to be: one more where others may hold the cluster, too, so that it is
    /// neither written in place nor given away when those that were counted let go of it.
    pub fn raised(self, references: u64) -> u64 {
        match self {
            Self::Whole => references,
            Self::Partial => references.saturating_add(1),
        }
    }
}

impl<'w> Tally<'w> {
    pub fn new(watch: &'w mut dyn Watch, stage: Stage) -> Self {
        Self {
            report: Report::default(),
            refcounts: Refcounts::Usable,
            coverage: Coverage::Whole,
            too_low: 0,
            contested: BTreeSet::new(),
            dangling: BTreeSet::new(),
            stage,
            watch,
        }
    }

    /// Refcounts are no better than `found`.
    pub fn worsen(&mut self, found: Refcounts) {
        self.refcounts = self.refcounts.max(found);
    }

    pub fn add(&mut self, finding: Finding) {
        match finding.class() {
            Class::Leak => self.report.leaks += 1,
            Class::Corruption => self.report.corruptions += 1,
            Class::Error => self.report.errors += 1,
        }
        if matches!(finding, Finding::TooLow { .. }) {
            self.too_low += 1;
        }
        self.watch.found(self.stage, &finding);
    }

    /// Notes a cluster with a table that is used for something else, too.
    pub fn note_contested(&mut self, cluster: u64) {
        self.contested.insert(cluster);
        self.give_up_on(self.contested.len());
    }

    /// Notes clusters behind the end of the file that something points to.
    pub fn note_dangling(&mut self, clusters: std::ops::Range<u64>) {
        self.dangling.extend(clusters.take(MAX_NOTED));
        self.give_up_on(self.dangling.len());
    }

    /// So many wrong pointers are no accident.
    fn give_up_on(&mut self, noted: usize) {
        if noted > MAX_NOTED {
            self.worsen(Refcounts::Hopeless);
            self.contested.clear();
            self.dangling.clear();
        }
    }

    pub fn progress(&mut self, done: u64, total: u64) {
        self.watch.progress(self.stage, done, total);
    }
}
