//! Backing files must not change: what an overlay remembers of its own, held against what is there.

use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::{Chain, Member};
use crate::error::{At, Doing, Error, FileState, Problem, Result};
use crate::qcow2::{BaseRecord, DataPlace};
use crate::store::Store;
use crate::units::HostOffset;

/// Bytes that are hashed at a time.
const PIECE: usize = 1 << 20;

/// How closely a backing file is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closeness {
    /// Length and time of last change.
    Stamp,
    /// All its bytes, too.
    Content,
}

impl Chain {
    /// The overlays whose backing file is not as they remember it, as errors ([`Problem::BaseChanged`]). Lengths and times are
    /// compared, not content; overlays that remember nothing are not looked at.
    ///
    /// # Errors
    /// A file that can't be looked at.
    pub fn changed_bases(&self) -> Result<Vec<Error>> {
        let pairs = self.members.iter().zip(self.members.iter().skip(1));
        let mut changed = Vec::new();
        for (overlay, base) in pairs {
            let Some(recorded) = overlay.image().and_then(|image| image.base_record()) else {
                continue;
            };
            let found = stamp(base)?;
            if (BaseRecord { digest: None, ..recorded.clone() }) != found {
                changed.push(base_changed(overlay, base, &recorded, &found));
            }
        }
        Ok(changed)
    }

    /// The backing file of the top image as it is. `progress` is told how many bytes of how many are read.
    ///
    /// # Errors
    /// An image without a backing file; failing reads.
    pub fn look_at_base(
        &self,
        closeness: Closeness,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<BaseRecord> {
        let (_, base) = self.top_and_base()?;
        let mut record = stamp(base)?;
        if closeness == Closeness::Content {
            record.digest = Some(digest(base, record.len, progress)?);
        }
        Ok(record)
    }

    /// The top image as a new overlay may remember it; `None` for one whose data file is not open, and so not known.
    ///
    /// # Errors
    /// A file that can't be looked at.
    pub fn stamp_of_top(&self) -> Result<Option<BaseRecord>> {
        let Some(top) = self.members.first() else { return Ok(None) };
        match top.image().map(|image| image.header().data_place()) {
            Some(DataPlace::External) => Ok(None),
            Some(DataPlace::Internal) | None => stamp(top).map(Some),
        }
    }

    /// Lets the top image, open for writing, remember its backing file.
    ///
    /// # Errors
    /// As [`crate::image::Image::record_base`].
    pub fn record_base(&self, record: &BaseRecord) -> Result<()> {
        let (top, _) = self.top_and_base()?;
        let image = top.image().ok_or_else(|| Error::new(Problem::NotQcow2).at(top.path()))?;
        image.record_base(record).at(top.path())
    }

    /// As [`Chain::record_base`], and closes the image. Its own time of last change stays as it was, if it can: what its disk
    /// holds did not change, and overlays of it may remember that time.
    ///
    /// # Errors
    /// As [`Chain::record_base`] and [`Chain::close`].
    pub fn seal(&self, record: &BaseRecord) -> Result<()> {
        let (top, _) = self.top_and_base()?;
        let modified = top.store().modified().doing("look at it").at(top.path())?;
        self.record_base(record)?;
        self.close()?;
        let put_back = top.store().set_modified(modified);
        if let Err(error) = put_back.doing("put back its time of last change").at(top.path()) {
            log::warn!("{error}");
        }
        Ok(())
    }

    /// Compares what the top image remembers with what was `found`: the bytes if both are known, else length and time.
    ///
    /// # Errors
    /// [`Problem::BaseChanged`]; an image without a backing file.
    pub fn compare_base(&self, recorded: &BaseRecord, found: &BaseRecord) -> Result<()> {
        let (top, base) = self.top_and_base()?;
        let same = match (recorded.digest, found.digest) {
            // The bytes say more than the time.
            (Some(recorded), Some(found)) => recorded == found,
            _ => BaseRecord { digest: None, ..recorded.clone() } == *found,
        };
        if same {
            return Ok(());
        }
        Err(base_changed(top, base, recorded, found))
    }

    fn top_and_base(&self) -> Result<(&Member, &Member)> {
        match &self.members[..] {
            [top, base, ..] => Ok((top, base)),
            [top] => Err(Error::usage("it has no backing file").at(top.path())),
            [] => Err(Error::new(Problem::NotFound)),
        }
    }
}

fn base_changed(
    overlay: &Member,
    base: &Member,
    recorded: &BaseRecord,
    found: &BaseRecord,
) -> Error {
    let base = base.path().to_path_buf();
    let (recorded, found) = (state(recorded), state(found));
    Error::new(Problem::BaseChanged { base, recorded, found }).at(overlay.path())
}

fn state(record: &BaseRecord) -> FileState {
    let seconds = i128::from(record.modified_seconds);
    let modified = seconds * 1_000_000_000 + i128::from(record.modified_nanoseconds);
    FileState { len: record.len, modified }
}

/// Length and time of a member's files, without a digest.
pub(super) fn stamp(member: &Member) -> Result<BaseRecord> {
    let look = || -> std::io::Result<(u64, SystemTime)> {
        let (len, modified) = (member.store().len()?, member.store().modified()?);
        if member.data_path() == member.path() {
            return Ok((len, modified));
        }
        let data = std::fs::metadata(member.data_path())?;
        Ok((len.saturating_add(data.len()), modified.max(data.modified()?)))
    };
    let (len, modified) = look().doing("look at it").at(member.path())?;
    let nanoseconds = match modified.duration_since(UNIX_EPOCH) {
        Ok(after) => i128::try_from(after.as_nanos()),
        Err(before) => i128::try_from(before.duration().as_nanos()).map(|time| -time),
    };
    let nanoseconds = nanoseconds.unwrap_or_default();
    Ok(BaseRecord {
        len,
        modified_seconds: nanoseconds.div_euclid(1_000_000_000) as i64,
        modified_nanoseconds: nanoseconds.rem_euclid(1_000_000_000) as u32,
        digest: None,
    })
}

fn digest(member: &Member, total: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut done = 0;
    let mut add = |store: &dyn Store| -> Result<()> {
        let len = store.len().doing("find out its length")?;
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        while at < len {
            let now = (len - at).min(PIECE as u64);
            let bytes = &mut piece[..now as usize];
            store.read_at(bytes, HostOffset::new(at)).doing("read it")?;
            hash.update(bytes);
            at += now;
            done += now;
            progress(done, total);
        }
        Ok(())
    };
    add(member.store()).at(member.path())?;
    if member.data_path() != member.path() {
        add(member.data_store()).at(member.data_path())?;
    }
    Ok(hash.finalize().into())
}
