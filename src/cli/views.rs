//! From addresses to views: opens each chain once, by what headers name or as `--chain` says.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use super::mount_options::{Options, Unknown};
use crate::chain::{Address, Chain, Depth, Layer, OpenOptions, Sharing, View};
use crate::error::{Error, Result};
use crate::store::FileId;

/// The option `--chain`
#[derive(clap::Args)]
pub struct ChainArgument {
    /// A chain of these files, the base first, whatever backing files their headers name: full and
    /// incremental backups. Read-only. The ADDRESS then is TOP or begins with it (TOP[N],
    /// TOP@SNAPSHOT), and TOP is meant where there is none. Each file is qcow2 if it begins as one,
    /// else raw; raw:FILE and qcow2:FILE force it. A comma in a name is written twice
    #[arg(id = "chain", long = "chain", value_name = "BASE,…,TOP")]
    list: Option<OsString>,
}

impl ChainArgument {
    /// The files of the chain, if the option was given.
    pub fn layers(&self) -> Result<Option<Vec<Layer>>> {
        let Some(list) = &self.list else { return Ok(None) };
        let words = split(list.as_bytes());
        if words.iter().any(Vec::is_empty) {
            return Err(Error::usage("--chain takes names of files, separated by commas"));
        }
        let layers = words.into_iter().map(|word| Layer::parse(&OsString::from_vec(word)));
        Ok(Some(layers.collect()))
    }
}

/// The words between single commas; two commas are one inside a word.
fn split(list: &[u8]) -> Vec<Vec<u8>> {
    let mut words = vec![Vec::new()];
    let mut bytes = list.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            words.push(Vec::new());
        } else if let Some(word) = words.last_mut() {
            word.push(byte);
        }
    }
    words
}

/// Where a verb that only looks finds its views, and how it opens them.
#[derive(clap::Args)]
pub struct Source {
    /// Look even if another process is writing
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Options as for mount, of which backing_policy and secret count
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    #[command(flatten)]
    chain: ChainArgument,
}

impl Source {
    /// Opens the chain that `--chain` names, if it does; others follow as addresses need them.
    pub fn open(&self, depth: Depth) -> Result<Views> {
        let words = self.options.iter().map(String::as_str);
        let words = Options::parse(words, Unknown::Refuse)?;
        let options = OpenOptions {
            policy: words.policy,
            secrets: words.secrets,
            sharing: if self.force_share { Sharing::Forced } else { Sharing::Locked },
            depth,
            ..OpenOptions::default()
        };
        Views::new(options, &self.chain)
    }
}

/// Opens views for a verb.
pub struct Views {
    options: OpenOptions,
    composed: Option<Arc<Chain>>,
    open: Vec<(FileId, Arc<Chain>)>,
}

impl Views {
    /// Opens the chain that `--chain` names, if it does.
    fn new(options: OpenOptions, chain: &ChainArgument) -> Result<Self> {
        let composed = match chain.layers()? {
            Some(layers) => Some(Arc::new(Chain::compose(&layers, &options)?)),
            None => None,
        };
        Ok(Self { options, composed, open: Vec::new() })
    }

    /// The view that a verb's only address means; without one, the top of the chain that `--chain` names.
    pub fn only(&mut self, address: Option<&OsStr>) -> Result<View> {
        let view = match (&self.composed, address) {
            (Some(chain), None) => return chain.view(0),
            (_, Some(address)) => self.find(address)?,
            (None, None) => return Err(Error::usage("an address is missing")),
        };
        self.check_used(&[&view])?;
        Ok(view)
    }

    /// The views that both addresses mean.
    pub fn both(&mut self, first: &OsStr, second: &OsStr) -> Result<[View; 2]> {
        let views = [self.find(first)?, self.find(second)?];
        self.check_used(&[&views[0], &views[1]])?;
        Ok(views)
    }

    fn find(&mut self, address: &OsStr) -> Result<View> {
        let address = Address::parse(address);
        let chain = match &self.composed {
            Some(chain) if is_top(chain, &address.image) => chain.clone(),
            _ => self.chain_of(&address.image)?,
        };
        address.find(&chain)
    }

    /// The chain of `image` by what headers name.
    fn chain_of(&mut self, image: &Path) -> Result<Arc<Chain>> {
        let id = file_id(image);
        if let Some((_, chain)) = self.open.iter().find(|(known, _)| Some(*known) == id) {
            return Ok(chain.clone());
        }
        let chain = Arc::new(Chain::open(image, &self.options)?);
        self.open.extend(id.map(|id| (id, chain.clone())));
        Ok(chain)
    }

    /// A chain that no address is about is a mistake.
    fn check_used(&self, views: &[&View]) -> Result<()> {
        match &self.composed {
            Some(chain) if !views.iter().any(|view| Arc::ptr_eq(view.chain(), chain)) => {
                Err(not_the_top(chain))
            }
            _ => Ok(()),
        }
    }
}

/// The error for an address that names another image than the top of `chain`.
pub fn not_the_top(chain: &Chain) -> Error {
    let top = chain.members().first().map(|member| member.path().display().to_string());
    Error::usage(format!(
        "with --chain an address begins with the file on top, {}",
        top.unwrap_or_default()
    ))
}

/// Whether `image` is the file on top of `chain`.
pub fn is_top(chain: &Chain, image: &Path) -> bool {
    chain.members().first().is_some_and(|top| Some(top.store().id()) == file_id(image))
}

fn file_id(path: &Path) -> Option<FileId> {
    let metadata = fs::metadata(path).ok()?;
    Some(FileId { device: metadata.dev(), inode: metadata.ino() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_commas_are_one_in_a_name() {
        let words = |list: &str| {
            let words = split(list.as_bytes()).into_iter();
            words.map(|word| String::from_utf8(word).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(words("a,b"), ["a", "b"]);
        assert_eq!(words("a,,b,c"), ["a,b", "c"]);
        assert_eq!(words("a,"), ["a", ""]);
    }
}
