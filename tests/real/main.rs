//! The binary on real images, made and judged by QEMU's own tools. Needs root and /dev/fuse:
//! `tests/run` says what else.

mod support;

mod cli_check;
mod cli_create;
mod cli_diff;
mod cli_info;
mod cli_map;
mod cli_mount;
mod cli_resize;
mod compose;
mod compressed;
mod direct;
mod encryption;
mod encryption_floor;
mod exerciser;
mod file_systems;
mod full_disk;
mod helper;
mod hostile_names;
mod kill_loop;
mod killed;
mod locks;
mod loops;
mod malformed;
mod matrix;
mod model;
mod partitions;
mod policy;
mod preserved;
mod reading;
mod refusals;
mod reverse;
mod single_file;
mod sizes;
mod snapshot_oddities;
mod snapshots;
mod sparse;
mod tools_on_views;
mod tree;
mod tree_rules;
mod unprivileged;
mod walkthrough;
mod writing;
mod zeroing;
