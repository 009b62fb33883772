//! From an encrypted image and a secret to the cipher that reads it.

use std::path::Path;

use super::open::OpenOptions;
use crate::error::{Error, Problem, Result};
use crate::image::{GuestCipher, SectorNumbering, read_luks_area};
use crate::qcow2::Header;
use crate::qcow2::encryption::{CRYPT_AES, CRYPT_NONE, LuksHeader, SectorCipher, VolumeKey};
use crate::store::Store;

/// The cipher of the image in `store`, member `index` of its chain; `None` if it is not encrypted, or only looked at.
///
/// # Errors
/// [`Problem::KeyMissing`], [`Problem::WrongKey`]; a broken LUKS header, or a cipher that is not supported.
pub(super) fn unlock(
    store: &dyn Store,
    header: &Header,
    index: usize,
    path: &Path,
    options: &OpenOptions,
) -> Result<Option<GuestCipher>> {
    if header.crypt_method == CRYPT_NONE || !options.depth.reads_data() {
        return Ok(None);
    }
    let source = options.secrets.find(index, path);
    let secret = source.ok_or_else(|| Error::new(Problem::KeyMissing))?.read()?;
    if header.crypt_method == CRYPT_AES {
        let cipher = SectorCipher::legacy_aes(&secret)?;
        return Ok(Some(GuestCipher { cipher, numbering: SectorNumbering::Guest }));
    }
    let bytes = read_luks_area(store, header)?;
    let luks = LuksHeader::parse(&bytes)?;
    let key = try_keys(&luks, &bytes, &secret)?;
    let cipher = SectorCipher::luks(&key)?;
    Ok(Some(GuestCipher { cipher, numbering: SectorNumbering::Host }))
}

/// The secret is the passphrase as it is, as for QEMU; a line of text from an editor is tried without its end, too.
fn try_keys(luks: &LuksHeader, area: &[u8], secret: &[u8]) -> Result<VolumeKey> {
    match (luks.unlock(area, secret), secret.strip_suffix(b"\n")) {
        (Err(error), Some(line)) if matches!(error.problem(), Problem::WrongKey) => {
            luks.unlock(area, line)
        }
        (unlocked, _) => unlocked,
    }
}
