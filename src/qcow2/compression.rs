//! Compressed clusters (section "Compressed Clusters Descriptor").

use std::io::Read;

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::{Error, Result};

/// How the clusters of an image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// One or more zstd frames.
    Zstd,
}

/// Decompresses to exactly `out.len()` bytes.
///
/// The data ends somewhere in `compressed`; what follows it belongs to others.
///
/// # Errors
/// Broken data, or data that ends before `out` is full, is corruption.
pub fn decompress(compression: Compression, compressed: &[u8], out: &mut [u8]) -> Result<()> {
    match compression {
        Compression::Zlib => inflate(compressed, out),
        Compression::Zstd => decompress_zstd(compressed, out),
    }
}

fn decompress_zstd(compressed: &[u8], out: &mut [u8]) -> Result<()> {
    // A reader goes on with the next frame until `out` is full, and looks no further.
    zstd::stream::read::Decoder::with_buffer(compressed)
        .and_then(|mut decoder| decoder.read_exact(out))
        .map_err(|error| Error::corrupt(format!("compressed cluster: {error}")))
}

fn inflate(compressed: &[u8], out: &mut [u8]) -> Result<()> {
    let mut inflater = Decompress::new(false);
    loop {
        let (read, written) = (inflater.total_in() as usize, inflater.total_out() as usize);
        if written == out.len() {
            return Ok(());
        }
        let status = inflater
            .decompress(&compressed[read..], &mut out[written..], FlushDecompress::None)
            .map_err(|error| Error::corrupt(format!("compressed cluster: {error}")))?;
        let progress =
            inflater.total_in() as usize != read || inflater.total_out() as usize != written;
        if inflater.total_out() as usize == out.len() {
            return Ok(());
        }
        if status == Status::StreamEnd || !progress {
            return Err(Error::corrupt(format!(
                "compressed cluster: {} bytes instead of {}",
                inflater.total_out(),
                out.len()
            )));
        }
    }
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
    fn a_stream_that_ends_too_early_is_corruption() {
        let compressed = deflate(&[1; 100]);
        assert!(inflate(&compressed, &mut [0; 4096]).is_err());
        assert!(inflate(&compressed[..3], &mut [0; 100]).is_err());
    }
}
