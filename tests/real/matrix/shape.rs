//! What an image of the matrix is like: one value of every dimension, in combinations that QEMU makes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Index;

use Dimension::{
    Below, Cluster, Compression, Data, Depth, Encryption, Erased, L2, Length, Preallocation,
    Refcount, Snapshots, Version,
};

use crate::support::random::Random;

/// What images differ in. Most values are words of `qemu-img create -o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dimension {
    Version,
    Cluster,
    Refcount,
    /// Whether L2 entries are extended.
    L2,
    /// Of some clusters: with which method, and whether by single writes or by `convert`.
    Compression,
    /// The format of it; each member has a key of its own.
    Encryption,
    /// The external data file.
    Data,
    Preallocation,
    /// How parts of the disk are made zero.
    Erased,
    /// Snapshots, and what came after them.
    Snapshots,
    /// The disk's size as compared to that below; odd ones end within a cluster.
    Length,
    /// The number of members of the chain that the image is the top of.
    Depth,
    /// What the image lies on.
    Below,
}

const DIMENSIONS: [Dimension; 13] = [
    Version,
    Cluster,
    Refcount,
    L2,
    Compression,
    Encryption,
    Data,
    Preallocation,
    Erased,
    Snapshots,
    Length,
    Depth,
    Below,
];

impl Dimension {
    fn values(self) -> &'static [&'static str] {
        match self {
            Version => &["0.10", "1.1"],
            Cluster => &[
                "512", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1M",
                "2M",
            ],
            Refcount => &["1", "2", "4", "8", "16", "32", "64"],
            L2 => &["off", "on"],
            Compression => &["none", "zlib", "zlib convert", "zstd", "zstd convert"],
            Encryption => &["none", "aes", "luks"],
            Data => &["inside", "external", "external raw"],
            Preallocation => &["off", "metadata", "falloc", "full"],
            Erased => &["not", "zeroed", "unmapped", "discarded"],
            Snapshots => &["none", "one", "two", "grown", "shrunk", "VM state"],
            Length => &["same", "shorter", "longer", "odd shorter", "odd longer"],
            Depth => &["1", "2", "3", "4"],
            Below => &["nothing", "raw", "any", "extended", "external"],
        }
    }
}

/// Values that QEMU does not put together, or that contradict each other.
const NEVER: &[&[(Dimension, &[&str])]] = &[
    &[(Version, &["0.10"]), (Refcount, &["1", "2", "4", "8", "32", "64"])],
    &[(Version, &["0.10"]), (L2, &["on"])],
    &[(Version, &["0.10"]), (Compression, &["zstd", "zstd convert"])],
    &[(Version, &["0.10"]), (Data, &["external", "external raw"])],
    &[(Version, &["0.10"]), (Snapshots, &["grown", "shrunk", "VM state"])],
    &[(L2, &["on"]), (Cluster, &["512", "1k", "2k", "4k", "8k"])],
    &[(Compression, COMPRESSED), (Encryption, &["aes", "luks"])],
    &[(Compression, COMPRESSED), (Data, &["external", "external raw"])],
    &[(Compression, COMPRESSED), (Preallocation, &["metadata", "falloc", "full"])],
    &[(Snapshots, SNAPSHOTS), (Data, &["external", "external raw"])],
    &[(Snapshots, SNAPSHOTS), (Refcount, &["1"])],
    // Compressed clusters in one host cluster share its count.
    &[(Snapshots, SNAPSHOTS), (Compression, COMPRESSED), (Refcount, &["2", "4"])],
    // Growing zeroes what the disk below has there, which a compressed cluster can't do in part.
    &[
        (Snapshots, &["grown"]),
        (Length, &["shorter", "odd shorter"]),
        (Compression, COMPRESSED),
        (L2, &["on"]),
    ],
    &[(Below, &["raw", "any", "extended", "external"]), (Data, &["external raw"])],
    &[
        (Below, &["raw", "any", "extended", "external"]),
        (Preallocation, &["metadata", "falloc", "full"]),
        (L2, &["off"]),
    ],
    &[(Length, &["odd shorter", "odd longer"]), (Cluster, &["512"])],
    &[(Depth, &["1"]), (Below, &["raw", "any", "extended", "external"])],
    &[(Depth, &["2", "3", "4"]), (Below, &["nothing"])],
    &[(Depth, &["3", "4"]), (Below, &["raw"])],
];
const COMPRESSED: &[&str] = &["zlib", "zlib convert", "zstd", "zstd convert"];
const SNAPSHOTS: &[&str] = &["one", "two", "grown", "shrunk", "VM state"];

/// A value of a dimension.
pub type Value = (Dimension, &'static str);

/// Values of all dimensions; while it is being drawn, of some.
#[derive(Clone, Default)]
pub struct Shape(BTreeMap<Dimension, &'static str>);

impl Index<Dimension> for Shape {
    type Output = &'static str;

    fn index(&self, dimension: Dimension) -> &&'static str {
        &self.0[&dimension]
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> =
            self.0.iter().map(|(name, value)| format!("{name:?} {value}")).collect();
        f.write_str(&words.join(", "))
    }
}

impl Shape {
    fn of(values: &[Value]) -> Self {
        Self(values.iter().copied().collect())
    }

    fn with(&self, (dimension, value): Value) -> Self {
        let mut shape = self.clone();
        shape.0.insert(dimension, value);
        shape
    }

    fn is_legal(&self) -> bool {
        let holds = |(dimension, values): &(Dimension, &[&str])| {
            self.0.get(dimension).is_some_and(|value| values.contains(value))
        };
        !NEVER.iter().any(|together| together.iter().all(holds))
    }

    /// A legal shape that has all values of this one, if there is one; `order` says which values of
    /// a dimension to try first.
    fn complete(
        self,
        order: &mut impl FnMut(&Self, Dimension) -> Vec<&'static str>,
    ) -> Option<Self> {
        if !self.is_legal() {
            return None;
        }
        let Some(next) = DIMENSIONS.into_iter().find(|name| !self.0.contains_key(name)) else {
            return Some(self);
        };
        let values = order(&self, next);
        values.into_iter().find_map(|value| self.with((next, value)).complete(order))
    }

    /// What the member below must be, if it is a qcow2 image.
    fn below(&self) -> Option<Self> {
        let kind: &[Value] = match self[Below] {
            "any" => &[],
            "extended" => &[(L2, "on")],
            "external" => &[(Data, "external")],
            _ => return None,
        };
        let depths = Depth.values();
        let level = depths.iter().position(|depth| *depth == self[Depth]).expect("a depth");
        Some(Self::of(kind).with((Depth, depths[level - 1])))
    }
}

/// Pairs of values that are still to occur in an image.
#[derive(Clone)]
pub struct Missing(BTreeSet<(Value, Value)>);

impl Missing {
    /// Every pair that is legal.
    pub fn all() -> Self {
        let values = |dimension: Dimension| dimension.values().iter().map(move |&v| (dimension, v));
        let all: Vec<Value> = DIMENSIONS.into_iter().flat_map(values).collect();
        let pairs = all.iter().flat_map(|&a| all.iter().map(move |&b| (a, b)));
        let in_order = |_: &Shape, dimension: Dimension| dimension.values().to_vec();
        let is_legal = |&(a, b): &(Value, Value)| {
            a.0 < b.0 && Shape::of(&[a, b]).complete(&mut in_order.clone()).is_some()
        };
        Self(pairs.filter(is_legal).collect())
    }

    /// Whether all have occurred.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes away the pairs that occur in `shape`.
    pub fn note(&mut self, shape: &Shape) {
        self.0.retain(|(a, b)| shape[a.0] != a.1 || shape[b.0] != b.1);
    }

    /// How many missing pairs `value` makes with the values of `shape`.
    fn gain(&self, shape: &Shape, value: Value) -> usize {
        let others = shape.0.iter().map(|(&dimension, &other)| (dimension, other));
        others.filter(|&other| self.0.contains(&(other.min(value), other.max(value)))).count()
    }

    /// A complete shape with many missing pairs.
    fn draw(&self, fixed: Shape, random: &mut Random) -> Shape {
        let best_first = &mut |shape: &Shape, dimension: Dimension| {
            let mut values = dimension.values().to_vec();
            values.sort_by_cached_key(|&value| {
                (usize::MAX - self.gain(shape, (dimension, value)), cost(value), random.any())
            });
            values
        };
        fixed.complete(best_first).expect("legal values can be completed")
    }
}

/// How long QEMU takes to make such an image.
fn cost(value: &str) -> u32 {
    match value {
        "luks" => 1,
        _ => 0,
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = |(a, b): &(Value, Value)| format!("{:?} {} + {:?} {}", a.0, a.1, b.0, b.1);
        f.write_str(&self.0.iter().map(pair).collect::<Vec<_>>().join("; "))
    }
}

/// Which images of a chain count when it is asked whether all has occurred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    All,
    /// The one on top, which is the only one to be written.
    Top,
}

/// Chains of shapes, each from its lowest qcow2 image up, in which every legal pair of values occurs in an image that
/// counts.
pub fn cover(random: &mut Random, counted: Counted) -> Vec<Vec<Shape>> {
    let mut missing = Missing::all();
    let mut chains = Vec::new();
    while !missing.is_empty() {
        let pairs: Vec<_> = missing.0.iter().copied().collect();
        let (a, b) = random.pick(&pairs);
        let mut chain = Vec::new();
        let mut next = Some(Shape::of(&[a, b]));
        while let Some(fixed) = next {
            let shape = missing.draw(fixed, random);
            if counted == Counted::All || chain.is_empty() {
                missing.note(&shape);
            }
            next = shape.below();
            chain.push(shape);
        }
        chain.reverse();
        chains.push(chain);
    }
    chains
}

/// A chain from its lowest qcow2 image up, of which each has some given values.
pub fn chain_with(given: &[&[Value]], random: &mut Random) -> Vec<Shape> {
    let missing = Missing::all();
    let draw = |(level, values): (usize, &&[Value])| {
        let below = if level == 0 { "nothing" } else { "any" };
        let place = Shape::of(&[(Depth, Depth.values()[level]), (Below, below)]);
        missing.draw(values.iter().fold(place, |shape, &value| shape.with(value)), random)
    };
    given.iter().enumerate().map(draw).collect()
}
