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

impl Encryption {
    /// Whether bytes of the file that are zero are zeroes of the disk.
    pub fn keeps_zeroes(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Whether `len` bytes at `at` can be written without knowing what is around them.
    pub fn can_write_alone(&self, at: GuestOffset, len: u64) -> bool {
        self.keeps_zeroes() || (at.get() | len).is_multiple_of(SECTOR as u64)
    }
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
    let area = LuksArea::find(&header.extensions, header.geometry)?.ok_or_else(|| {
        Error::invalid(LuksArea::FIELD, "the image does not say where its keys are")
    })?;
    let file_len = store.len().doing("find out its length")?;
    if area.offset.get() + area.len > file_len {
        return Err(Error::invalid(LuksArea::FIELD, "the file ends inside the area"));
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
        let number = self.sector_number(guest, host);
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

    /// Writes the pieces one behind the other to `store` from `host` on: the bytes of the disk from `guest` on.
    ///
    /// Of sectors that they cover in part the rest stays: the caller keeps everybody else off these.
    pub(super) fn write(
        &self,
        store: &dyn Store,
        guest: GuestOffset,
        host: HostOffset,
        pieces: &[&[u8]],
    ) -> Result<()> {
        let len: usize = pieces.iter().map(|piece| piece.len()).sum();
        let start = host.align_down(SECTOR as u64);
        let skip = (host - start) as usize;
        let end = skip + len;
        let mut sectors = vec![0; end.next_multiple_of(SECTOR)];
        let first = guest.align_down(SECTOR as u64);
        if skip > 0 {
            self.read(store, first, start, &mut sectors[..SECTOR])?;
        }
        if !end.is_multiple_of(SECTOR) {
            let last = end / SECTOR * SECTOR;
            let (at, place) = (first + last as u64, start + last as u64);
            self.read(store, at, place, &mut sectors[last..])?;
        }
        let mut rest = &mut sectors[skip..end];
        for piece in pieces {
            let (now, later) = rest.split_at_mut(piece.len());
            now.copy_from_slice(piece);
            rest = later;
        }
        self.cipher.encrypt(self.sector_number(guest, host), &mut sectors);
        store.write_at(&[&sectors], start).doing("write its data")
    }

    /// The number of the sector in which both offsets are.
    fn sector_number(&self, guest: GuestOffset, host: HostOffset) -> u64 {
        match self.numbering {
            SectorNumbering::Guest => guest.get() / SECTOR as u64,
            SectorNumbering::Host => host.get() / SECTOR as u64,
        }
    }
}
