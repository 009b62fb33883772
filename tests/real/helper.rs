//! The helper that mount(8) calls for `-t qchainfs`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::support::M;
use crate::support::images::{Images, check, io};
use crate::support::mounted::Mounted;
use crate::support::oracle::reads_as;
use crate::support::tools::{Outcome, QCHAINFS, args, attempt_with, run};

const HELPER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/mount-helper/mount.qchainfs");
const UNMOUNT_HELPER: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/mount-helper/umount.fuse.qchainfs");

/// The search path of a system on which the program is installed.
fn search_path() -> OsString {
    let mut path = Path::new(QCHAINFS).parent().expect("a directory").as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}

fn attempt(program: &str, words: &[OsString]) -> Outcome {
    attempt_with(program, words, &[("PATH", search_path())])
}

/// Calls the helper as mount(8) does.
fn help(spec: &OsStr, words: &[&str]) -> Result<Mounted, Outcome> {
    Mounted::attempt_by(spec, |spec, root| {
        let mut all = args![spec, root].to_vec();
        all.extend(words.iter().map(OsString::from));
        attempt(HELPER, &all)
    })
}

/// The helpers where mount(8) and umount(8) look for them, for as long as this lives.
///
/// Both call their helpers without a search path, so that these are scripts that set one.
struct Installed {
    scripts: Vec<PathBuf>,
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl Installed {
    fn now() -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scripts = Vec::new();
        for helper in [HELPER, UNMOUNT_HELPER] {
            let helper = Path::new(helper);
            let place = Path::new("/sbin").join(helper.file_name().expect("a name"));
            if !place.exists() {
                let path = search_path();
                let (path, helper) = (path.display(), helper.display());
                let text = format!("#!/bin/sh\nPATH='{path}' exec '{helper}' \"$@\"\n");
                fs::write(&place, text).expect("install the helper");
                fs::set_permissions(&place, Permissions::from_mode(0o755)).expect("chmod");
                scripts.push(place);
            }
        }
        Self { scripts, _one_at_a_time: guard }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        for script in &self.scripts {
            let _ = fs::remove_file(script);
        }
    }
}

#[test]
fn the_helper_mounts_with_the_words_of_mount() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 5 0 1M"]);
    for words in
        [&["-o", "rw"][..], &["-o", "ro,nofail"], &["-n", "-v", "-o", "defaults,_netdev"], &[]]
    {
        let mounted = help(image.as_os_str(), words).unwrap_or_else(|outcome| panic!("{outcome}"));
        reads_as(&mounted.disk(), &image);
        let line = mounted.mount_line().expect("a mount");
        let read_only = line[3].split(',').any(|word| word == "ro");
        assert_eq!(read_only, words.contains(&"ro,nofail"), "{line:?}");
        mounted.umount();
    }
    check(&image);
}

#[test]
fn a_mount_of_the_type_qchainfs_is_made_and_ended_by_the_systems_tools() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 5 0 1M"]);
    let installed = Installed::now();
    let mounted = Mounted::attempt_by(image.as_os_str(), |spec, root| {
        attempt("mount", &args!["-t", "qchainfs", "-o", "ro,noauto,x-test", spec, root])
    });
    let mounted = mounted.unwrap_or_else(|outcome| panic!("{outcome}"));
    assert_eq!(mounted.mount_line().expect("a mount")[2], "fuse.qchainfs");
    reads_as(&mounted.disk(), &image);
    run("umount", &args![mounted.root()]);
    mounted.is_over();
    drop(installed);
}

#[test]
fn the_helper_exits_as_mount_does() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let code = |spec: &OsStr, words: &[&str]| match help(spec, words) {
        Ok(_) => panic!("{} was mounted", spec.display()),
        Err(outcome) => outcome.code,
    };
    assert_eq!(code(images.path("missing.qcow2").as_os_str(), &["-o", "ro"]), Some(32));
    assert_eq!(code(image.as_os_str(), &["-o", "colour=blue"]), Some(1));
}
