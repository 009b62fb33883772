//! Handing the disk over to another image.

use super::Image;
use super::ranges::RangeGuard;
use super::sync::atomic::Ordering;
use crate::error::Result;

/// An image that holds still, all of it durable, to be retired. Dropped before that it takes writes again.
#[must_use]
pub struct Retirement<'a> {
    image: &'a Image,
    // Dropped in this order.
    _disk: RangeGuard<'a>,
    _shape: RangeGuard<'a>,
}

impl Image {
    /// Keeps everybody off the disk, with all that was written before durable: the point in time at which another image
    /// can be put on top.
    ///
    /// # Errors
    /// As [`Image::flush`]; an image that takes no writes.
    pub fn hold_still(&self) -> Result<Retirement<'_>> {
        // What can be written before anybody has to wait is.
        self.flush_all()?;
        // A snapshot that is being made, applied or deleted comes to its end first.
        let shape = self.keep_shape();
        let disk = self.claim_disk();
        self.check_open_for_writing()?;
        self.flush_all()?;
        Ok(Retirement { image: self, _disk: disk, _shape: shape })
    }
}

impl Retirement<'_> {
    /// From now on nobody writes to the image. Writers who wait get [`crate::error::Problem::Retired`].
    pub fn for_good(self) {
        self.image.retired.store(true, Ordering::Release);
    }
}
