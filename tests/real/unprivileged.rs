//! Mounting without privileges, by way of fusermount3.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, chown};

use crate::support::M;
use crate::support::images::{Images, check, io};
use crate::support::oracle::{bytes_of, same};
use crate::support::tools::{QCHAINFS, args, run};

/// Runs as an ordinary user in mount namespace of its own, in which everybody may open /dev/fuse, as on most systems.
/// Whatever goes wrong, its mounts go with it.
const SCRIPT: &str = r#"
set -e
program=$1 image=$2 copy=$3 dir=$4
mknod "$dir/fuse" c 10 229
chmod 666 "$dir/fuse"
mount --bind "$dir/fuse" /dev/fuse
as_user() { setpriv --reuid=65534 --regid=65534 --clear-groups timeout 60 "$@"; }
as_user mkdir "$dir/mnt"
as_user "$program" mount "$image" "$dir/mnt"
as_user findmnt -n -o FSTYPE "$dir/mnt"
as_user cp "$dir/mnt/disk.raw" "$copy"
printf written | as_user dd of="$dir/mnt/disk.raw" bs=1 seek=5000 conv=notrunc status=none
as_user sh -c 'cd "$1"; touch "$2"; exec sleep 0.1' sh "$dir/mnt" "$dir/in use" &
until [ -e "$dir/in use" ]; do sleep 0.01; done
as_user "$program" umount "$dir/mnt"
if findmnt -n "$dir/mnt"; then exit 9; fi
"#;

#[test]
fn an_ordinary_user_mounts_writes_and_unmounts_an_image_of_his() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    io(&image, &["write -P 5 0 1M"]);
    let mut expected = bytes_of(&image);
    let dir = images.path("");
    for path in [&dir, &image] {
        chown(path, Some(65534), Some(65534)).expect("give it to an ordinary user");
    }
    std::fs::set_permissions(&dir, Permissions::from_mode(0o755)).expect("chmod");
    // The program may be in a directory that only its owner can look into.
    let program = images.path("qchainfs");
    std::fs::copy(QCHAINFS, &program).expect("copy the program");
    let copy = images.path("copy.raw");
    let script = args!["-m", "--propagation", "private", "sh", "-c", SCRIPT, "sh"];
    let words = [&script[..], &args![program, image, copy, dir]].concat();
    let said = run("unshare", &words);
    assert!(said.contains("fuse.qchainfs"), "{said}");
    same("the copy", &expected, &std::fs::read(&copy).expect("read the copy"));
    expected[5000..5007].copy_from_slice(b"written");
    same("the image", &expected, &bytes_of(&image));
    check(&image);
}
