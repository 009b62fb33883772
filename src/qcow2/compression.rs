//! Compressed clusters (section "Compressed Clusters Descriptor").

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::{Error, Result};

/// Inflates raw deflate data to exactly `out.len()` bytes.
///
/// The stream ends somewhere in `compressed`; what follows it belongs to others.
///
/// # Errors
/// A broken stream, or one that ends before `out` is full, is corruption.
pub fn inflate(compressed: &[u8], out: &mut [u8]) -> Result<()> {
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
    use flate2::{Compress, Compression, FlushCompress};

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() + 64);
        let mut deflater = Compress::new(Compression::default(), false);
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
    fn a_stream_that_ends_too_early_is_corruption() {
        let compressed = deflate(&[1; 100]);
        assert!(inflate(&compressed, &mut [0; 4096]).is_err());
        assert!(inflate(&compressed[..3], &mut [0; 100]).is_err());
    }
}
