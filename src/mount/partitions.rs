//! The partitions of a guest's disk, numbered as Linux numbers them.
//!
//! Everything on the disk was written by the guest, so nothing of it is trusted: a table can make
//! us list wrong partitions, but neither panic nor use more than a few MiB or read for long.
//!
//! The rules are those of the Linux kernel, so that `pN` is what the guest knows as `/dev/sdaN`,
//! with one exception: where the primary GPT is damaged, the backup is used without being asked.

use std::io::{self, Read, Seek, SeekFrom};

use flate2::Crc;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::units::{GuestOffset, GuestRange};

/// Linux gives a disk no more partitions than this.
const MAX_PARTITIONS: u32 = 255;

/// Linux refuses larger arrays of GPT entries; usual are 16 KiB.
const MAX_GPT_ARRAY: u64 = 4 << 20;

/// The unit of addresses in an MBR. (A GPT shows by its place which one it has.)
const MBR_SECTOR: u64 = 512;

/// One partition of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Partition {
    /// The number in the partition's name: the 2 of `/dev/sda2`.
    pub number: u32,
    /// Where the partition is; never empty and never beyond the disk's end.
    pub range: GuestRange,
}

/// The partitions in the GPT or MBR of a disk of `size` bytes, in ascending order of number.
///
/// Partitions may overlap. An extended partition has two sectors only, as in Linux, to guard its
/// logical partitions from who takes it for a place of its own.
///
/// Never fails: a table that is absent, invalid or can't be read has no partitions.
pub fn find<R: Read + Seek>(disk: R, size: u64) -> Vec<Partition> {
    let mut disk = Disk { reader: disk, size };
    disk.partitions().unwrap_or_else(|e| {
        log::warn!("can't use the partition table: {e}");
        Vec::new()
    })
}

/// The first sector of a disk (MBR) or of a logical partition's surroundings (EBR).
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct BootRecord {
    code: [u8; 446],
    entries: [BootEntry; 4],
    signature: [u8; 2],
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct BootEntry {
    boot_indicator: u8,
    first_chs: [u8; 3],
    kind: u8,
    last_chs: [u8; 3],
    first_sector: U32,
    sectors: U32,
}

/// The fields of a GPT header. More may follow, up to `header_len`.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct GptHeader {
    signature: [u8; 8],
    revision: U32,
    header_len: U32,
    header_crc: U32,
    reserved: U32,
    own_sector: U64,
    other_sector: U64,
    first_usable_sector: U64,
    last_usable_sector: U64,
    disk_guid: [u8; 16],
    array_sector: U64,
    entry_count: U32,
    entry_len: U32,
    array_crc: U32,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct GptEntry {
    type_guid: [u8; 16],
    guid: [u8; 16],
    first_sector: U64,
    last_sector: U64,
    attributes: U64,
    name: [u8; 72],
}

impl BootRecord {
    fn is_signed(&self) -> bool {
        self.signature == [0x55, 0xaa]
    }

    /// Tells a partition table from a file system's boot sector, which has the same signature.
    fn is_table(&self) -> bool {
        self.entries.iter().all(|entry| matches!(entry.boot_indicator, 0 | 0x80))
    }
}

impl BootEntry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    /// Whether the entry stands for a GPT and keeps MBR tools away from it.
    fn is_protective(&self) -> bool {
        self.kind == 0xee
    }

    fn start(&self) -> u64 {
        u64::from(self.first_sector.get()) * MBR_SECTOR
    }

    fn len(&self) -> u64 {
        u64::from(self.sectors.get()) * MBR_SECTOR
    }
}

struct Disk<R> {
    reader: R,
    size: u64,
}

impl<R: Read + Seek> Disk<R> {
    fn partitions(&mut self) -> io::Result<Vec<Partition>> {
        if self.size < MBR_SECTOR {
            return Ok(Vec::new());
        }
        let mbr = self.boot_record(0)?;
        if !mbr.is_signed() {
            log::debug!("the disk has no partition table");
            return Ok(Vec::new());
        }
        // In a hybrid MBR, the other entries only repeat some of the GPT's.
        if mbr.entries.iter().any(|e| e.is_protective() && e.first_sector == 1) {
            return self.gpt();
        }
        if !mbr.is_table() || mbr.entries.iter().any(BootEntry::is_protective) {
            log::debug!("the disk has a boot sector, but no partition table");
            return Ok(Vec::new());
        }
        Ok(self.mbr(&mbr))
    }

    /// The partitions in the first whole copy of the GPT.
    fn gpt(&mut self) -> io::Result<Vec<Partition>> {
        // Both primaries come before the backups: a backup left behind from a time when the disk
        // had another sector size must not win over a good primary.
        for backup in [false, true] {
            for sector_len in [512, 4096] {
                let sector = if backup { self.last_sector(sector_len) } else { 1 };
                match self.gpt_at(sector, sector_len) {
                    Ok(partitions) => {
                        if backup {
                            log::warn!("the primary GPT is damaged, using the backup");
                        }
                        return Ok(partitions);
                    }
                    Err(e) => log::debug!("no GPT in sector {sector} of {sector_len} bytes: {e}"),
                }
            }
        }
        Err(invalid("neither the primary nor the backup GPT is valid"))
    }

    /// The partitions in the GPT whose header is in `sector`.
    fn gpt_at(&mut self, sector: u64, sector_len: u64) -> io::Result<Vec<Partition>> {
        let bytes = self.read(sector.saturating_mul(sector_len), sector_len)?;
        let (header, _) =
            GptHeader::ref_from_prefix(&bytes).map_err(|_| invalid("the sector is too short"))?;
        if header.signature != *b"EFI PART" {
            return Err(invalid("there is no signature"));
        }
        if header_crc(&bytes, header.header_len.get()) != Some(header.header_crc.get()) {
            return Err(invalid("the header's checksum is wrong"));
        }
        let last_sector = self.last_sector(sector_len);
        let usable = header.first_usable_sector.get()..=header.last_usable_sector.get();
        if header.own_sector != sector || usable.is_empty() || *usable.end() > last_sector {
            return Err(invalid("the header is for another place or a larger disk"));
        }
        let entry_len = header.entry_len.get();
        let array_len = u64::from(header.entry_count.get()) * u64::from(entry_len);
        if (entry_len as usize) < size_of::<GptEntry>() || array_len > MAX_GPT_ARRAY {
            return Err(invalid("the entries are too short or too many"));
        }
        let array = self.read(header.array_sector.get().saturating_mul(sector_len), array_len)?;
        if crc(&[&array]) != header.array_crc.get() {
            return Err(invalid("the entries' checksum is wrong"));
        }
        let entries = array.chunks_exact(entry_len as usize).flat_map(GptEntry::ref_from_prefix);
        Ok((1..=MAX_PARTITIONS)
            .zip(entries)
            .filter(|(_, (entry, _))| entry.type_guid != [0; 16])
            .filter_map(|(number, (entry, _))| {
                let (first, last) = (entry.first_sector.get(), entry.last_sector.get());
                if first > last || last > last_sector {
                    log::debug!("partition {number} has no valid place on the disk");
                    return None;
                }
                self.clip(number, first * sector_len, (last - first + 1) * sector_len)
            })
            .collect())
    }

    /// The partitions in an MBR and in the extended partitions it has.
    fn mbr(&mut self, mbr: &BootRecord) -> Vec<Partition> {
        let mut partitions = Vec::new();
        let mut chain = Chain::default();
        for (number, entry) in (1..).zip(&mbr.entries) {
            let (start, mut len) = (entry.start(), entry.len());
            if entry.is_extended() && len > 0 {
                if let Err(e) = self.follow(start, len, &mut chain) {
                    log::warn!("some logical partitions are missing: {e}");
                }
                len = len.min(2 * MBR_SECTOR);
            }
            partitions.extend(self.clip(number, start, len));
        }
        let logical = (5..=MAX_PARTITIONS).zip(chain.logical);
        partitions
            .extend(logical.filter_map(|(number, (start, len))| self.clip(number, start, len)));
        partitions
    }

    /// Adds the logical partitions of the extended one at `start` to `chain`.
    fn follow(&mut self, start: u64, len: u64, chain: &mut Chain) -> io::Result<()> {
        let (mut here, mut here_len) = (start, len);
        loop {
            if chain.records.contains(&here) {
                return Err(invalid("the chain of boot records is a loop"));
            }
            if chain.records.len() >= MAX_PARTITIONS as usize {
                return Err(invalid("the chain of boot records is too long"));
            }
            chain.records.push(here);
            let record = self.boot_record(here)?;
            if !record.is_signed() {
                // An extended partition without logical ones needs no record.
                return if here == start { Ok(()) } else { Err(invalid("a link leads nowhere")) };
            }
            for (i, entry) in record.entries.iter().enumerate() {
                let end = entry.start() + entry.len();
                // Only OS/2 used the last two entries; others may leave garbage there.
                let fits = end <= here_len && here + end <= start + len;
                if entry.len() > 0 && !entry.is_extended() && (i < 2 || fits) {
                    chain.logical.push((here + entry.start(), entry.len()));
                }
            }
            let Some(link) = record.entries.iter().find(|e| e.is_extended() && e.len() > 0) else {
                return Ok(());
            };
            (here, here_len) = (start + link.start(), link.len());
        }
    }

    /// A partition without what is beyond the disk's end, if anything is left.
    fn clip(&self, number: u32, start: u64, len: u64) -> Option<Partition> {
        let len = len.min(self.size.saturating_sub(start));
        let range = GuestRange::new(GuestOffset::new(start), len);
        (!range.is_empty()).then_some(Partition { number, range })
    }

    fn last_sector(&self, sector_len: u64) -> u64 {
        (self.size / sector_len).saturating_sub(1)
    }

    fn boot_record(&mut self, offset: u64) -> io::Result<BootRecord> {
        let bytes = self.read(offset, size_of::<BootRecord>() as u64)?;
        BootRecord::read_from_bytes(&bytes).map_err(|_| invalid("the boot record is too short"))
    }

    /// Reads `len` bytes, which nobody may ask for before looking how many that can be.
    fn read(&mut self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        if offset > self.size || len > self.size - offset {
            return Err(invalid("it is beyond the disk's end"));
        }
        let mut bytes = vec![0; len as usize];
        self.reader.seek(SeekFrom::Start(offset))?;
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// What has been seen on the way along the boot records of logical partitions.
#[derive(Default)]
struct Chain {
    /// Start and length in bytes of partition 5 and those behind it.
    logical: Vec<(u64, u64)>,
    /// Where boot records were, to notice when the chain leads back to one.
    records: Vec<u64>,
}

/// A GPT header's checksum, which is made with zeros in its own place.
fn header_crc(sector: &[u8], header_len: u32) -> Option<u32> {
    let len = header_len as usize;
    if len < size_of::<GptHeader>() {
        return None;
    }
    Some(crc(&[sector.get(..16)?, &[0; 4], sector.get(20..len)?]))
}

fn crc(pieces: &[&[u8]]) -> u32 {
    let mut crc = Crc::new();
    pieces.iter().for_each(|piece| crc.update(piece));
    crc.sum()
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests;
