//! Where things are in the first cluster of an image.

use std::ops::Range;

use zerocopy::FromBytes;

use super::{RawHeader, RawHeaderV3, Version, backing_name, cluster_bits, header_len, parse_fixed};
use crate::error::{Error, Result};
use crate::qcow2::Geometry;

/// The variable parts of the first cluster, as offsets in it.
pub struct Places {
    /// Extensions in the order of the file: type and place of the data.
    pub extensions: Vec<(u32, Range<usize>)>,
    /// The end mark behind them, if there is one.
    pub end_mark: Option<usize>,
    /// The name of the backing file; empty without one.
    pub backing_name: Range<usize>,
}

impl Places {
    /// Finds them in the first cluster, whole, of an image.
    ///
    /// # Errors
    /// As [`super::Header::parse`].
    pub fn find(cluster: &[u8]) -> Result<Self> {
        let raw = parse_fixed(cluster)?;
        let cluster_bits = cluster_bits(raw)?;
        let start = match super::version(raw)? {
            Version::V2 => size_of::<RawHeader>(),
            Version::V3 => {
                let (v3, _) = RawHeaderV3::ref_from_prefix(&cluster[size_of::<RawHeader>()..])
                    .map_err(|_| Error::invalid("header", "the file ends inside it"))?;
                header_len(v3, cluster.len(), cluster_bits)?
            }
        };
        let name = backing_name(raw, cluster, start, Geometry::new(cluster_bits, 4))?;
        let backing_name = match name {
            Some(name) => {
                let offset = raw.backing_file_offset.get() as usize;
                offset..offset + name.len()
            }
            None => 0..0,
        };
        let end = if backing_name.is_empty() { cluster.len() } else { backing_name.start };
        let mut places = Self { extensions: Vec::new(), end_mark: None, backing_name };
        let mut at = start;
        while let Some(head) = cluster[..end].get(at..).and_then(|rest| rest.first_chunk::<8>()) {
            let [a, b, c, d, e, f, g, h] = *head;
            let (kind, len) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
            if kind == 0 {
                places.end_mark = Some(at);
                break;
            }
            let data = at + 8..(at + 8).saturating_add(len as usize);
            at = data.start.saturating_add((len as usize).next_multiple_of(8));
            places.extensions.push((kind, data));
        }
        Ok(places)
    }
}
