//! Random changes of images whose data is not simply clusters of the file: subclusters, data files, encryption.

use super::*;
use crate::image::{Companions, GuestCipher, SectorNumbering};
use crate::qcow2::encryption::SectorCipher;
use crate::qcow2::offsets;

/// Where an image keeps its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    Inside,
    File,
    RawFile,
}

/// Whether it is encrypted, and what numbers its sectors.
pub type Encrypted = Option<SectorNumbering>;

#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub cluster_bits: u32,
    pub l2_form: L2Form,
    pub data: Data,
    pub encrypted: Encrypted,
    pub backing_len: u64,
}

const fn kind(cluster_bits: u32, l2_form: L2Form, data: Data, encrypted: Encrypted) -> Kind {
    let backing_len = match data {
        Data::RawFile => 0,
        Data::Inside | Data::File => 300_000,
    };
    Kind { cluster_bits, l2_form, data, encrypted, backing_len }
}

const GUEST: Encrypted = Some(SectorNumbering::Guest);
const HOST: Encrypted = Some(SectorNumbering::Host);

pub const KINDS: [Kind; 12] = [
    kind(14, L2Form::Extended, Data::Inside, None),
    kind(16, L2Form::Extended, Data::Inside, None),
    kind(9, L2Form::Standard, Data::Inside, GUEST),
    kind(12, L2Form::Standard, Data::Inside, HOST),
    kind(14, L2Form::Extended, Data::Inside, HOST),
    kind(9, L2Form::Standard, Data::File, None),
    kind(12, L2Form::Standard, Data::File, None),
    kind(14, L2Form::Extended, Data::File, None),
    kind(12, L2Form::Standard, Data::RawFile, None),
    kind(14, L2Form::Extended, Data::RawFile, None),
    kind(12, L2Form::Standard, Data::File, HOST),
    kind(12, L2Form::Standard, Data::RawFile, HOST),
];

const SIZE: u64 = 700 << 10;

/// The files of an image.
struct Files {
    kind: Kind,
    image: Arc<MemoryStore>,
    data: Arc<MemoryStore>,
}

impl Kind {
    /// The image file of an empty disk of `size` bytes.
    pub fn create(self, size: u64) -> Vec<u8> {
        let store = MemoryStore::default();
        let options = CreateOptions {
            size,
            version: Version::V3,
            geometry: Geometry::new(self.cluster_bits, 4).with_l2_form(self.l2_form),
            backing: None,
        };
        NewImage::plan(&options).unwrap().write(&store).unwrap();
        let mut bytes = store.bytes();
        if self.data != Data::Inside {
            bytes[offsets::INCOMPATIBLE.get() as usize + 7] |= 1 << 2;
        }
        if self.data == Data::RawFile {
            bytes[offsets::AUTOCLEAR.get() as usize + 7] |= 1 << 1;
        }
        if self.encrypted.is_some() {
            // The method with no header of its own: which numbers its sectors have is up to the cipher given below.
            bytes[35] = 1;
        }
        bytes
    }

    pub fn open(
        self,
        image: Arc<dyn Store>,
        data: Arc<dyn Store>,
        writability: Writability,
    ) -> Image {
        let cipher = self.encrypted.map(|numbering| GuestCipher {
            cipher: SectorCipher::legacy_aes(b"key").unwrap(),
            numbering,
        });
        let companions = Companions { data_file: Some(data), cipher };
        Image::open_with(image, writability, companions).unwrap()
    }

    pub fn below(self) -> Box<dyn Below> {
        match self.backing_len {
            0 => Box::new(Nothing),
            len => Box::new(Pattern { len }),
        }
    }

    pub fn empty_disk(self, size: u64) -> Vec<u8> {
        let mut disk = vec![0; size as usize];
        self.below().read(GuestOffset::ZERO, &mut disk).unwrap();
        disk
    }
}

impl Files {
    fn create(kind: Kind) -> Self {
        let image = Arc::new(MemoryStore::new(kind.create(SIZE)));
        Self { kind, image, data: Arc::default() }
    }

    fn open(&self, writability: Writability) -> Image {
        self.kind.open(self.image.clone(), self.data.clone(), writability)
    }

    fn below(&self) -> Box<dyn Below> {
        self.kind.below()
    }

    fn assert_holds(&self, model: &[u8], context: &str) {
        assert_eq!(judge(&self.image.bytes()), Findings::default(), "{context}");
        let image = self.open(Writability::ReadOnly);
        assert_same(&read_all(&image, &*self.below()), model, context);
        if self.kind.data == Data::RawFile && self.kind.encrypted.is_none() {
            let mut raw = self.data.bytes();
            raw.resize(model.len(), 0);
            assert_same(&raw, model, &format!("{context}, the data file by itself"));
        }
    }
}

#[test]
fn random_changes_of_every_kind_of_image_read_back_and_leave_nothing_to_repair() {
    for kind in KINDS {
        for seed in 0..6 {
            let context = format!("seed {seed}, {kind:?}");
            let mut random = Random::new(seed);
            let files = Files::create(kind);
            let below = files.below();
            let mut model = kind.empty_disk(SIZE);
            for _ in 0..3 {
                let image = files.open(Writability::Writable);
                for _ in 0..60 {
                    let change = Change::random(&mut random, SIZE);
                    change.apply_to_image(&image, &*below).unwrap();
                    change.apply_to_model(&mut model);
                    assert_sound(&files.image, &context);
                }
                assert_same(&read_all(&image, &*below), &model, &context);
                image.flush_all().unwrap();
                drop(image);
                files.assert_holds(&model, &context);
            }
        }
    }
}

#[test]
fn snapshots_of_subclusters_and_of_encrypted_images_keep_what_they_saw() {
    for kind in KINDS.into_iter().filter(|kind| kind.data == Data::Inside) {
        for seed in 0..4 {
            let context = format!("seed {seed}, {kind:?}");
            let mut random = Random::new(seed);
            let files = Files::create(kind);
            let below = files.below();
            let mut model = kind.empty_disk(SIZE);
            let mut moments = Vec::new();
            let image = files.open(Writability::Writable);
            for round in 0..4 {
                for _ in 0..25 {
                    let change = Change::random(&mut random, SIZE);
                    change.apply_to_image(&image, &*below).unwrap();
                    change.apply_to_model(&mut model);
                    assert_sound(&files.image, &context);
                }
                image.create_snapshot(&format!("s{round}")).unwrap();
                assert_sound(&files.image, &context);
                moments.push(model.clone());
            }
            for _ in 0..40 {
                let change = Change::random(&mut random, SIZE);
                change.apply_to_image(&image, &*below).unwrap();
                change.apply_to_model(&mut model);
            }
            image.flush_all().unwrap();
            drop(image);
            files.assert_holds(&model, &context);
            let image = files.open(Writability::ReadOnly);
            for (tree, moment) in image.snapshots().iter().zip(&moments) {
                assert_same(&read_snapshot(&image, tree, &*below), moment, &context);
            }
            drop(image);
            let image = files.open(Writability::Writable);
            for (number, moment) in moments.iter().enumerate() {
                let id = (number + 1).to_string();
                image.apply_snapshot(&id).unwrap();
                assert_same(&read_all(&image, &*below), moment, &context);
                image.write(&*below, GuestOffset::new(700), &[9; 40_000]).unwrap();
                image.delete_snapshot(&id).unwrap();
                image.flush_all().unwrap();
                let mut written = moment.clone();
                written[700..40_700].fill(9);
                files.assert_holds(&written, &context);
            }
        }
    }
}

#[test]
fn a_small_write_over_a_backing_file_copies_its_subcluster_only() {
    let files = Files::create(kind(16, L2Form::Extended, Data::Inside, None));
    let image = files.open(Writability::Writable);
    image.write(&*files.below(), GuestOffset::new(5000), &[7; 10]).unwrap();
    let at = |offset: u64, len: u64| {
        image.map(Tree::Active, GuestRange::new(GuestOffset::new(offset), len)).unwrap()
    };
    assert!(at(0, 4096).content.is_unallocated());
    assert!(matches!(at(4096, 2048), super::super::Run { len: 2048, content: Content::Data(_) }));
    assert!(at(6144, 59_392).content.is_unallocated());
}

#[test]
fn zeroing_a_subcluster_needs_no_data_and_hides_what_is_below() {
    let files = Files::create(kind(16, L2Form::Extended, Data::Inside, None));
    let image = files.open(Writability::Writable);
    let len = files.image.bytes().len();
    let range = GuestRange::new(GuestOffset::new(2048), 4096);
    image.zero(&*files.below(), range, ZeroMode::Unmap).unwrap();
    image.flush_all().unwrap();
    // The L2 table is all that is new.
    assert_eq!(files.image.bytes().len(), len + (1 << 16));
    let run = image.map(Tree::Active, range).unwrap();
    assert_eq!(run.content, Content::Zero { kept: None });
}

#[test]
fn a_raw_data_file_that_grows_hides_what_it_had_behind_the_disk() {
    for kind in [
        kind(12, L2Form::Standard, Data::RawFile, None),
        kind(14, L2Form::Extended, Data::RawFile, None),
    ] {
        let files = Files::create(kind);
        files.data.write_at(&[&[9; 5000]], crate::units::HostOffset::new(SIZE + 100)).unwrap();
        let image = files.open(Writability::Writable);
        image.write(&Nothing, GuestOffset::new(SIZE - 3000), &[1; 3000]).unwrap();
        image.grow(&Nothing, SIZE + 100_864).unwrap();
        image.flush_all().unwrap();
        drop(image);
        let mut model = vec![0; SIZE as usize + 100_864];
        model[SIZE as usize - 3000..SIZE as usize].fill(1);
        files.assert_holds(&model, "after growing");
        assert_eq!(files.data.bytes().len() as u64, SIZE + 100_864);
    }
}

#[test]
fn the_bit_of_a_raw_data_file_stays_and_others_that_are_not_maintained_go() {
    let files = Files::create(kind(12, L2Form::Standard, Data::RawFile, None));
    let unknown = crate::units::HostOffset::new(offsets::AUTOCLEAR.get());
    files.image.write_at(&[&[0x80, 0, 0, 0, 0, 0, 0, 2]], unknown).unwrap();
    let image = files.open(Writability::Writable);
    image.write(&Nothing, GuestOffset::ZERO, &[1; 512]).unwrap();
    image.flush_all().unwrap();
    let at = offsets::AUTOCLEAR.get() as usize;
    assert_eq!(files.image.bytes()[at..at + 8], [0, 0, 0, 0, 0, 0, 0, 2]);
}

#[test]
fn clusters_in_another_order_than_their_data_file_are_not_written() {
    let files = Files::create(kind(12, L2Form::Standard, Data::File, None));
    let image = files.open(Writability::Writable);
    image.write(&Nothing, GuestOffset::ZERO, &[1; 8192]).unwrap();
    image.flush_all().unwrap();
    let l1 = image.header().l1_offset.get() as usize;
    drop(image);
    let bytes = files.image.bytes();
    let table = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & !(1 << 63);
    let swapped = [(1_u64 << 63) | 4096, 1 << 63].map(u64::to_be_bytes).concat();
    files.image.write_at(&[&swapped], crate::units::HostOffset::new(table)).unwrap();
    let image = files.open(Writability::Writable);
    let error = image.write(&Nothing, GuestOffset::new(100), &[2; 10]).unwrap_err();
    assert!(matches!(error.problem(), crate::error::Problem::ReadableOnly { .. }), "{error}");
    let mut byte = [0];
    image.read_active(&Nothing, GuestOffset::ZERO, &mut byte).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn parallel_writes_into_one_sector_of_an_encrypted_image_lose_nothing() {
    let files = Files::create(kind(12, L2Form::Standard, Data::Inside, HOST));
    let image = files.open(Writability::Writable);
    let below = files.below();
    image.write(&*below, GuestOffset::ZERO, &[0; 4096]).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let (image, below) = (&image, &*below);
            scope.spawn(move || {
                for at in (u64::from(thread) * 7..4090).step_by(28) {
                    image.write(below, GuestOffset::new(at), &[thread + 1; 7]).unwrap();
                }
            });
        }
    });
    let found = read_all(&image, &*below);
    for (index, byte) in found[..4088].iter().enumerate() {
        assert_eq!(*byte as usize, index / 7 % 4 + 1, "byte {index}");
    }
}

#[test]
fn a_raw_data_file_beside_a_backing_file_is_only_read() {
    let files = Files::create(kind(12, L2Form::Standard, Data::RawFile, None));
    let mut bytes = files.image.bytes();
    bytes[8..16].copy_from_slice(&1024_u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&4_u32.to_be_bytes());
    bytes[1024..1028].copy_from_slice(b"base");
    let store = Arc::new(MemoryStore::new(bytes));
    let error = Image::open(store.clone(), Writability::Writable).err().unwrap();
    assert!(matches!(error.problem(), crate::error::Problem::ReadableOnly { .. }), "{error}");
    assert!(Image::open(store, Writability::ReadOnly).is_ok());
}
