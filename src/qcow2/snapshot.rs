//! Snapshot table entries (section "Snapshots").

use crate::error::{Error, Result};
use crate::units::HostOffset;

/// Bytes of an entry before its extra data, id and name.
pub const SNAPSHOT_FIXED_LEN: usize = 40;

/// An internal snapshot as the table describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its L1 table.
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Unique text, usually a number.
    pub id: String,
    /// The name that the user gave; need not be unique.
    pub name: String,
    /// Creation time, seconds since 1970.
    pub date_seconds: u32,
    /// Creation time, nanoseconds in the second.
    pub date_nanoseconds: u32,
    /// Nanoseconds that the guest had run.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of VM state, kept in the snapshot's L1 behind the disk.
    pub vm_state_size: u64,
    /// Size of the disk in bytes when the snapshot was made; `None` in old tables, which then means today's.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, if that was counted.
    pub icount: Option<u64>,
}

/// The lengths that an entry's fixed part announces, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotLengths {
    extra: usize,
    id: usize,
    name: usize,
}

impl SnapshotLengths {
    /// Reads them from the fixed part.
    pub fn parse(fixed: &[u8; SNAPSHOT_FIXED_LEN]) -> Self {
        Self {
            extra: number(fixed, 36, 4) as usize,
            id: number(fixed, 12, 2) as usize,
            name: number(fixed, 14, 2) as usize,
        }
    }

    /// Bytes that follow the fixed part, without the padding.
    pub fn variable(self) -> usize {
        self.extra + self.id + self.name
    }

    /// Whether the extra data has what version 3 demands: the sizes of the VM state and of the disk.
    pub fn has_required_extra(self) -> bool {
        self.extra >= 16
    }

    /// Bytes from the beginning of the entry to the next one.
    pub fn entry(self) -> usize {
        (SNAPSHOT_FIXED_LEN + self.variable()).next_multiple_of(8)
    }
}

impl Snapshot {
    /// Reads an entry from its fixed part and the bytes behind it, at least [`SnapshotLengths::variable`].
    ///
    /// # Errors
    /// Fewer bytes than the fixed part announces, or an L1 table that is not cluster-aligned or too large.
    pub fn parse(fixed: &[u8; SNAPSHOT_FIXED_LEN], variable: &[u8]) -> Result<Self> {
        let lengths = SnapshotLengths::parse(fixed);
        let short = || Error::invalid("snapshot table", "it ends inside an entry");
        let (extra, rest) = variable.split_at_checked(lengths.extra).ok_or_else(short)?;
        let (id, rest) = rest.split_at_checked(lengths.id).ok_or_else(short)?;
        let name = rest.get(..lengths.name).ok_or_else(short)?;
        let extra_number = |at: usize| (extra.len() >= at + 8).then(|| number(extra, at, 8));
        Ok(Self {
            l1_offset: HostOffset::new(number(fixed, 0, 8)),
            l1_entries: number(fixed, 8, 4) as u32,
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            date_seconds: number(fixed, 16, 4) as u32,
            date_nanoseconds: number(fixed, 20, 4) as u32,
            vm_clock_nanoseconds: number(fixed, 24, 8),
            vm_state_size: extra_number(0).unwrap_or_else(|| number(fixed, 32, 4)),
            disk_size: extra_number(8),
            icount: extra_number(16).filter(|&icount| icount != u64::MAX),
        })
    }

    /// Appends a new entry, padding included, to `out`, whose length must be a multiple of 8.
    ///
    /// Entries that are there already are kept as the bytes they are, unknown extra data included.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.l1_offset.get().to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend((self.id.len() as u16).to_be_bytes());
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(self.date_seconds.to_be_bytes());
        out.extend(self.date_nanoseconds.to_be_bytes());
        out.extend(self.vm_clock_nanoseconds.to_be_bytes());
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend(24_u32.to_be_bytes());
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend(self.disk_size.unwrap_or(0).to_be_bytes());
        out.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend(self.id.as_bytes());
        out.extend(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// The big-endian number of `len` bytes at `at`; `bytes` is long enough.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Snapshot {
        Snapshot {
            l1_offset: HostOffset::new(0x40000),
            l1_entries: 7,
            id: "1".into(),
            name: "before upgrade".into(),
            date_seconds: 1_700_000_000,
            date_nanoseconds: 5,
            vm_clock_nanoseconds: 9,
            vm_state_size: 0,
            disk_size: Some(64 << 20),
            icount: None,
        }
    }

    #[test]
    fn an_entry_survives_writing_and_reading() {
        let mut bytes = Vec::new();
        sample().write(&mut bytes);
        let fixed: &[u8; SNAPSHOT_FIXED_LEN] = bytes.first_chunk().unwrap();
        assert_eq!(SnapshotLengths::parse(fixed).entry(), bytes.len());
        assert_eq!(Snapshot::parse(fixed, &bytes[SNAPSHOT_FIXED_LEN..]).unwrap(), sample());
    }

    #[test]
    fn an_entry_that_ends_too_early_is_refused() {
        let mut bytes = Vec::new();
        sample().write(&mut bytes);
        let fixed: &[u8; SNAPSHOT_FIXED_LEN] = bytes.first_chunk().unwrap();
        assert!(Snapshot::parse(fixed, &bytes[SNAPSHOT_FIXED_LEN..60]).is_err());
    }
}
