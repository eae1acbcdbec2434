//! Kernels of every SIMD level beside memcpy, on buffers that fit the second-level cache and on some that do not.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use safemerge_fast::dtype::Float;
use safemerge_fast::kernels::{Kernels, Level};
use std::hint::black_box;

/// Elements of a sub-tile, as the engine cuts them.
const SUB_TILE: usize = 1024;

/// The inner loop of `linear` on two operands: load, load, two multiply-adds, store.
fn blend(kernels: &Kernels, dtype: Float, first: &[u8], second: &[u8], out: &mut [u8]) {
    let (mut a, mut b, mut sum) = ([0.0; SUB_TILE], [0.0; SUB_TILE], [0.0; SUB_TILE]);
    let bytes = SUB_TILE * dtype.size();
    let inputs = first.chunks_exact(bytes).zip(second.chunks_exact(bytes));
    for ((first, second), out) in inputs.zip(out.chunks_exact_mut(bytes)) {
        kernels.load(dtype, first, &mut a);
        kernels.load(dtype, second, &mut b);
        sum.fill(0.0);
        kernels.multiply_add(&mut sum, &a, 0.8);
        kernels.multiply_add(&mut sum, &b, 0.2);
        black_box(kernels.store(dtype, &sum, out));
    }
}

/// The inner loop of what `slerp` observes of two operands: load, load, three dot products.
fn observe(kernels: &Kernels, dtype: Float, first: &[u8], second: &[u8]) -> f64 {
    let (mut a, mut b) = ([0.0; SUB_TILE], [0.0; SUB_TILE]);
    let bytes = SUB_TILE * dtype.size();
    let mut sum = 0.0;
    for (first, second) in first.chunks_exact(bytes).zip(second.chunks_exact(bytes)) {
        kernels.load(dtype, first, &mut a);
        kernels.load(dtype, second, &mut b);
        sum += kernels.dot(&a, &a) + kernels.dot(&a, &b) + kernels.dot(&b, &b);
    }
    sum
}

fn kernels(criterion: &mut Criterion) {
    for (place, bytes) in [("cache", 256 << 10), ("memory", 64 << 20)] {
        let (first, second) = (vec![0x3C_u8; bytes], vec![0x3D_u8; bytes]);
        let mut out = vec![0_u8; bytes];
        let mut group = criterion.benchmark_group(format!("linear from {place}"));
        // Two inputs are read and one output is written.
        group.throughput(Throughput::Bytes(3 * bytes as u64));
        group.sample_size(20);
        for level in Level::available() {
            let Ok(kernels) = Kernels::named(level.name()) else { continue };
            for dtype in [Float::BF16, Float::F16, Float::F32] {
                let id = BenchmarkId::new(level.name(), format!("{dtype:?}"));
                group.bench_function(id, |bencher| {
                    bencher.iter(|| blend(&kernels, dtype, &first, &second, &mut out));
                });
            }
        }
        group.finish();
        let mut group = criterion.benchmark_group(format!("dot products from {place}"));
        // Two inputs are read.
        group.throughput(Throughput::Bytes(2 * bytes as u64));
        group.sample_size(20);
        for level in Level::available() {
            let Ok(kernels) = Kernels::named(level.name()) else { continue };
            for dtype in [Float::BF16, Float::F16, Float::F32] {
                let id = BenchmarkId::new(level.name(), format!("{dtype:?}"));
                group.bench_function(id, |bencher| {
                    bencher.iter(|| black_box(observe(&kernels, dtype, &first, &second)));
                });
            }
        }
        group.finish();
        let mut group = criterion.benchmark_group(format!("memcpy from {place}"));
        group.throughput(Throughput::Bytes(2 * bytes as u64));
        group.sample_size(20);
        group.bench_function("copy_from_slice", |bencher| {
            bencher.iter(|| out.copy_from_slice(black_box(&first)));
        });
        group.finish();
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
