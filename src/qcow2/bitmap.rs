//! Persistent dirty bitmaps: the extension and the directory (section "Bitmaps").

use crate::error::{Error, Result};
use crate::qcow2::MAX_FILE_LEN;
use crate::units::HostOffset;

/// Greatest number of bitmaps.
const MAX_BITMAPS: u32 = 65535;
/// Greatest size of the directory in bytes.
const MAX_DIRECTORY_BYTES: u64 = 1024 * 65535;
/// Bytes of a directory entry before its extra data and name.
const FIXED_LEN: usize = 24;
/// Greatest length of a name in bytes.
const MAX_NAME: usize = 1023;
/// Greatest number of entries of a bitmap's table.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// The only type of bitmap that there is.
const DIRTY_TRACKING: u8 = 1;

/// Where the bitmap directory is, from the bitmaps extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// Number of bitmaps.
    pub count: u32,
    /// Its length in bytes.
    pub len: u64,
    /// Where it begins; cluster-aligned.
    pub offset: HostOffset,
}

/// A bitmap as the directory describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in the image.
    pub name: String,
    /// log2 of the bytes of the disk that one bit stands for: 9 to 31.
    pub granularity_bits: u8,
    /// What is said of it.
    pub flags: BitmapFlags,
    /// Where its table is.
    pub table_offset: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
}

bitflags::bitflags! {
    /// Flags of a bitmap.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct BitmapFlags: u32 {
        /// It was not stored when its writer ended: what it holds is worth nothing.
        const IN_USE = 1;
        /// Writes are recorded in it.
        const AUTO = 1 << 1;
        /// A program may use it without knowing its extra data.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
        /// Whatever a later version may define.
        const _ = !0;
    }
}

impl BitmapDirectory {
    /// Reads the data of the bitmaps extension.
    ///
    /// # Errors
    /// A wrong length, no bitmaps or too many, a directory that is too long or not cluster-aligned.
    pub fn parse(data: &[u8], cluster_size: u64) -> Result<Self> {
        if data.len() != 24 {
            return Err(Error::invalid("bitmaps extension", format!("{} bytes long", data.len())));
        }
        if number(data, 4, 4) != 0 {
            return Err(Error::invalid("bitmaps extension", "its reserved field is not zero"));
        }
        let directory = Self {
            count: number(data, 0, 4) as u32,
            len: number(data, 8, 8),
            offset: HostOffset::new(number(data, 16, 8)),
        };
        if directory.count == 0 || directory.count > MAX_BITMAPS {
            return Err(Error::invalid("nb_bitmaps", format!("{} bitmaps", directory.count)));
        }
        if directory.len > MAX_DIRECTORY_BYTES {
            return Err(Error::invalid(
                "bitmap_directory_size",
                format!("{} bytes", directory.len),
            ));
        }
        if !directory.offset.is_aligned(cluster_size) || directory.offset == HostOffset::ZERO {
            let reason = format!("{} is not cluster-aligned", directory.offset);
            return Err(Error::invalid("bitmap_directory_offset", reason));
        }
        Ok(directory)
    }

    /// Reads the entries from the directory's bytes.
    ///
    /// # Errors
    /// An entry that runs out of the directory, or holds what the specification forbids.
    pub fn parse_entries(&self, mut bytes: &[u8], cluster_size: u64) -> Result<Vec<Bitmap>> {
        let mut bitmaps = Vec::new();
        for _ in 0..self.count {
            let short = || Error::invalid("bitmap directory", "it ends inside an entry");
            let fixed = bytes.get(..FIXED_LEN).ok_or_else(short)?;
            let (name_len, extra_len) = (number(fixed, 18, 2), number(fixed, 20, 4));
            let len = FIXED_LEN as u64 + extra_len + name_len;
            let entry = bytes.get(..len as usize).ok_or_else(short)?;
            let bitmap = Bitmap::parse(entry, name_len as usize)?;
            bitmap.check(cluster_size).map_err(|reason| {
                let reason = format!("bitmap \"{}\": {reason}", bitmap.name);
                Error::invalid("bitmap directory", reason)
            })?;
            bitmaps.push(bitmap);
            bytes = bytes.get((len as usize).next_multiple_of(8)..).unwrap_or_default();
        }
        if !bytes.is_empty() {
            return Err(Error::invalid("bitmap directory", "it has more entries than nb_bitmaps"));
        }
        Ok(bitmaps)
    }
}

impl Bitmap {
    /// Reads an entry that ends with a name of `name_len` bytes.
    fn parse(entry: &[u8], name_len: usize) -> Result<Self> {
        let (kind, granularity_bits) = (entry[16], entry[17]);
        if kind != DIRTY_TRACKING {
            return Err(Error::invalid("bitmap directory", format!("a bitmap of type {kind}")));
        }
        let name = &entry[entry.len() - name_len..];
        Ok(Self {
            name: String::from_utf8_lossy(name).into_owned(),
            granularity_bits,
            flags: BitmapFlags::from_bits_retain(number(entry, 12, 4) as u32),
            table_offset: HostOffset::new(number(entry, 0, 8)),
            table_entries: number(entry, 8, 4) as u32,
        })
    }
}

impl Bitmap {
    /// Checks it against the format's limits and QEMU's.
    fn check(&self, cluster_size: u64) -> Result<(), String> {
        let known = BitmapFlags::IN_USE | BitmapFlags::AUTO | BitmapFlags::EXTRA_DATA_COMPATIBLE;
        let table = self.table_offset;
        if !(9..=31).contains(&self.granularity_bits) {
            return Err(format!("granularity of 2^{} bytes", self.granularity_bits));
        }
        if !(1..=MAX_NAME).contains(&self.name.len()) {
            return Err(format!("a name of {} bytes", self.name.len()));
        }
        if !known.contains(self.flags) {
            return Err(format!("reserved flags {:#x}", (self.flags - known).bits()));
        }
        if table == HostOffset::ZERO || !table.is_aligned(cluster_size) {
            return Err(format!("its table at {table} is not cluster-aligned"));
        }
        if !(1..=MAX_TABLE_ENTRIES).contains(&self.table_entries) {
            return Err(format!("a table of {} entries", self.table_entries));
        }
        let len = u64::from(self.table_entries) * 8;
        if table.checked_add(len).is_none_or(|end| end.get() > MAX_FILE_LEN) {
            return Err(format!("its table at {table} is where no file is"));
        }
        Ok(())
    }
}

/// The big-endian number of `len` bytes at `at`; `bytes` is long enough.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 65536;

    fn entry(name: &[u8], extra: usize) -> Vec<u8> {
        let mut bytes = 0x50000_u64.to_be_bytes().to_vec();
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend(2_u32.to_be_bytes());
        bytes.extend([DIRTY_TRACKING, 16]);
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend((extra as u32).to_be_bytes());
        bytes.resize(bytes.len() + extra, 0);
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn names_behind_extra_data_are_found() {
        let directory = BitmapDirectory { count: 2, len: 0, offset: HostOffset::new(CLUSTER) };
        let bytes = [entry(b"nightly", 0), entry(b"b", 13)].concat();
        let bitmaps = directory.parse_entries(&bytes, CLUSTER).unwrap();
        assert_eq!(
            bitmaps.iter().map(|bitmap| &bitmap.name[..]).collect::<Vec<_>>(),
            ["nightly", "b"]
        );
        assert_eq!(bitmaps[0].flags, BitmapFlags::AUTO);
    }

    #[test]
    fn an_entry_that_runs_out_of_the_directory_is_refused() {
        let directory = BitmapDirectory { count: 1, len: 0, offset: HostOffset::new(CLUSTER) };
        let bytes = entry(b"nightly", 0);
        for len in 0..FIXED_LEN + 7 {
            assert!(directory.parse_entries(&bytes[..len], CLUSTER).is_err(), "{len}");
        }
        let mut huge = bytes;
        huge[20..24].fill(0xff);
        assert!(directory.parse_entries(&huge, CLUSTER).is_err());
    }
}
