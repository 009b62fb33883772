//! What a header must not say.

use super::{COMPRESSION_ZLIB, COMPRESSION_ZSTD, Header};
use crate::error::{Error, Result};
use crate::qcow2::encryption::{CRYPT_AES, CRYPT_LUKS, CRYPT_NONE, LuksArea};
use crate::qcow2::features::incompatible_name;
use crate::qcow2::{
    AutoclearFeatures, DataPlace, Extension, IncompatibleFeatures, MAX_FILE_LEN, MAX_L1_BYTES,
    MAX_REFTABLE_BYTES, MAX_SNAPSHOTS,
};
use crate::units::HostOffset;

impl Header {
    /// Checks the places and sizes of the tables that the header names.
    ///
    /// # Errors
    /// An unaligned or oversized table, by the name of the field. Call [`Header::refuse_unsupported`] before: an
    /// unknown feature may change what these fields mean.
    pub fn check_tables(&self) -> Result<()> {
        self.check_l1_table()?;
        self.check_refcount_table()?;
        self.check_snapshot_table()
    }

    /// Checks the place and size of the active L1 table.
    ///
    /// # Errors
    /// As [`Header::check_tables`].
    pub fn check_l1_table(&self) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let needed = self.geometry.l1_entries(self.size);
        if l1_bytes > MAX_L1_BYTES || needed * 8 > MAX_L1_BYTES {
            return Err(Error::invalid("l1_size", "the active L1 table is above 32 MiB"));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(Error::invalid(
                "l1_size",
                format!("{} entries can't map a disk that needs {needed}", self.l1_entries),
            ));
        }
        check_place("l1_table_offset", self.l1_offset, l1_bytes, cluster_size)
    }

    /// Checks the place and size of the refcount table.
    ///
    /// # Errors
    /// As [`Header::check_tables`].
    pub fn check_refcount_table(&self) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let reftable_bytes = u64::from(self.reftable_clusters) * cluster_size;
        if reftable_bytes > MAX_REFTABLE_BYTES {
            return Err(Error::invalid("refcount_table_clusters", "the table is above 8 MiB"));
        }
        if self.reftable_clusters == 0 {
            return Err(Error::invalid("refcount_table_clusters", "there is no refcount table"));
        }
        check_place("refcount_table_offset", self.reftable_offset, reftable_bytes, cluster_size)
    }

    /// Checks the place of the snapshot table.
    ///
    /// # Errors
    /// As [`Header::check_tables`].
    pub fn check_snapshot_table(&self) -> Result<()> {
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::invalid("nb_snapshots", "more than 65536 snapshots"));
        }
        check_place("snapshots_offset", self.snapshots_offset, 0, self.geometry.cluster_size())
    }

    /// Refuses, by its name, a feature that this program can't read.
    ///
    /// # Errors
    /// [`crate::error::Problem::Unsupported`], or features that contradict each other.
    pub fn refuse_unsupported(&self) -> Result<()> {
        use IncompatibleFeatures as Bits;
        match self.crypt_method {
            CRYPT_NONE | CRYPT_AES | CRYPT_LUKS => {}
            other => return Err(Error::unsupported(format!("encryption method {other}"))),
        }
        let supported = Bits::DIRTY
            | Bits::CORRUPT
            | Bits::DATA_FILE
            | Bits::COMPRESSION_TYPE
            | Bits::EXTENDED_L2;
        let unsupported = self.incompatible - supported;
        if !unsupported.is_empty() {
            let bits = (0..64).filter(|bit| unsupported.bits() >> bit & 1 != 0);
            let names: Vec<_> = bits.map(|bit| self.incompatible_name(bit)).collect();
            return Err(Error::unsupported(names.join(", ")));
        }
        self.check_companions()?;
        let typed = self.incompatible.contains(Bits::COMPRESSION_TYPE);
        match (self.compression_type, typed) {
            (COMPRESSION_ZLIB, false) | (COMPRESSION_ZSTD, true) => Ok(()),
            (other, true) if other > COMPRESSION_ZSTD => {
                Err(Error::unsupported(format!("compression type {other}")))
            }
            (other, _) => Err(Error::invalid(
                "compression_type",
                format!("type {other} does not agree with incompatible bit 3"),
            )),
        }
    }

    fn incompatible_name(&self, bit: u32) -> String {
        match incompatible_name(bit) {
            Some(name) => name.to_owned(),
            None => match Extension::incompatible_name(&self.extensions, bit) {
                Some(name) => format!("{name} (incompatible feature bit {bit})"),
                None => format!("unknown incompatible feature bit {bit}"),
            },
        }
    }

    /// Checks that what belongs to a feature comes with it.
    fn check_companions(&self) -> Result<()> {
        let raw = self.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE);
        if raw && self.data_place() == DataPlace::Internal {
            let reason = "a raw external data file, in an image that has none";
            return Err(Error::invalid("autoclear_features", reason));
        }
        if self.crypt_method != CRYPT_LUKS && LuksArea::is_named_in(&self.extensions) {
            let reason = "only an image with LUKS encryption has one";
            return Err(Error::invalid(LuksArea::FIELD, reason));
        }
        Ok(())
    }
}

/// Checks that a table begins at a cluster and ends where a file can.
fn check_place(field: &'static str, start: HostOffset, len: u64, cluster_size: u64) -> Result<()> {
    if !start.is_aligned(cluster_size) {
        return Err(Error::invalid(field, format!("{start} is not cluster-aligned")));
    }
    match start.checked_add(len) {
        Some(end) if end.get() <= MAX_FILE_LEN => Ok(()),
        _ => Err(Error::invalid(field, format!("{start} is too large"))),
    }
}
