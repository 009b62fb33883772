//! Addresses of views: `IMAGE`, `IMAGE@SNAPSHOT`, `IMAGE@#ID`, `IMAGE[N]`, `IMAGE[N]@SNAPSHOT`, `IMAGE[member.qcow2]`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Chain, Member, View};
use crate::error::{Error, Problem, Result};
use crate::image::SnapshotTree;

/// An address, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The top image of the chain.
    pub image: PathBuf,
    /// The member of the chain.
    pub member: MemberChoice,
    /// The snapshot of that member, or its present state.
    pub snapshot: Option<SnapshotChoice>,
}

/// Which member of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberChoice {
    /// By index; 0 is the active layer.
    Index(usize),
    /// By file name or path.
    Name(OsString),
}

/// Which snapshot of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotChoice {
    /// By name, or by id if no snapshot has that name.
    Name(String),
    /// By id.
    Id(String),
}

impl Address {
    /// Takes an address apart. A text that names a file is that file, whatever characters it has.
    pub fn parse(text: &OsStr) -> Self {
        Self::parse_with(text, |path| path.exists())
    }

    fn parse_with(text: &OsStr, exists: impl Fn(&Path) -> bool) -> Self {
        if exists(Path::new(text)) {
            return Self::of_member(text, None);
        }
        let bytes = text.as_bytes();
        let splits = bytes.iter().enumerate().filter(|&(_, &byte)| byte == b'@');
        let mut splits = splits.map(|(at, _)| (&bytes[..at], &bytes[at + 1..])).peekable();
        let first = splits.peek().copied();
        // A snapshot's name may hold any character, and so may the path: the file that is there decides.
        let split = splits
            .find(|(left, _)| {
                exists(Path::new(OsStr::from_bytes(left)))
                    || exists(&Self::of_member(OsStr::from_bytes(left), None).image)
            })
            .or(first);
        match split {
            None => Self::of_member(text, None),
            Some((left, right)) => {
                let right = String::from_utf8_lossy(right).into_owned();
                let snapshot = SnapshotChoice::parse(&right);
                let left = OsStr::from_bytes(left);
                if exists(Path::new(left)) {
                    let member = MemberChoice::Index(0);
                    return Self { image: left.into(), member, snapshot: Some(snapshot) };
                }
                Self::of_member(left, Some(snapshot))
            }
        }
    }

    fn of_member(text: &OsStr, snapshot: Option<SnapshotChoice>) -> Self {
        let plain =
            Self { image: text.into(), member: MemberChoice::Index(0), snapshot: snapshot.clone() };
        if Path::new(text).exists() {
            return plain;
        }
        let Some(inner) = text.as_bytes().strip_suffix(b"]") else { return plain };
        let Some(open) = inner.iter().rposition(|&byte| byte == b'[') else { return plain };
        let (image, member) = (&inner[..open], &inner[open + 1..]);
        let member = match std::str::from_utf8(member).ok().and_then(|text| text.parse().ok()) {
            Some(index) => MemberChoice::Index(index),
            None => MemberChoice::Name(OsString::from_vec(member.to_vec())),
        };
        Self { image: OsStr::from_bytes(image).into(), member, snapshot }
    }

    /// The view that the address means in `chain`, which was opened from [`Address::image`].
    ///
    /// # Errors
    /// [`Problem::NoSuchMember`], [`Problem::NoSuchSnapshot`].
    pub fn find(&self, chain: &Arc<Chain>) -> Result<View> {
        let index = match &self.member {
            MemberChoice::Index(index) => *index,
            MemberChoice::Name(name) => {
                let members = chain.members();
                members.iter().position(|member| is_named(member, name)).ok_or_else(|| {
                    Error::new(Problem::NoSuchMember {
                        wanted: name.display().to_string(),
                        count: members.len(),
                    })
                    .at(&self.image)
                })?
            }
        };
        let view = chain.view(index)?;
        let Some(choice) = &self.snapshot else { return Ok(view) };
        let member = &chain.members()[index];
        let snapshots = member.image().map(|image| image.snapshots()).unwrap_or_default();
        match choice.find(&snapshots) {
            Some(snapshot) => chain.snapshot_view(index, snapshot),
            None => Err(choice.not_found(&snapshots).at(member.path())),
        }
    }
}

impl SnapshotChoice {
    /// The choice that `NAME` or `#ID` means.
    pub fn parse(text: &str) -> Self {
        match text.strip_prefix('#') {
            Some(id) => Self::Id(id.to_owned()),
            None => Self::Name(text.to_owned()),
        }
    }

    /// The one of `snapshots` that is meant, for who is going to change something. A name means no id: a script that deletes
    /// what is gone already must not hit another one.
    ///
    /// # Errors
    /// [`Problem::NoSuchSnapshot`]; [`Problem::AmbiguousSnapshot`], where a reader would get the first, and where the name of
    /// one snapshot looks like the id of another.
    pub fn only(&self, snapshots: &[Arc<SnapshotTree>]) -> Result<Arc<SnapshotTree>> {
        let text = self.to_string();
        let is_meant = |tree: &&Arc<SnapshotTree>| {
            let entry = tree.entry();
            entry.name == text || matches!(self, Self::Id(id) if entry.id == *id)
        };
        let found: Vec<_> = snapshots.iter().filter(is_meant).collect();
        match found[..] {
            [one] => Ok(one.clone()),
            [] => Err(self.not_found(snapshots)),
            _ => {
                let ids = found.iter().map(|tree| tree.entry().id.clone()).collect();
                Err(Error::new(Problem::AmbiguousSnapshot { wanted: text, ids }))
            }
        }
    }

    fn not_found(&self, snapshots: &[Arc<SnapshotTree>]) -> Error {
        Error::new(Problem::NoSuchSnapshot {
            wanted: self.to_string(),
            present: snapshots.iter().map(|tree| tree.entry().name.clone()).collect(),
        })
    }

    /// What chooses `wanted` among `snapshots`: its name where that says which it is, else its id.
    pub fn of(wanted: &SnapshotTree, snapshots: &[Arc<SnapshotTree>]) -> Self {
        let (id, name) = (&wanted.entry().id, &wanted.entry().name);
        let alike = snapshots.iter().filter(|tree| tree.entry().name == *name).count();
        if alike > 1 || name.is_empty() || name.starts_with('#') {
            Self::Id(id.clone())
        } else {
            Self::Name(name.clone())
        }
    }

    fn find(&self, snapshots: &[Arc<SnapshotTree>]) -> Option<Arc<SnapshotTree>> {
        let by_id = |id: &str| snapshots.iter().find(|tree| tree.entry().id == id);
        let found = match self {
            Self::Id(id) => by_id(id),
            Self::Name(name) => {
                snapshots.iter().find(|tree| tree.entry().name == *name).or_else(|| by_id(name))
            }
        };
        found.cloned()
    }
}

impl std::fmt::Display for SnapshotChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name}"),
            Self::Id(id) => write!(f, "#{id}"),
        }
    }
}

fn is_named(member: &Member, name: &OsStr) -> bool {
    member.path() == Path::new(name) || member.path().file_name() == Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, files: &[&str]) -> Address {
        Address::parse_with(OsStr::new(text), |path| {
            files.iter().any(|file| path == Path::new(file))
        })
    }

    fn name(text: &str) -> Option<SnapshotChoice> {
        Some(SnapshotChoice::Name(text.into()))
    }

    #[test]
    fn every_form_of_the_grammar_is_understood() {
        let files = ["w.qcow2"];
        let plain = parse("w.qcow2", &files);
        assert_eq!((plain.member, plain.snapshot), (MemberChoice::Index(0), None));
        let snapshot = parse("w.qcow2@one", &files);
        assert_eq!((snapshot.image, snapshot.snapshot), ("w.qcow2".into(), name("one")));
        let id = parse("w.qcow2@#7", &files);
        assert_eq!(id.snapshot, Some(SnapshotChoice::Id("7".into())));
        let member = parse("w.qcow2[2]@one", &files);
        assert_eq!((member.member, member.snapshot), (MemberChoice::Index(2), name("one")));
        let by_name = parse("w.qcow2[base.qcow2]", &files);
        assert_eq!(by_name.member, MemberChoice::Name("base.qcow2".into()));
    }

    #[test]
    fn a_file_whose_name_looks_like_an_address_is_that_file() {
        let odd = parse("a@b", &["a@b"]);
        assert_eq!((odd.image, odd.snapshot), ("a@b".into(), None));
        let snapshot = parse("a@b@c@d", &["a@b"]);
        assert_eq!((snapshot.image, snapshot.snapshot), ("a@b".into(), name("c@d")));
    }
}
