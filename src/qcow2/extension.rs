//! Header extensions (section "Header extensions").

use super::base_record::BASE_RECORD;
use super::features::FEATURE_NAMES;
use crate::error::{Error, Result};

const END: u32 = 0;
const BITMAPS: u32 = 0x2385_2875;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE_NAME: u32 = 0x4441_5441;
const FEATURE_NAME_TABLE: u32 = 0x6803_f857;
/// Bytes of an entry of the feature name table: type, bit, name.
const FEATURE_NAME_LEN: usize = 48;

/// A header extension, in the order of the file. What is not understood is kept as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extension {
    /// The format of the backing file, in QEMU's words: "qcow2", "raw".
    BackingFormat(String),
    /// Where the bitmap directory is, as raw data: it counts only under its autoclear bit.
    Bitmaps(Vec<u8>),
    /// The name of the external data file.
    DataFileName(Vec<u8>),
    /// Names of feature bits, as raw 48-byte entries.
    FeatureNames(Vec<u8>),
    /// What we remember of the backing file: see [`super::BaseRecord`].
    BaseRecord(Vec<u8>),
    /// Any other: its type and data.
    Other {
        /// The extension's type.
        kind: u32,
        /// Its data, without padding.
        data: Vec<u8>,
    },
}

impl Extension {
    /// Reads the extensions from `area`, which ends where the backing file's name or the cluster does.
    ///
    /// # Errors
    /// An extension that is longer than the area.
    pub fn parse_all(mut area: &[u8]) -> Result<Vec<Self>> {
        let mut extensions = Vec::new();
        while let Some((head, rest)) = area.split_at_checked(8) {
            let number = |at: usize| {
                head[at..at + 4].iter().fold(0, |number, &byte| number << 8 | u32::from(byte))
            };
            let (kind, len) = (number(0), number(4) as usize);
            if kind == END {
                break;
            }
            let Some(data) = rest.get(..len) else {
                return Err(Error::invalid(
                    "header extension",
                    format!("extension {kind:#010x} of {len} bytes runs out of the header"),
                ));
            };
            extensions.push(Self::parse(kind, data)?);
            area = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(extensions)
    }

    fn parse(kind: u32, data: &[u8]) -> Result<Self> {
        Ok(match kind {
            BACKING_FORMAT => {
                let name = std::str::from_utf8(data).ok().filter(|name| name.len() < 16);
                let name = name.ok_or_else(|| {
                    Error::invalid("backing format", "its name is too long or no text")
                })?;
                Self::BackingFormat(name.to_owned())
            }
            BITMAPS => Self::Bitmaps(data.to_vec()),
            DATA_FILE_NAME => Self::DataFileName(data.to_vec()),
            FEATURE_NAME_TABLE => Self::FeatureNames(data.to_vec()),
            BASE_RECORD => Self::BaseRecord(data.to_vec()),
            _ => Self::Other { kind, data: data.to_vec() },
        })
    }

    /// Appends the extensions and the end mark to `out`.
    pub fn write_all(extensions: &[Self], out: &mut Vec<u8>) {
        for extension in extensions {
            let (kind, data) = match extension {
                Self::BackingFormat(name) => (BACKING_FORMAT, name.as_bytes()),
                Self::Bitmaps(data) => (BITMAPS, &data[..]),
                Self::DataFileName(name) => (DATA_FILE_NAME, &name[..]),
                Self::FeatureNames(table) => (FEATURE_NAME_TABLE, &table[..]),
                Self::BaseRecord(data) => (BASE_RECORD, &data[..]),
                Self::Other { kind, data } => (*kind, &data[..]),
            };
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]);
    }

    /// The table of all feature names that are defined today.
    pub fn feature_names() -> Self {
        let mut table = Vec::with_capacity(FEATURE_NAMES.len() * FEATURE_NAME_LEN);
        for &(kind, bit, name) in FEATURE_NAMES {
            table.extend([kind, bit]);
            table.extend(name.as_bytes());
            table.resize(table.len().next_multiple_of(FEATURE_NAME_LEN), 0);
        }
        Self::FeatureNames(table)
    }

    /// The name that the image itself gives to incompatible feature bit `bit`.
    pub fn incompatible_name(extensions: &[Self], bit: u32) -> Option<String> {
        let tables = extensions.iter().filter_map(|extension| match extension {
            Self::FeatureNames(table) => Some(table),
            _ => None,
        });
        let mut entries = tables.flat_map(|table| table.chunks_exact(FEATURE_NAME_LEN));
        let entry = entries.find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)?;
        let name = entry[2..].split(|&byte| byte == 0).next()?;
        let name = String::from_utf8_lossy(name);
        // The name comes from a file: control characters must not reach a terminal.
        Some(name.chars().filter(|c| !c.is_control()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_survive_writing_and_reading() {
        let extensions = vec![
            Extension::BackingFormat("raw".into()),
            Extension::feature_names(),
            Extension::Other { kind: 0x1234_5678, data: vec![1, 2, 3] },
        ];
        let mut bytes = Vec::new();
        Extension::write_all(&extensions, &mut bytes);
        assert_eq!(Extension::parse_all(&bytes).unwrap(), extensions);
    }

    #[test]
    fn an_extension_longer_than_the_header_is_refused() {
        let mut bytes = 0x1234_5678_u32.to_be_bytes().to_vec();
        bytes.extend(u32::MAX.to_be_bytes());
        assert!(Extension::parse_all(&bytes).is_err());
    }

    #[test]
    fn an_unknown_bit_is_named_by_the_images_own_table() {
        let mut table = vec![0, 42];
        table.extend(b"time travel\x1b[31m");
        table.resize(48, 0);
        let extensions = [Extension::FeatureNames(table)];
        let name = Extension::incompatible_name(&extensions, 42).unwrap();
        assert_eq!(name, "time travel[31m");
    }
}
