//! Handing the disk over to another image.

use super::Image;
use super::ranges::RangeGuard;
use super::sync::atomic::Ordering;
use crate::error::Result;

/// How often an image is flushed before everybody is kept off.
const FLUSHES_BEFORE: u32 = 4;

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
        // What can be made durable before anybody has to wait is. Each time there is less of what others wrote meanwhile,
        // but there is always some.
        for _ in 0..FLUSHES_BEFORE {
            self.flush()?;
        }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::{Arc, OnceLock};

    use super::*;
    use crate::image::{Companions, CreateOptions, NewImage, Nothing, Writability};
    use crate::qcow2::{Geometry, Version};
    use crate::store::fault::{FaultStore, Operation};
    use crate::store::memory::MemoryStore;
    use crate::units::GuestOffset;

    #[test]
    fn writers_who_never_pause_do_not_keep_an_image_from_holding_still() {
        let store = MemoryStore::default();
        let (version, geometry) = (Version::V3, Geometry::new(12, 4));
        let options = CreateOptions { size: 1 << 20, version, geometry, backing: None };
        NewImage::plan(&options).unwrap().write(&store).unwrap();
        let writes = Arc::new(AtomicUsize::new(0));
        let written = Arc::new(OnceLock::<Arc<Image>>::new());
        let (count, image) = (writes.clone(), written.clone());
        // Whenever something is made durable there is something new to write, as long as nobody holds the disk.
        let observer = move |_: &FaultStore, operation| {
            let Some(image) = image.get().filter(|image| image.range_requests() == 0) else {
                return;
            };
            if operation == Operation::Sync && count.fetch_add(1, Ordering::AcqRel) < 100 {
                image.write(&Nothing, GuestOffset::ZERO, &[2; 512]).unwrap();
            }
        };
        let store = Arc::new(FaultStore::observed(store.bytes(), Box::new(observer)));
        let image = Image::open_with(store, Writability::Writable, Companions::default());
        let image = Arc::new(image.unwrap());
        image.write(&Nothing, GuestOffset::ZERO, &[1; 512]).unwrap();
        image.flush_all().unwrap();
        image.write(&Nothing, GuestOffset::ZERO, &[1; 512]).unwrap();
        assert!(written.set(image.clone()).is_ok());
        image.hold_still().unwrap().for_good();
        assert!(writes.load(Ordering::Acquire) < 10, "it waited for writers who go on");
    }
}
