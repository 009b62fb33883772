//! An image file in memory, for tests.

use std::io;
use std::ops::Range;
use std::sync::Mutex;

use super::Store;
use crate::units::HostOffset;

/// Bytes in memory that behave like a file without holes.
#[derive(Default)]
pub struct MemoryStore {
    bytes: Mutex<Vec<u8>>,
}

impl MemoryStore {
    /// A store that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes) }
    }

    /// A copy of the content.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().expect("no test panics with the lock held").clone()
    }

    /// The content.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_inner().expect("no test panics with the lock held")
    }

    fn with<T>(&self, f: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        f(&mut self.bytes.lock().expect("no test panics with the lock held"))
    }
}

impl Store for MemoryStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|bytes| bytes.len() as u64))
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        self.with(|bytes| {
            let start = (offset.get() as usize).min(bytes.len());
            let n = buf.len().min(bytes.len() - start);
            buf[..n].copy_from_slice(&bytes[start..start + n]);
            buf[n..].fill(0);
        });
        Ok(())
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        self.with(|bytes| {
            let mut at = offset.get() as usize;
            for piece in pieces {
                let end = at + piece.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[at..end].copy_from_slice(piece);
                at = end;
            }
        });
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|bytes| bytes.resize(len as usize, 0));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        self.with(|bytes| {
            let start = (offset.get() as usize).min(bytes.len());
            let end = start.saturating_add(len as usize).min(bytes.len());
            bytes[start..end].fill(0);
        });
        Ok(())
    }

    fn reserve(&self, _offset: HostOffset, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((from.get() < len).then(|| from.get()..len))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }
}
