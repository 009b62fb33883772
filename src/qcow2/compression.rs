//! Compressed clusters (section "Compressed Clusters Descriptor").

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, Operation as _};

use crate::error::{Error, Result};

/// How the clusters of an image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// One or more zstd frames.
    Zstd,
}

/// Fills `out` with the first bytes of what was compressed.
///
/// The data ends somewhere in `compressed`; what follows it belongs to others.
///
/// # Errors
/// Broken data, or data that ends before `out` is full.
pub fn decompress(compression: Compression, compressed: &[u8], out: &mut [u8]) -> Result<()> {
    match compression {
        Compression::Zlib => inflate(compressed, out),
        Compression::Zstd => decompress_zstd(compressed, out),
    }
}

// Making a decompressor costs about as much as decompressing a few KiB: each thread keeps its own.
thread_local! {
    static INFLATER: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static ZSTD: RefCell<Option<Decoder<'static>>> = const { RefCell::new(None) };
}

fn decompress_zstd(compressed: &[u8], out: &mut [u8]) -> Result<()> {
    let broken = |error: std::io::Error| Error::broken_data(format!("compressed cluster: {error}"));
    ZSTD.with_borrow_mut(|slot| {
        let decoder = match slot {
            Some(decoder) => decoder,
            None => slot.insert(Decoder::new().map_err(broken)?),
        };
        decoder.reinit().map_err(broken)?;
        let (mut read, mut written) = (0, 0);
        // There may be several frames: the decoder goes on with the next one.
        while written < out.len() {
            let status =
                decoder.run_on_buffers(&compressed[read..], &mut out[written..]).map_err(broken)?;
            if status.bytes_read == 0 && status.bytes_written == 0 {
                return Err(too_short(written, out.len()));
            }
            read += status.bytes_read;
            written += status.bytes_written;
        }
        Ok(())
    })
}

fn inflate(compressed: &[u8], out: &mut [u8]) -> Result<()> {
    INFLATER.with_borrow_mut(|inflater| {
        inflater.reset(false);
        loop {
            let (read, written) = (inflater.total_in() as usize, inflater.total_out() as usize);
            if written == out.len() {
                return Ok(());
            }
            let status = inflater
                .decompress(&compressed[read..], &mut out[written..], FlushDecompress::None)
                .map_err(|error| Error::broken_data(format!("compressed cluster: {error}")))?;
            let now = inflater.total_out() as usize;
            if now == out.len() {
                return Ok(());
            }
            if status == Status::StreamEnd || now == written && inflater.total_in() as usize == read
            {
                return Err(too_short(now, out.len()));
            }
        }
    })
}

fn too_short(found: usize, wanted: usize) -> Error {
    Error::broken_data(format!("compressed cluster: {found} bytes instead of {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, FlushCompress};

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() + 64);
        let mut deflater = Compress::new(flate2::Compression::default(), false);
        deflater.compress_vec(bytes, &mut out, FlushCompress::Finish).unwrap();
        out
    }

    #[test]
    fn bytes_behind_the_stream_are_ignored() {
        let bytes: Vec<u8> = (0..4096_u32).map(|i| (i / 7) as u8).collect();
        let mut compressed = deflate(&bytes);
        compressed.extend([0xaa; 300]);
        let mut out = vec![0; bytes.len()];
        inflate(&compressed, &mut out).unwrap();
        assert_eq!(out, bytes);
    }

    #[test]
    fn several_frames_make_one_cluster_and_garbage_behind_them_is_ignored() {
        let bytes: Vec<u8> = (0..65536_u32).map(|i| (i / 9) as u8).collect();
        let mut compressed = zstd::encode_all(&bytes[..1000], 1).unwrap();
        compressed.extend(zstd::encode_all(&bytes[1000..], 1).unwrap());
        compressed.extend([0xaa; 100]);
        let mut out = vec![0; bytes.len()];
        decompress(Compression::Zstd, &compressed, &mut out).unwrap();
        assert_eq!(out, bytes);
        assert!(decompress(Compression::Zstd, &compressed[..40], &mut out).is_err());
    }

    #[test]
    fn the_beginning_can_be_had_without_the_rest() {
        let bytes: Vec<u8> = (0..65536_u32).map(|i| (i / 5 % 253) as u8).collect();
        let deflated = deflate(&bytes);
        let zstd = zstd::encode_all(&bytes[..], 1).unwrap();
        for (compression, data) in [(Compression::Zlib, &deflated), (Compression::Zstd, &zstd)] {
            for len in [1, 4096, 65535, 65536] {
                let mut out = vec![0; len];
                decompress(compression, data, &mut out).unwrap();
                assert!(out == bytes[..len], "{compression:?}, {len}");
            }
        }
    }

    #[test]
    fn a_stream_that_ends_too_early_is_corruption() {
        let compressed = deflate(&[1; 100]);
        assert!(inflate(&compressed, &mut [0; 4096]).is_err());
        assert!(inflate(&compressed[..3], &mut [0; 100]).is_err());
    }
}
