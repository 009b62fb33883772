//! What an image remembers of its backing file, so that a change of that is noticed: a header extension of our own.

use sha2::{Digest, Sha256};
use zerocopy::big_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::{Places, offsets};
use crate::error::{Error, Result};
use crate::units::HostOffset;

/// The type of the extension.
pub const BASE_RECORD: u32 = 0x5143_4261;
const VERSION: u32 = 1;
const HAS_DIGEST: u32 = 1;
/// Bytes of the extension's data, a multiple of 8.
const DATA_LEN: usize = size_of::<Raw>();

/// A backing file as it was when somebody last said that it is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseRecord {
    /// Length in bytes, with that of its external data file.
    pub len: u64,
    /// When it was last modified, it or its data file: seconds since 1970.
    pub modified_seconds: i64,
    /// The rest of that time.
    pub modified_nanoseconds: u32,
    /// SHA-256 of its bytes, and then of its data file's.
    pub digest: Option<[u8; 32]>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    version: U32,
    flags: U32,
    len: U64,
    modified_seconds: I64,
    modified_nanoseconds: U32,
    /// The beginning of the SHA-256 of the name that the header has for the file, or zeroes. QEMU keeps the record also where
    /// it gives the image another backing file.
    name: [u8; 4],
    digest: [u8; 32],
    /// The beginning of the SHA-256 of all before: the record may lie in two sectors, of which a power cut writes one.
    checksum: [u8; 8],
}

impl Raw {
    fn checksum_of_rest(&self) -> [u8; 8] {
        let bytes = self.as_bytes();
        beginning_of_hash(&bytes[..bytes.len() - 8])
    }
}

fn beginning_of_hash<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let hash = Sha256::digest(bytes);
    std::array::from_fn(|at| hash[at])
}

impl BaseRecord {
    /// Reads the data of the extension; `None` for one that was not written whole, by a later version, or of another file
    /// than the one that the header names now.
    pub fn parse(data: &[u8], backing_name: &[u8]) -> Option<Self> {
        let (raw, _) = Raw::ref_from_prefix(data).ok()?;
        if raw.version.get() != VERSION || raw.checksum != raw.checksum_of_rest() {
            return None;
        }
        if raw.name != [0; 4] && raw.name != beginning_of_hash(backing_name) {
            return None;
        }
        Some(Self {
            len: raw.len.get(),
            modified_seconds: raw.modified_seconds.get(),
            modified_nanoseconds: raw.modified_nanoseconds.get(),
            digest: (raw.flags.get() & HAS_DIGEST != 0).then_some(raw.digest),
        })
    }

    /// The data of the extension, in an image whose header names the file so.
    pub fn to_data(&self, backing_name: &[u8]) -> Vec<u8> {
        let mut raw = Raw {
            version: VERSION.into(),
            flags: if self.digest.is_some() { HAS_DIGEST } else { 0 }.into(),
            len: self.len.into(),
            modified_seconds: self.modified_seconds.into(),
            modified_nanoseconds: self.modified_nanoseconds.into(),
            name: beginning_of_hash(backing_name),
            digest: self.digest.unwrap_or_default(),
            checksum: [0; 8],
        };
        raw.checksum = raw.checksum_of_rest();
        raw.as_bytes().to_vec()
    }

    /// The writes that put the record into an image whose first cluster is `cluster`, each of which must be durable before
    /// the next. After each of them the header is whole, with what it had before or the record as well.
    ///
    /// # Errors
    /// A first cluster without room for it; extensions without an end mark, or one that two sectors share.
    pub fn put_into(&self, cluster: &[u8]) -> Result<Vec<(HostOffset, Vec<u8>)>> {
        let place = |at: usize| HostOffset::new(at as u64);
        let Places { extensions, end_mark, backing_name } = Places::find(cluster)?;
        let data = self.to_data(&cluster[backing_name.clone()]);
        let found = extensions.iter().rev().find(|(kind, _)| *kind == BASE_RECORD);
        if let Some((_, old)) = found.filter(|(_, old)| old.len() == DATA_LEN) {
            return Ok(vec![(place(old.start), data)]);
        }
        let no_room = || {
            Error::usage(format!(
                "the first cluster, of {} bytes, has no room to record the backing file",
                cluster.len()
            ))
        };
        let end_mark = end_mark.filter(|at| at % 8 == 0).ok_or_else(no_room)?;
        let behind = end_mark + 8 + DATA_LEN + 8;
        let moved_to = behind.max(backing_name.end).next_multiple_of(8);
        if moved_to + backing_name.len() > cluster.len() {
            return Err(no_room());
        }
        let body = [&data[..], &[0; 8]].concat();
        let head = [BASE_RECORD.to_be_bytes(), (DATA_LEN as u32).to_be_bytes()].concat();
        Ok(vec![
            // The name, to where the record leaves it alone.
            (place(moved_to), cluster[backing_name].to_vec()),
            (offsets::BACKING_NAME, (moved_to as u64).to_be_bytes().to_vec()),
            // What is behind the end mark counts for nobody.
            (place(end_mark + 8), body),
            // The end mark, of 8 bytes inside a sector, becomes the head of the record.
            (place(end_mark), head),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::{Extension, Header};
    use crate::random::{Random, seeds};

    const NAME: &[u8] = b"base.raw";

    fn record(digest: Option<[u8; 32]>) -> BaseRecord {
        BaseRecord { len: 1 << 33, modified_seconds: -5, modified_nanoseconds: 999_999_999, digest }
    }

    /// The first cluster of an image with a backing file and, as QEMU writes it, names of features.
    fn cluster() -> Vec<u8> {
        let mut cluster = vec![0; 65536];
        cluster[..4].copy_from_slice(b"QFI\xfb");
        cluster[7] = 3;
        cluster[23] = 16;
        cluster[99] = 4;
        cluster[103] = 112;
        let mut extensions = Vec::new();
        let format = Extension::BackingFormat("raw".into());
        Extension::write_all(&[format, Extension::feature_names()], &mut extensions);
        let name = 112 + extensions.len();
        cluster[112..name].copy_from_slice(&extensions);
        cluster[8..16].copy_from_slice(&(name as u64).to_be_bytes());
        cluster[16..20].copy_from_slice(&8_u32.to_be_bytes());
        cluster[name..name + 8].copy_from_slice(NAME);
        cluster
    }

    #[test]
    fn a_record_survives_writing_and_reading_and_no_byte_of_it_may_change() {
        for record in [record(None), record(Some([7; 32]))] {
            let data = record.to_data(NAME);
            assert_eq!(BaseRecord::parse(&data, NAME), Some(record));
            assert_eq!(BaseRecord::parse(&data, b"base.ra"), None);
            assert_eq!(BaseRecord::parse(&data, b""), None);
            for at in 0..data.len() {
                let mut torn = data.clone();
                torn[at] ^= 1;
                assert_eq!(BaseRecord::parse(&torn, NAME), None, "byte {at}");
            }
        }
        assert_eq!(BaseRecord::parse(&[0; DATA_LEN], NAME), None);
        assert_eq!(BaseRecord::parse(&[], NAME), None);
    }

    #[test]
    fn a_record_from_before_names_were_in_it_is_of_any_file() {
        let mut raw = Raw::read_from_bytes(&record(None).to_data(NAME)).unwrap();
        raw.name = [0; 4];
        raw.checksum = raw.checksum_of_rest();
        assert_eq!(BaseRecord::parse(raw.as_bytes(), b"other.raw"), Some(record(None)));
    }

    #[test]
    fn a_header_that_names_another_file_has_no_record_until_it_gets_one_of_that() {
        let mut cluster = cluster();
        let put = |cluster: &mut [u8]| {
            for (at, bytes) in record(None).put_into(cluster).unwrap() {
                cluster[at.get() as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            assert_eq!(Header::parse(cluster).unwrap().base_record(), Some(record(None)));
        };
        put(&mut cluster);
        let name = Places::find(&cluster).unwrap().backing_name;
        cluster[name].copy_from_slice(b"main.raw");
        assert_eq!(Header::parse(&cluster).unwrap().base_record(), None);
        put(&mut cluster);
        assert_eq!(Header::parse(&cluster).unwrap().extensions.len(), 3);
    }

    #[test]
    fn a_header_is_whole_after_each_step_of_getting_its_record() {
        let mut cluster = cluster();
        let before = Header::parse(&cluster).unwrap();
        assert_eq!(before.base_record(), None);
        for record in [record(None), record(Some([7; 32]))] {
            let had = Header::parse(&cluster).unwrap().base_record();
            let writes = record.put_into(&cluster).unwrap();
            for (number, (at, bytes)) in writes.iter().enumerate() {
                let at = at.get() as usize;
                cluster[at..at + bytes.len()].copy_from_slice(bytes);
                let header = Header::parse(&cluster).unwrap();
                let expected =
                    if number + 1 == writes.len() { Some(record.clone()) } else { had.clone() };
                assert_eq!(header.base_record(), expected, "write {number}");
                assert_eq!(header.backing_name, before.backing_name);
                assert_eq!(header.backing_format(), before.backing_format());
                assert_eq!(header.extensions[..2], before.extensions[..2]);
            }
        }
        assert_eq!(Header::parse(&cluster).unwrap().extensions.len(), 3);
    }

    #[test]
    fn whatever_a_header_holds_it_gets_its_record_or_stays_as_it_is() {
        let (mut sealed, record) = (0, record(Some([7; 32])));
        let mut randoms = seeds(3).flat_map(|seed| {
            let mut random = Random::new(seed);
            (0..1000).map(move |_| Random::new(random.below(u64::MAX)))
        });
        for mut random in &mut randoms {
            let mut cluster = cluster();
            cluster[23] = 10 + random.below(3) as u8;
            cluster.truncate(1 << cluster[23]);
            for _ in 0..random.below(4) {
                let at = random.pick(&[8_u64, 100, 112, 120, 136, 500, 600]) + random.below(32);
                cluster[at as usize] = random.pick(&[0, 1, 8, 16, 0x51, 0xff]);
            }
            let Ok(before) = Header::parse(&cluster) else { continue };
            let Ok(writes) = record.put_into(&cluster) else { continue };
            for (at, bytes) in writes {
                let at = at.get() as usize;
                cluster[at..at + bytes.len()].copy_from_slice(&bytes);
                let now = Header::parse(&cluster).unwrap();
                let others = |header: &Header| {
                    let mut header = header.clone();
                    header.extensions.retain(|one| !matches!(one, Extension::BaseRecord(_)));
                    header
                };
                assert_eq!(others(&now), others(&before));
            }
            assert_eq!(Header::parse(&cluster).unwrap().base_record().as_ref(), Some(&record));
            sealed += 1;
        }
        assert!(sealed > 100, "only {sealed} headers got a record");
    }

    #[test]
    fn a_cluster_without_room_is_left_alone() {
        let mut cluster = cluster();
        cluster[23] = 9;
        let name = 8 + u64::from_be_bytes(cluster[8..16].try_into().unwrap()) as usize;
        cluster.truncate(name.next_multiple_of(512));
        assert!(record(None).put_into(&cluster).is_err());
    }
}
