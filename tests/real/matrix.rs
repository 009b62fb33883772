//! Every view of images of every kind is what QEMU reads there, and `info`, `map` and `check` say the same.

pub mod build;
mod compare;
pub mod shape;

use std::thread::{self, ScopedJoinHandle};

use build::Workshop;
use shape::{Counted, Missing, Shape, cover};

use crate::support::random::{Random, seeds};

/// Seeds in whose chains every legal pair of values occurs.
const SHARES: u64 = 8;

/// What the chains of so many seeds have at least.
const IMAGES: usize = 150;
const VIEWS: usize = 250;

/// The chains that belong to `seed`.
fn share(seed: u64) -> Vec<Vec<Shape>> {
    let chains =
        cover(&mut Random::fixed(seed.div_ceil(SHARES)), Counted::All).into_iter().enumerate();
    let of_seed = chains.filter(|(number, _)| *number as u64 % SHARES == seed % SHARES);
    of_seed.map(|(_, chain)| chain).collect()
}

/// What was done for a seed.
#[derive(Default)]
struct Done {
    shapes: Vec<Shape>,
    images: usize,
    views: usize,
}

/// Makes the chains of `seed` and compares all that can be seen of them; the first one mounted, too.
fn compare_share(seed: u64) -> Done {
    let random = &mut Random::new(seed);
    let mut done = Done::default();
    for (number, shapes) in share(seed).into_iter().enumerate() {
        for shape in &shapes {
            eprintln!("chain {number} of seed {seed}: {shape}");
        }
        let mut workshop = Workshop::new(random);
        let members = workshop.chain(&shapes);
        done.images += members.len();
        done.views += compare::in_process(&members, random);
        compare::described(&members);
        if number == 0 {
            compare::mounted(&members);
        }
        done.shapes.extend(shapes);
    }
    done
}

/// As [`compare_share`] for several seeds, each in a thread named after it.
fn compare_at_once(seeds: &[u64]) -> Vec<Done> {
    thread::scope(|scope| {
        let start = |&seed: &u64| {
            let named = thread::Builder::new().name(format!("seed {seed}"));
            named.spawn_scoped(scope, move || compare_share(seed)).expect("start a thread")
        };
        let threads: Vec<_> = seeds.iter().map(start).collect();
        let end = |thread: ScopedJoinHandle<'_, Done>| thread.join().expect("a seed without fault");
        threads.into_iter().map(end).collect()
    })
}

#[test]
fn every_view_of_every_kind_of_image_is_what_qemu_reads() {
    let seeds = seeds(SHARES);
    let done: Vec<Done> = seeds.chunks(2).flat_map(compare_at_once).collect();
    let images: usize = done.iter().map(|done| done.images).sum();
    let views: usize = done.iter().map(|done| done.views).sum();
    eprintln!("{images} images and {views} views compared with QEMU");
    let covers = seeds.len() / SHARES as usize;
    assert!(images >= covers * IMAGES, "only {images} images");
    assert!(views >= covers * VIEWS, "only {views} views");
    let mut missing = Missing::all();
    done.iter().flat_map(|done| &done.shapes).for_each(|shape| missing.note(shape));
    assert!(covers == 0 || missing.is_empty(), "these values never met: {missing}");
}
