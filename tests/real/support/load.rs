//! fio, as a load in the background or to its end.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::tools::{args, run, start};

/// A fio that runs until it fails or this is dropped.
pub struct Load(Child);

impl Load {
    /// Lets two jobs write at random to the second half of the `size` bytes of `disk`, with a sync now and then.
    #[track_caller]
    pub fn on_second_half(disk: &Path, size: u64) -> Self {
        let half = size / 2;
        let mut fio = Command::new("fio");
        fio.args(["--name=load", "--ioengine=psync", "--rw=randwrite", "--bsrange=512-64k"]);
        fio.args(["--numjobs=2", "--thread", "--fsync=16", "--time_based", "--runtime=100"]);
        fio.args([format!("--offset={half}"), format!("--size={half}")]);
        fio.args(["--blockalign=512", "--allow_file_create=0"]).arg("--filename").arg(disk);
        Self(start(fio.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())))
    }

    /// Waits until it has failed, as it must once the disk is gone.
    pub fn fails(mut self) {
        let status = self.0.wait().expect("wait for fio");
        assert!(!status.success(), "fio did not notice that its disk was gone");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs four jobs that write, read and verify files of `dir`, with `options` besides. They must find what they wrote.
#[track_caller]
pub fn verify_files(dir: &Path, options: &[&str]) {
    let mut words: Vec<OsString> = args![
        "--name=files",
        "--ioengine=psync",
        "--rw=randrw",
        "--bsrange=4k-64k",
        "--numjobs=4",
        "--thread",
        "--size=16M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--fsync=64",
        "--verify_state_save=0",
        "--group_reporting",
        "--minimal",
        "--randseed=7"
    ]
    .to_vec();
    words.extend(args![format!("--directory={}", dir.display())]);
    words.extend(options.iter().map(OsString::from));
    run("fio", &words);
}
