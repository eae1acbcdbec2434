//! Standard normal numbers that are a function of a seed, a stream and an index: Philox4x32-10 and Box and Muller's
//! transform.

use crate::methods::uniforms;
use std::f64::consts::TAU;

/// Numbers that are drawn at a time.
const BATCH: usize = 1024;

/// Fills `out` with the numbers `0..out.len()` of a stream. Numbers 2i and 2i + 1 are made of the two uniforms with the
/// same indices.
pub fn normals(seed: u64, stream: u32, out: &mut [f32]) {
    let mut words = [0; BATCH];
    let key = key(seed);
    for (number, batch) in out.chunks_mut(BATCH).enumerate() {
        uniforms(key, stream, number * BATCH, &mut words);
        for (values, words) in batch.chunks_mut(2).zip(words.as_chunks::<2>().0) {
            let pair = box_muller(*words);
            values.copy_from_slice(&pair[..values.len()]);
        }
    }
}

/// The halves of a seed.
#[expect(clippy::cast_possible_truncation, reason = "one half each")]
fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// Two normal numbers of two uniform ones.
#[expect(clippy::cast_possible_truncation, reason = "rounded to f32 on purpose")]
fn box_muller([first, second]: [u32; 2]) -> [f32; 2] {
    // Between 0 and 1, and neither.
    let uniform = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    let radius = (-2.0 * uniform(first).ln()).sqrt();
    let (sine, cosine) = (TAU * uniform(second)).sin_cos();
    [(radius * cosine) as f32, (radius * sine) as f32]
}
