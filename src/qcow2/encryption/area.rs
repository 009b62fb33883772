//! Where the LUKS header is: the header extension "Full disk encryption header pointer".

use crate::error::{Error, Result};
use crate::qcow2::{Extension, Geometry, be_u64};
use crate::units::HostOffset;

/// Greatest length in bytes of the area of a LUKS header that is read: QEMU's longest, that of a key of 512 bits, has
/// just under 2 MiB.
pub const MAX_LUKS_AREA_BYTES: u64 = 4 << 20;

const ENCRYPTION_HEADER: u32 = 0x0537_be77;

/// The area of the LUKS header and its key material in the image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LuksArea {
    /// Where it begins, on a cluster.
    pub offset: HostOffset,
    /// Its length in bytes, at most [`MAX_LUKS_AREA_BYTES`].
    pub len: u64,
}

impl LuksArea {
    /// What errors call the extension.
    pub const FIELD: &str = "encryption header pointer";

    /// Whether one of the image's header extensions names such an area.
    pub fn is_named_in(extensions: &[Extension]) -> bool {
        Self::pointer(extensions).is_some()
    }

    fn pointer(extensions: &[Extension]) -> Option<&[u8]> {
        extensions.iter().find_map(|extension| match extension {
            Extension::Other { kind: ENCRYPTION_HEADER, data } => Some(&data[..]),
            _ => None,
        })
    }

    /// The area that one of the image's header extensions names, if there is such an extension.
    ///
    /// Whether the area is inside the file is the reader's to find out.
    ///
    /// # Errors
    /// An extension of another length than 16 bytes, an area that does not begin on a cluster behind the header, or
    /// one that is empty or too long.
    pub fn find(extensions: &[Extension], geometry: Geometry) -> Result<Option<Self>> {
        Self::pointer(extensions).map(|data| Self::parse(data, geometry)).transpose()
    }

    fn parse(data: &[u8], geometry: Geometry) -> Result<Self> {
        if data.len() != 16 {
            return Err(Error::invalid(
                Self::FIELD,
                format!("it has {} bytes, not 16", data.len()),
            ));
        }
        let (offset, len) = (be_u64(data, 0), be_u64(data, 1));
        if offset == 0 || !offset.is_multiple_of(geometry.cluster_size()) {
            return Err(Error::invalid(
                Self::FIELD,
                format!("offset {offset} is not that of a cluster"),
            ));
        }
        if len == 0 || len > MAX_LUKS_AREA_BYTES || offset.checked_add(len).is_none() {
            return Err(Error::invalid(
                Self::FIELD,
                format!("{len} bytes is too short or too long"),
            ));
        }
        Ok(Self { offset: HostOffset::new(offset), len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(offset: u64, len: u64) -> Result<Option<LuksArea>> {
        let data = [offset.to_be_bytes(), len.to_be_bytes()].concat();
        LuksArea::find(&[Extension::Other { kind: ENCRYPTION_HEADER, data }], Geometry::new(16, 4))
    }

    #[test]
    fn the_area_is_found() {
        let area = find(262_144, 2_068_480).unwrap();
        assert_eq!(area, Some(LuksArea { offset: HostOffset::new(262_144), len: 2_068_480 }));
        let none = LuksArea::find(&[Extension::feature_names()], Geometry::new(16, 4)).unwrap();
        assert_eq!(none, None);
    }

    #[test]
    fn impossible_areas_are_refused() {
        for (offset, len) in [
            (0, 4096),
            (512, 4096),
            (65536, 0),
            (65536, MAX_LUKS_AREA_BYTES + 1),
            (!0xffff, 65536),
            (u64::MAX, u64::MAX),
        ] {
            assert!(find(offset, len).is_err(), "{offset} {len}");
        }
        let short = Extension::Other { kind: ENCRYPTION_HEADER, data: vec![0; 15] };
        assert!(LuksArea::find(&[short], Geometry::new(16, 4)).is_err());
    }
}
