//! A cache of decompressed clusters: small reads of a compressed cluster decompress it once.

use std::num::NonZeroUsize;
use std::sync::{Arc, PoisonError};

use lru::LruCache;

use super::sync::{Mutex, MutexGuard};
use crate::error::{Doing, Result};
use crate::qcow2::{CompressedCluster, Compression, Geometry, decompress};
use crate::store::Store;

/// Bytes of decompressed clusters that an image keeps at most.
const CAPACITY_BYTES: u64 = 8 << 20;

/// The decompressed clusters of one image.
///
/// Compressed clusters are never overwritten while anything points to them, so that what is here stays true.
pub(super) struct Decompressed {
    compression: Compression,
    cluster_size: usize,
    kept: Mutex<Kept>,
}

struct Kept {
    clusters: LruCache<CompressedCluster, Arc<Vec<u8>>>,
    /// Grows when all is forgotten: what was read before must not be kept after.
    epoch: u64,
}

impl Decompressed {
    pub fn new(compression: Compression, geometry: Geometry) -> Self {
        let cluster_size = geometry.cluster_size();
        let count = NonZeroUsize::new((CAPACITY_BYTES / cluster_size) as usize);
        // Not allocated in advance: most members of most chains have no compressed clusters.
        let mut clusters = LruCache::unbounded();
        clusters.resize(count.unwrap_or(NonZeroUsize::MIN));
        Self {
            compression,
            cluster_size: cluster_size as usize,
            kept: Mutex::new(Kept { clusters, epoch: 0 }),
        }
    }

    /// Fills `out` with the bytes of `cluster` from `skip` on.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn read(
        &self,
        store: &dyn Store,
        cluster: CompressedCluster,
        skip: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let end = skip + out.len();
        if out.len() == self.cluster_size && !self.kept().clusters.contains(&cluster) {
            // Who reads all of it won't come back for a part.
            return self.unpack(store, cluster, out);
        }
        out.copy_from_slice(&self.get(store, cluster, end)?[skip..end]);
        Ok(())
    }

    /// Fills `out` with the first bytes of `cluster`, known or not.
    fn unpack(&self, store: &dyn Store, cluster: CompressedCluster, out: &mut [u8]) -> Result<()> {
        let mut compressed = vec![0; cluster.len as usize];
        store.read_at(&mut compressed, cluster.host).doing("read a compressed cluster")?;
        decompress(self.compression, &compressed, out)
    }

    /// At least the first `len` bytes of `cluster`, whose compressed form is in `store`.
    ///
    /// Somebody who reads here and there gets no more than that; who comes back for more gets it all.
    ///
    /// # Errors
    /// Failing reads; data that does not decompress.
    fn get(
        &self,
        store: &dyn Store,
        cluster: CompressedCluster,
        len: usize,
    ) -> Result<Arc<Vec<u8>>> {
        let (known, epoch) = {
            let mut kept = self.kept();
            (kept.clusters.get(&cluster).cloned(), kept.epoch)
        };
        let len = match known {
            Some(bytes) if bytes.len() >= len => return Ok(bytes),
            Some(_) => self.cluster_size,
            None => len.next_multiple_of(self.grain()).min(self.cluster_size),
        };
        // Not under the lock: other clusters are decompressed at the same time.
        let mut bytes = vec![0; len];
        self.unpack(store, cluster, &mut bytes)?;
        let bytes = Arc::new(bytes);
        let mut kept = self.kept();
        if kept.epoch == epoch {
            kept.clusters.put(cluster, bytes.clone());
        }
        Ok(bytes)
    }

    /// What is decompressed of a cluster is a multiple of this.
    fn grain(&self) -> usize {
        match self.compression {
            Compression::Zlib => 4096,
            // The largest block of a frame. A part of one costs as much as all of it.
            Compression::Zstd => 128 << 10,
        }
    }

    /// Forgets everything: somebody else may have written the file.
    pub fn forget(&self) {
        let mut kept = self.kept();
        kept.clusters.clear();
        kept.epoch += 1;
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
