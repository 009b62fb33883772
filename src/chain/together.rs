//! Reading of many compressed clusters at a time, by as many threads as there are processors.

use std::sync::{Mutex, PoisonError};
use std::thread;

use super::{Chain, Extent};
use crate::error::{At, Result};
use crate::processors;

/// Less than this is decompressed sooner than another thread is there. What the kernel asks for at once is less, and the
/// session's threads share it anyway.
const WORTH_A_THREAD: u64 = 512 << 10;

/// A run of what is read, and where it goes.
pub struct Piece<'a> {
    /// The run.
    pub extent: Extent,
    /// As long as the run.
    pub bytes: &'a mut [u8],
}

impl Piece<'_> {
    /// Fills the bytes.
    ///
    /// # Errors
    /// Failing reads, and corruption.
    pub fn read(self, chain: &Chain) -> Result<()> {
        let Self { extent, bytes } = self;
        let member = &chain.members()[extent.member];
        member.read_content(extent.range.start, extent.content, bytes).at(member.path())
    }
}

/// Reads all `pieces`, with the help of other threads where decompressing them takes longer than starting these.
///
/// # Errors
/// As [`Piece::read`], the first that was met.
pub fn read_together(chain: &Chain, pieces: Vec<Piece<'_>>) -> Result<()> {
    let compressed = pieces.iter().filter(|piece| piece.extent.is_compressed());
    let bytes: u64 = compressed.map(|piece| piece.extent.range.len).sum();
    let helpers = usize::try_from(bytes / WORTH_A_THREAD)
        .map_or(0, |most| most.min(processors::usable() - 1));
    if helpers == 0 {
        return pieces.into_iter().try_for_each(|piece| piece.read(chain));
    }
    let left = Mutex::new(pieces.into_iter());
    // The lock is given back before the piece is read.
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(piece) = next() {
            piece.read(chain)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, work);
        // Where no thread can be had, there is one less.
        let helpers: Vec<_> = (0..helpers).map_while(|number| start(number).ok()).collect();
        let mut done = work();
        for helper in helpers {
            let helped = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            done = done.and(helped);
        }
        done
    })
}
