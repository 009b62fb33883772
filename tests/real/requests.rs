//! By which way the kernel's requests come.

use std::fs;

use crate::support::M;
use crate::support::images::Images;
use crate::support::mounted::Mounted;
use crate::support::tools::args;

const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

#[test]
fn requests_come_over_io_uring_where_the_kernel_offers_it_unless_told_otherwise() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let offered = fs::read_to_string(SWITCH).is_ok_and(|value| value.trim() == "Y");
    let mounted = Mounted::new(&image);
    assert_eq!(way_of(&mounted), if offered { "io_uring" } else { "device" });
    mounted.umount();
    let mounted = Mounted::with(&args!["-o", "io_uring=off"], &image);
    assert_eq!(way_of(&mounted), "device");
    mounted.umount();
}

fn way_of(mounted: &Mounted) -> String {
    let told = fs::read_to_string(mounted.path(".qchainfs/daemon.json")).expect("daemon.json");
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    told["requests"].as_str().expect("a word").to_owned()
}
