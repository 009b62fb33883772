//! A store for fuzzing.

use std::io;
use std::ops::Range;
use std::sync::Mutex;

use qchainfs::store::Store;
use qchainfs::units::HostOffset;

/// No image may make us write more than that.
const MAX_LEN: u64 = 16 << 20;

/// An image file in memory.
pub struct Bytes(Mutex<Vec<u8>>);

impl Bytes {
    pub fn new(bytes: &[u8]) -> Self {
        Self(Mutex::new(bytes.to_vec()))
    }
}

impl Store for Bytes {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("no panic before").len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        let bytes = self.0.lock().expect("no panic before");
        let start = (offset.get() as usize).min(bytes.len());
        let len = buf.len().min(bytes.len() - start);
        buf[..len].copy_from_slice(&bytes[start..start + len]);
        buf[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        let data = pieces.concat();
        let end = offset.get().saturating_add(data.len() as u64);
        if end > MAX_LEN {
            return Err(io::ErrorKind::StorageFull.into());
        }
        assert!(offset.get() >= 16, "the magic and the version are never written");
        let mut bytes = self.0.lock().expect("no panic before");
        if bytes.len() < end as usize {
            bytes.resize(end as usize, 0);
        }
        bytes[offset.get() as usize..end as usize].copy_from_slice(&data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > MAX_LEN {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.lock().expect("no panic before").resize(len as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().expect("no panic before");
        let start = (offset.get() as usize).min(bytes.len());
        let end = start.saturating_add(len as usize).min(bytes.len());
        bytes[start..end].fill(0);
        Ok(())
    }

    fn reserve(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        match offset.get().checked_add(len) {
            Some(end) if end <= MAX_LEN => Ok(()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((from.get() < len).then(|| from.get()..len))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }
}
