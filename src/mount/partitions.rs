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
mod tests {
    use std::io::Cursor;

    use super::*;

    /// The type of a Linux file system in an MBR, and of any partition in the GPTs made here.
    const LINUX: u8 = 0x83;
    const EXTENDED: u8 = 0x05;
    const PROTECTIVE: u8 = 0xee;

    /// A disk's bytes, `find`'s result in sectors and ways to write tables.
    struct Image {
        bytes: Vec<u8>,
        sector_len: usize,
    }

    impl Image {
        fn new(sector_len: usize, sectors: usize) -> Self {
            Self { bytes: vec![0; sector_len * sectors], sector_len }
        }

        /// Number, first sector and number of sectors of each partition.
        fn find(&self) -> Vec<(u32, u64, u64)> {
            let unit = self.sector_len as u64;
            find(Cursor::new(&self.bytes), self.bytes.len() as u64)
                .iter()
                .map(|p| (p.number, p.range.start.get() / unit, p.range.len / unit))
                .collect()
        }

        fn put(&mut self, offset: usize, bytes: &[u8]) {
            self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        }

        fn u32(&self, offset: usize) -> usize {
            u32::from_le_bytes(self.bytes[offset..offset + 4].try_into().unwrap()) as usize
        }

        /// Writes an entry of the MBR or EBR in `sector`, from index 0, and signs the record.
        fn put_mbr(&mut self, sector: usize, index: usize, kind: u8, start: u32, len: u32) {
            let entry = sector * 512 + 446 + 16 * index;
            self.put(entry + 4, &[kind]);
            self.put(entry + 8, &start.to_le_bytes());
            self.put(entry + 12, &len.to_le_bytes());
            self.put(sector * 512 + 510, &[0x55, 0xaa]);
        }

        /// A disk with a protective MBR and both GPTs.
        /// Entries are number, first sector and last sector.
        fn with_gpt(sector_len: usize, sectors: usize, entries: &[(u32, u64, u64)]) -> Self {
            let mut image = Self::new(sector_len, sectors);
            image.put_mbr(0, 0, PROTECTIVE, 1, sectors as u32 - 1);
            let array_sectors = 128 * 128 / sector_len;
            let last = sectors - 1;
            for (own, other, array) in [(1, last, 2), (last, 1, last - array_sectors)] {
                let header = own * sector_len;
                image.put(header, b"EFI PART\0\0\x01\0");
                image.put(header + 12, &92u32.to_le_bytes());
                for (i, sector) in
                    [own, other, 2 + array_sectors, last - array_sectors - 1].iter().enumerate()
                {
                    image.put(header + 24 + 8 * i, &(*sector as u64).to_le_bytes());
                }
                image.put(header + 72, &(array as u64).to_le_bytes());
                image.put(header + 80, &128u32.to_le_bytes());
                image.put(header + 84, &128u32.to_le_bytes());
                for &(number, first, last) in entries {
                    let entry = array * sector_len + (number as usize - 1) * 128;
                    image.put(entry, &[LINUX; 16]);
                    image.put(entry + 32, &first.to_le_bytes());
                    image.put(entry + 40, &last.to_le_bytes());
                }
                image.seal(own);
            }
            image
        }

        /// Writes the checksums of the GPT whose header is in `sector`, as far as it has any.
        fn seal(&mut self, sector: usize) {
            let header = sector * self.sector_len;
            let start = self.u32(header + 72).saturating_mul(self.sector_len);
            let len = self.u32(header + 80).saturating_mul(self.u32(header + 84));
            if let Some(array) = self.bytes.get(start..start.saturating_add(len)) {
                let array_crc = crc(&[array]);
                self.put(header + 88, &array_crc.to_le_bytes());
            }
            let header_len = self.u32(header + 12) as u32;
            if let Some(crc) = header_crc(&self.bytes[header..], header_len) {
                self.put(header + 16, &crc.to_le_bytes());
            }
        }

        /// Writes one field of the primary GPT's header with correct checksums and removes the
        /// backup.
        fn with_field(mut self, offset: usize, value: &[u8]) -> Self {
            let backup = self.bytes.len() - self.sector_len;
            self.put(backup, &[0; 92]);
            self.put(self.sector_len + offset, value);
            self.seal(1);
            self
        }
    }

    #[test]
    fn gpt_partitions_have_their_entries_numbers() {
        for sector_len in [512, 4096] {
            let entries = [(1, 40, 49), (3, 50, 50), (128, 60, 79)];
            let image = Image::with_gpt(sector_len, 200, &entries);
            assert_eq!(image.find(), [(1, 40, 10), (3, 50, 1), (128, 60, 20)]);
        }
    }

    #[test]
    fn the_backup_helps_when_the_primary_gpt_is_damaged() {
        for sector_len in [512, 4096] {
            let whole = Image::with_gpt(sector_len, 200, &[(2, 40, 49)]);
            for damage in [sector_len, sector_len + 30, 2 * sector_len + 1] {
                let mut image = Image { bytes: whole.bytes.clone(), sector_len };
                image.bytes[damage] ^= 1;
                assert_eq!(image.find(), [(2, 40, 10)]);
                let backup = image.bytes.len() - sector_len;
                image.bytes[backup + 40] ^= 1;
                assert_eq!(image.find(), []);
            }
        }
    }

    #[test]
    fn a_gpt_counts_only_with_a_protective_mbr() {
        let mut image = Image::with_gpt(512, 200, &[(1, 40, 49)]);
        image.put_mbr(0, 1, LINUX, 60, 10);
        assert_eq!(image.find(), [(1, 40, 10)], "a hybrid MBR");
        image.put_mbr(0, 0, LINUX, 50, 10);
        assert_eq!(image.find(), [(1, 50, 10), (2, 60, 10)], "a new MBR");
        image.put_mbr(0, 0, PROTECTIVE, 2, 10);
        assert_eq!(image.find(), [], "a protective MBR for something else");
    }

    #[test]
    fn a_stale_backup_does_not_win_over_the_primary() {
        let mut image = Image::with_gpt(4096, 200, &[(1, 40, 49)]);
        let stale = Image::with_gpt(512, 200 * 8, &[(1, 64, 71)]);
        let len = image.bytes.len();
        image.put(len - 512, &stale.bytes[len - 512..]);
        image.put(len - 33 * 512, &stale.bytes[len - 33 * 512..len - 32 * 512]);
        assert_eq!(image.find(), [(1, 40, 10)]);
    }

    #[test]
    fn gpt_entries_outside_the_disk_are_dropped() {
        let entries = [(1, 190, 200), (2, 50, 49), (3, 0, u64::MAX), (4, u64::MAX, 0), (5, 7, 199)];
        assert_eq!(Image::with_gpt(512, 200, &entries).find(), [(5, 7, 193)]);
    }

    #[test]
    fn hostile_gpt_headers_are_refused() {
        let image = || Image::with_gpt(512, 200, &[(1, 40, 49)]);
        let max = [0xff; 8];
        assert_eq!(image().with_field(92, &max).find(), [(1, 40, 10)], "behind the header");
        assert_eq!(image().with_field(12, &max[..4]).find(), [], "header length");
        assert_eq!(image().with_field(12, &[0; 4]).find(), [], "header length");
        assert_eq!(image().with_field(24, &[2]).find(), [], "own sector");
        assert_eq!(image().with_field(40, &[180]).find(), [], "first usable sector");
        assert_eq!(image().with_field(48, &[200]).find(), [], "last usable sector");
        assert_eq!(image().with_field(72, &max).find(), [], "sector of the entries");
        assert_eq!(image().with_field(80, &max[..4]).find(), [], "number of entries");
        assert_eq!(image().with_field(80, &[0; 4]).find(), [], "number of entries");
        assert_eq!(image().with_field(84, &max[..4]).find(), [], "length of entries");
        assert_eq!(image().with_field(84, &[0; 4]).find(), [], "length of entries");
        assert_eq!(image().with_field(80, &max).find(), [], "number and length of entries");
    }

    #[test]
    fn longer_gpt_headers_and_entries_are_understood() {
        let image = || Image::with_gpt(512, 200, &[(1, 40, 49), (3, 50, 59)]);
        assert_eq!(image().with_field(12, &[0, 2]).find(), [(1, 40, 10), (3, 50, 10)]);
        let wide = [64, 0, 0, 0, 0, 1, 0, 0];
        assert_eq!(image().with_field(80, &wide).find(), [(1, 40, 10), (2, 50, 10)]);
    }

    #[test]
    fn logical_partitions_are_numbered_from_5() {
        let mut image = Image::new(512, 1000);
        image.put_mbr(0, 0, LINUX, 10, 90);
        image.put_mbr(0, 2, EXTENDED, 100, 300);
        image.put_mbr(0, 3, LINUX, 400, 100);
        image.put_mbr(100, 0, LINUX, 10, 40);
        image.put_mbr(100, 1, EXTENDED, 50, 50);
        image.put_mbr(150, 0, LINUX, 5, 45);
        assert_eq!(
            image.find(),
            [(1, 10, 90), (3, 100, 2), (4, 400, 100), (5, 110, 40), (6, 155, 45)]
        );
    }

    #[test]
    fn an_empty_extended_partition_needs_no_boot_record() {
        let mut image = Image::new(512, 1000);
        image.put_mbr(0, 1, EXTENDED, 100, 300);
        assert_eq!(image.find(), [(2, 100, 2)]);
    }

    #[test]
    fn a_chain_of_logical_partitions_ends_at_a_loop() {
        let mut image = Image::new(512, 1000);
        image.put_mbr(0, 0, EXTENDED, 100, 300);
        image.put_mbr(100, 0, LINUX, 10, 40);
        image.put_mbr(100, 1, EXTENDED, 50, 50);
        image.put_mbr(150, 0, LINUX, 5, 45);
        for (target, len) in [(0, 50), (50, 50), (10_000, 50), (u32::MAX, u32::MAX)] {
            image.put_mbr(150, 1, EXTENDED, target, len);
            assert_eq!(image.find(), [(1, 100, 2), (5, 110, 40), (6, 155, 45)]);
        }
    }

    #[test]
    fn a_long_chain_of_logical_partitions_is_cut() {
        let mut image = Image::new(512, 1000);
        image.put_mbr(0, 0, EXTENDED, 100, 900);
        for i in 0..450 {
            image.put_mbr(100 + 2 * i, 0, LINUX, 1, 1);
            image.put_mbr(100 + 2 * i, 1, EXTENDED, 2 * i as u32 + 2, 2);
        }
        let found = image.find();
        assert_eq!(found.len(), 1 + 251);
        assert_eq!(found.last(), Some(&(255, 100 + 2 * 250 + 1, 1)));
    }

    #[test]
    fn garbage_in_the_last_entries_of_a_logical_boot_record_is_ignored() {
        let mut image = Image::new(512, 1000);
        image.put_mbr(0, 0, EXTENDED, 100, 300);
        image.put_mbr(100, 0, LINUX, 10, 40);
        image.put_mbr(100, 2, LINUX, 0x1234_5678, 40);
        image.put_mbr(100, 3, LINUX, 60, 40);
        assert_eq!(image.find(), [(1, 100, 2), (5, 110, 40), (6, 160, 40)]);
    }

    #[test]
    fn mbr_partitions_end_with_the_disk() {
        let mut image = Image::new(512, 1000);
        image.put_mbr(0, 0, LINUX, 900, 200);
        image.put_mbr(0, 1, LINUX, 1000, 200);
        image.put_mbr(0, 2, LINUX, 500, 0);
        image.put_mbr(0, 3, LINUX, 0, u32::MAX);
        assert_eq!(image.find(), [(1, 900, 100), (4, 0, 1000)]);
    }

    #[test]
    fn disks_without_a_table_have_no_partitions() {
        for len in [0, 1, 511, 512, 4096] {
            assert_eq!(find(Cursor::new(vec![0; len]), len as u64), []);
        }
        // A file system's boot sector: code where a table has its entries.
        let mut image = Image::new(512, 1000);
        image.put(446, &b"Press any key to try again ... ".repeat(3)[..64]);
        image.put(510, &[0x55, 0xaa]);
        assert_eq!(image.find(), []);
    }

    #[test]
    fn unreadable_disks_have_no_partitions() {
        let image = Image::with_gpt(512, 200, &[(1, 40, 49)]);
        for len in [0, 100, 600, 1500] {
            assert_eq!(find(Cursor::new(&image.bytes[..len]), image.bytes.len() as u64), []);
        }
    }

    /// Splitmix64: small, and any seed will do.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % limit as u64) as usize
        }
    }

    /// Damages the tables, often with correct checksums so that the damage is not just refused.
    #[test]
    fn any_damage_gives_sane_partitions() {
        let seed = std::env::var("PARTITIONS_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_nanos() as u64)
        });
        println!("PARTITIONS_SEED={seed}");
        let mut random = Random(seed);

        let mut mbr = Image::new(512, 200);
        mbr.put_mbr(0, 0, EXTENDED, 100, 100);
        mbr.put_mbr(0, 1, LINUX, 10, 80);
        mbr.put_mbr(100, 0, LINUX, 1, 20);
        mbr.put_mbr(100, 1, EXTENDED, 50, 50);
        mbr.put_mbr(150, 0, LINUX, 1, 20);
        let entries = [(1, 10, 14), (2, 15, 19), (128, 20, 29)];
        let whole = [mbr, Image::with_gpt(512, 80, &entries), Image::with_gpt(4096, 40, &entries)];
        let mut total = 0;
        for round in 0..1000 {
            let Image { bytes, sector_len } = &whole[round % 3];
            let mut image = Image { bytes: bytes.clone(), sector_len: *sector_len };
            let tables: &[(usize, usize)] = match round % 3 {
                0 => &[(446, 66), (100 * 512 + 446, 66), (150 * 512 + 446, 66)],
                _ => &[(446, 66), (*sector_len, 100), (2 * sector_len, 512)],
            };
            for _ in 0..random.below(8) {
                let (start, len) = tables[random.below(tables.len())];
                let place = start + random.below(len);
                image.bytes[place] = match random.below(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => image.bytes[place] ^ (1 << random.below(8)),
                    _ => random.below(256) as u8,
                };
            }
            if round % 3 != 0 && random.below(4) != 0 {
                image.seal(1);
            }
            let size = image.bytes.len() as u64;
            let found = find(Cursor::new(&image.bytes), size);
            for partition in &found {
                let Partition { number, range } = *partition;
                assert!((1..=MAX_PARTITIONS).contains(&number), "{partition:?}");
                assert!(!range.is_empty() && range.end().get() <= size, "{partition:?}");
            }
            assert!(found.is_sorted_by(|a, b| a.number < b.number), "{found:?}");
            total += found.len();
        }
        assert!(total > 0, "all damaged tables were refused");
    }
}
