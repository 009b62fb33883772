//! New, empty images.

use super::table::Table;
use crate::error::{Doing, Error, Result};
use crate::qcow2::{
    AutoclearFeatures, BaseRecord, CompatibleFeatures, Extension, Geometry, Header,
    IncompatibleFeatures, L2Form, MAX_L1_BYTES, Version, refcount,
};
use crate::store::Store;
use crate::units::HostOffset;

/// What a new image is to be like.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to 512.
    pub size: u64,
    /// Version of the format.
    pub version: Version,
    /// Cluster size and refcount width; version 2 has 16-bit refcounts only.
    pub geometry: Geometry,
    /// The backing file, if it is to have one.
    pub backing: Option<NewBacking>,
}

/// What a new image is to say of its backing file.
#[derive(Debug, Clone)]
pub struct NewBacking {
    /// Its name as the header shall hold it.
    pub name: Vec<u8>,
    /// Its format.
    pub format: String,
    /// How it is now, to be remembered.
    pub record: Option<BaseRecord>,
}

/// A new image, ready to be written.
pub struct NewImage {
    geometry: Geometry,
    /// Clusters in all.
    clusters: u64,
    table_clusters: u64,
    blocks: u64,
    /// The first cluster's bytes.
    header: Vec<u8>,
}

impl NewImage {
    /// Works out an empty image.
    ///
    /// # Errors
    /// Options that the format does not allow.
    pub fn plan(options: &CreateOptions) -> Result<Self> {
        let geometry = options.geometry;
        let cluster_size = geometry.cluster_size();
        if options.version == Version::V2 && geometry.refcount_order() != 4 {
            return Err(Error::usage("version 2 images have 16-bit refcounts"));
        }
        if geometry.l2_form() == L2Form::Extended && options.version == Version::V2 {
            return Err(Error::usage("version 2 images have no extended L2 entries"));
        }
        let size = options.size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
        let l1_entries = geometry.l1_entries(size).max(1);
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(Error::usage(format!(
                "{size} bytes are more than clusters of {cluster_size} bytes can map"
            )));
        }

        // Header, refcount table, refcount blocks, L1 table, one behind the other.
        let l1_clusters = geometry.clusters(l1_entries * 8);
        let (mut table_clusters, mut blocks) = (1, 1);
        let clusters = loop {
            let clusters = 1 + table_clusters + blocks + l1_clusters;
            let needed_blocks = clusters.div_ceil(geometry.refcounts_per_block());
            let needed_table = geometry.clusters(needed_blocks * 8);
            if needed_blocks <= blocks && needed_table <= table_clusters {
                break clusters;
            }
            (table_clusters, blocks) =
                (needed_table.max(table_clusters), needed_blocks.max(blocks));
        };
        let place = |cluster: u64| HostOffset::new(cluster * cluster_size);
        let header = Header {
            version: options.version,
            geometry,
            size,
            backing_name: options.backing.as_ref().map(|backing| backing.name.clone()),
            crypt_method: 0,
            l1_entries: l1_entries as u32,
            l1_offset: place(1 + table_clusters + blocks),
            reftable_offset: place(1),
            reftable_clusters: table_clusters as u32,
            snapshot_count: 0,
            snapshots_offset: HostOffset::ZERO,
            incompatible: match geometry.l2_form() {
                L2Form::Standard => IncompatibleFeatures::empty(),
                L2Form::Extended => IncompatibleFeatures::EXTENDED_L2,
            },
            compatible: CompatibleFeatures::empty(),
            autoclear: AutoclearFeatures::empty(),
            compression_type: 0,
            extensions: extensions(options),
        };
        let header = header.to_cluster()?;
        Ok(Self { geometry, clusters, table_clusters, blocks, header })
    }

    /// Writes the image to `store`, which must be empty, and makes it durable.
    ///
    /// # Errors
    /// Failing writes; what is there then is no image yet.
    pub fn write(&self, store: &dyn Store) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let per_block = self.geometry.refcounts_per_block();
        let place = |cluster: u64| HostOffset::new(cluster * cluster_size);
        store.set_len(self.clusters * cluster_size).doing("make it long enough")?;
        let entries = vec![0; (self.table_clusters * cluster_size / 8) as usize];
        let mut table = Table::new(place(1), entries);
        for block in 0..self.blocks {
            let mut bytes = vec![0; cluster_size as usize];
            for index in 0..self.clusters.saturating_sub(block * per_block).min(per_block) {
                refcount::set(&mut bytes, index as usize, self.geometry.refcount_order(), 1);
            }
            let at = place(1 + self.table_clusters + block);
            store.write_at(&[&bytes], at).doing("write its refcounts")?;
            table.set(block as usize, at.get());
        }
        for (at, bytes) in table.capture() {
            store.write_at(&[&bytes], at).doing("write its refcount table")?;
        }
        // The header comes last: until then this is no image.
        store.sync().doing("make it durable")?;
        store.write_at(&[&self.header], HostOffset::ZERO).doing("write its header")?;
        store.sync().doing("make it durable")
    }
}

fn extensions(options: &CreateOptions) -> Vec<Extension> {
    let mut extensions = Vec::new();
    if let Some(backing) = &options.backing {
        extensions.push(Extension::BackingFormat(backing.format.clone()));
    }
    // In the smallest clusters all of this would leave no room for the name of the backing file.
    if options.geometry.cluster_size() <= 4096 {
        return extensions;
    }
    if options.version == Version::V3 {
        extensions.push(Extension::feature_names());
    }
    extensions.extend(options.backing.as_ref().and_then(|backing| {
        let record = backing.record.as_ref()?;
        Some(Extension::BaseRecord(record.to_data(&backing.name)))
    }));
    extensions
}
