//! What lies under the active layer.

use crate::error::Result;
use crate::units::{GuestOffset, GuestRange};

/// The view that shows through where the active layer has nothing: the backing chain.
///
/// It is handed to each write rather than kept, because the chain can change while it is open.
pub trait Below: Send + Sync {
    /// Fills `buf` with the bytes from `offset` on; behind the end of the view they are zero.
    ///
    /// # Errors
    /// Failing reads, and corruption.
    fn read(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()>;

    /// Whether all of `range` is known to read as zero without reading it.
    ///
    /// # Errors
    /// Failing reads of tables.
    fn is_zero(&self, range: GuestRange) -> Result<bool>;
}

/// No backing file.
pub struct Nothing;

impl Below for Nothing {
    fn read(&self, _offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn is_zero(&self, _range: GuestRange) -> Result<bool> {
        Ok(true)
    }
}
