//! Guest data that is encrypted in the file.

use crate::error::{Doing, Error, Result};
use crate::qcow2::Header;
use crate::qcow2::encryption::{LuksArea, SECTOR, SectorCipher};
use crate::store::Store;
use crate::units::{GuestOffset, HostOffset};

/// Whether an image's data is encrypted.
pub(super) enum Encryption {
    /// It is not.
    None,
    /// It is, and the key is known.
    Unlocked(GuestCipher),
    /// It is, and nobody gave a key: it can't be read.
    Locked,
}

/// How an image's data is encrypted.
pub struct GuestCipher {
    /// The cipher with its key.
    pub cipher: SectorCipher,
    /// What makes the same bytes look different in each sector.
    pub numbering: SectorNumbering,
}

/// Which number of a sector goes into its encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SectorNumbering {
    /// That of its place in the disk (the old AES).
    Guest,
    /// That of its place in the file (LUKS).
    Host,
}

/// The LUKS header of the image in `store` with its key material.
///
/// # Errors
/// No such area, or one outside the file.
pub fn read_luks_area(store: &dyn Store, header: &Header) -> Result<Vec<u8>> {
    const FIELD: &str = "encryption header pointer";
    let area = LuksArea::find(&header.extensions, header.geometry)?
        .ok_or_else(|| Error::invalid(FIELD, "the image does not say where its keys are"))?;
    let file_len = store.len().doing("find out its length")?;
    if area.offset.get() + area.len > file_len {
        return Err(Error::invalid(FIELD, "the file ends inside the area"));
    }
    let mut bytes = vec![0; area.len as usize];
    store.read_at(&mut bytes, area.offset).doing("read its key slots")?;
    Ok(bytes)
}

impl GuestCipher {
    /// Fills `buf` with the bytes of the disk from `guest` on, which `store` has at `host`.
    pub(super) fn read(
        &self,
        store: &dyn Store,
        guest: GuestOffset,
        host: HostOffset,
        buf: &mut [u8],
    ) -> Result<()> {
        let start = host.align_down(SECTOR as u64);
        let skip = (host - start) as usize;
        let number = match self.numbering {
            SectorNumbering::Guest => guest.align_down(SECTOR as u64).get(),
            SectorNumbering::Host => start.get(),
        } / SECTOR as u64;
        if skip == 0 && buf.len().is_multiple_of(SECTOR) {
            store.read_at(buf, start).doing("read its data")?;
            self.cipher.decrypt(number, buf);
            return Ok(());
        }
        let mut sectors = vec![0; (skip + buf.len()).next_multiple_of(SECTOR)];
        store.read_at(&mut sectors, start).doing("read its data")?;
        self.cipher.decrypt(number, &mut sectors);
        buf.copy_from_slice(&sectors[skip..skip + buf.len()]);
        Ok(())
    }
}
