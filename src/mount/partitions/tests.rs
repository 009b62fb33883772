//! Tables made of bytes, whole and broken.

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
    assert_eq!(image.find(), [(1, 10, 90), (3, 100, 2), (4, 400, 100), (5, 110, 40), (6, 155, 45)]);
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
    let seed = seed
        .unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_nanos() as u64));
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
