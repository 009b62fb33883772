//! Times of the ways through the library: `cargo bench --bench paths`.

use criterion::{Criterion, criterion_group, criterion_main};

mod works;

fn paths(criterion: &mut Criterion) {
    for name in works::NAMES {
        let mut work = works::prepare(name).expect("prepare a work");
        let mut number = 0;
        criterion.bench_function(work.name, |bencher| {
            bencher.iter(|| {
                (work.step)(number);
                number += 1;
            });
        });
    }
}

criterion_group!(benches, paths);
criterion_main!(benches);
