//! Which files an image may make us open. Every open that no user asked for passes [`OpenPolicy::admit`].

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Problem, Result};

/// What the user allows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum BackingPolicy {
    /// Files in the directory of the top image, or below it.
    #[default]
    SameDirectory,
    /// Any file.
    Any,
    /// None.
    Deny,
    /// As `SameDirectory`, and files in or below these directories.
    Allow(Vec<PathBuf>),
}

/// Decides on the opens that the images of one chain imply.
pub struct OpenPolicy {
    policy: BackingPolicy,
    /// Directories with symbolic links resolved.
    directories: Vec<PathBuf>,
}

impl OpenPolicy {
    /// The policy for the chain of `top`, a file that the user named.
    pub fn new(policy: BackingPolicy, top: &Path) -> Self {
        let mut directories = Vec::new();
        if let Some(home) =
            fs::canonicalize(top).ok().and_then(|top| Some(top.parent()?.to_owned()))
        {
            directories.push(home);
        }
        if let BackingPolicy::Allow(more) = &policy {
            directories
                .extend(more.iter().filter_map(|directory| fs::canonicalize(directory).ok()));
        }
        Self { policy, directories }
    }

    /// The file behind `path`, all symbolic links resolved, if it may be opened.
    ///
    /// # Errors
    /// [`Problem::NotFound`], and whatever else keeps the name from leading to a file: only what exists is judged.
    /// [`Problem::Refused`], with the option that would allow it.
    pub fn admit(&self, path: &Path) -> Result<PathBuf> {
        let target = fs::canonicalize(path).map_err(|error| {
            let problem = match error.kind() {
                ErrorKind::NotFound => Problem::NotFound,
                _ => Problem::Io { action: "follow its name", source: error },
            };
            Error::new(problem).at(path)
        })?;
        let refusal = match self.policy {
            BackingPolicy::Any => return Ok(target),
            BackingPolicy::Deny => "the policy is to open no file that an image names",
            _ if self.directories.iter().any(|allowed| target.starts_with(allowed)) => {
                return Ok(target);
            }
            _ => "it is not in the directory of the top image nor below it",
        };
        let directory = target.parent().unwrap_or(&target).display().to_string();
        // A comma would end the option.
        let policy = match directory.contains(',') {
            true => "any".to_owned(),
            false => format!("allow:{directory}"),
        };
        Err(Error::new(Problem::Refused {
            reason: refusal.to_owned(),
            option: Some(format!("backing_policy={policy}")),
            target,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbolic_link_does_not_lead_out_of_the_directory() {
        let temp = tempfile::tempdir().unwrap();
        let (home, elsewhere) = (temp.path().join("home"), temp.path().join("elsewhere"));
        fs::create_dir_all(home.join("sub")).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        let top = home.join("top.qcow2");
        for file in [&top, &home.join("sub/base"), &elsewhere.join("secret")] {
            fs::write(file, "").unwrap();
        }
        std::os::unix::fs::symlink(elsewhere.join("secret"), home.join("link")).unwrap();

        let policy = OpenPolicy::new(BackingPolicy::SameDirectory, &top);
        assert!(policy.admit(&home.join("sub/base")).is_ok());
        assert!(policy.admit(&home.join("sub/../sub/base")).is_ok());
        assert!(policy.admit(&home.join("link")).is_err());
        assert!(policy.admit(&home.join("../elsewhere/secret")).is_err());

        let policy = OpenPolicy::new(BackingPolicy::Allow(vec![elsewhere]), &top);
        assert!(policy.admit(&home.join("link")).is_ok());
        assert!(OpenPolicy::new(BackingPolicy::Deny, &top).admit(&home.join("sub/base")).is_err());
    }

    #[test]
    fn what_is_not_there_is_not_judged() {
        let home = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("loop", home.path().join("loop")).unwrap();
        std::os::unix::fs::symlink("/nowhere/at all", home.path().join("dangling")).unwrap();
        for policy in [BackingPolicy::SameDirectory, BackingPolicy::Deny] {
            let policy = OpenPolicy::new(policy, &home.path().join("top.qcow2"));
            let admit = |name: &str| policy.admit(&home.path().join(name)).unwrap_err();
            for name in ["missing", "../missing", "dangling", "/nowhere/at all"] {
                assert!(matches!(admit(name).problem(), Problem::NotFound), "{name}");
            }
            assert_eq!(admit("loop").errno(), libc::ELOOP);
        }
    }
}
