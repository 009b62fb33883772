//! What the image remembers of its backing file.

use super::Image;
use crate::error::{Doing, Result};
use crate::qcow2::{BaseRecord, Extension};
use crate::units::HostOffset;

impl Image {
    /// What the image remembers of its backing file, if it does.
    pub fn base_record(&self) -> Option<BaseRecord> {
        self.metadata().header.base_record()
    }

    /// Remembers `record` from now on, durably. A power cut on the way leaves what was remembered before, or nothing.
    ///
    /// # Errors
    /// As [`BaseRecord::put_into`]; a failing write, which closes the image for writing.
    pub fn record_base(&self, record: &BaseRecord) -> Result<()> {
        let _shape = self.keep_shape();
        self.begin_change()?;
        let mut cluster = vec![0; self.geometry().cluster_size() as usize];
        self.store.read_at(&mut cluster, HostOffset::ZERO).doing("read its header")?;
        for (at, bytes) in record.put_into(&cluster)? {
            self.switch_header_field(at, bytes)?;
        }
        let header = &mut self.metadata().header;
        let data = record.to_data(header.backing_name.as_deref().unwrap_or_default());
        header.extensions.retain(|extension| !matches!(extension, Extension::BaseRecord(_)));
        header.extensions.push(Extension::BaseRecord(data));
        Ok(())
    }
}
