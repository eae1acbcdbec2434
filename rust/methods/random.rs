//! Random numbers that are a function of (key, stream, index): Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel
//! random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! An element's number does not depend on which others were drawn before, nor on threads or tiles.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;
/// Counters that are worked on side by side, so that the compiler vectorises the rounds.
const LANES: usize = 16;
/// Numbers that one counter gives.
const WORDS: usize = 4;

/// The key of a tensor's numbers: a digest of the seed and the tensor's name.
pub(super) fn key(seed: u64, tensor: &str) -> [u32; 2] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(tensor.as_bytes());
    let digest = hasher.finalize();
    let word = |start: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&digest.as_bytes()[start..start + 4]);
        u32::from_le_bytes(bytes)
    };
    [word(0), word(4)]
}

/// Fills `out` with the numbers of elements `first..first + out.len()` of a stream; uniform over all u32.
///
/// Element `i` gets word `i % 4` of the block with counter (low half of `i / 4`, high half, `stream`, 0).
#[inline(always)]
pub fn uniforms(key: [u32; 2], stream: u32, first: usize, out: &mut [u32]) {
    let mut done = 0;
    while done < out.len() {
        let element = first + done;
        let skip = element % WORDS;
        let block = blocks(key, stream, element / WORDS);
        let count = (LANES * WORDS - skip).min(out.len() - done);
        out[done..done + count].copy_from_slice(&block[skip..skip + count]);
        done += count;
    }
}

/// Fills `out` with numbers that tell equal magnitudes apart: a hash of element and key (Wellons' lowbias32), which costs
/// a fraction of [`uniforms`].
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the hash takes both halves of the index")]
pub(super) fn tie_breakers(key: [u32; 2], stream: u32, first: usize, out: &mut [u32]) {
    let salt = key[0] ^ stream.wrapping_mul(WEYL[0]);
    if first as u64 + out.len() as u64 <= 1 << 32 {
        // The high halves are zero; numbers of 32 bits are worked on twice as fast.
        let start = first as u32;
        for (place, number) in (0_u32..).zip(out) {
            *number = hash(hash(start.wrapping_add(place) ^ salt) ^ key[1]);
        }
        return;
    }
    for (number, element) in out.iter_mut().zip(first as u64..) {
        let high = ((element >> 32) as u32).wrapping_mul(WEYL[1]);
        *number = hash(hash(element as u32 ^ salt) ^ key[1] ^ high);
    }
}

#[inline(always)]
fn hash(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
    x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
    x ^ (x >> 16)
}

/// The words of [`LANES`] consecutive counters.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "halves of 64-bit numbers")]
fn blocks(key: [u32; 2], stream: u32, first: usize) -> [u32; LANES * WORDS] {
    let counter = |lane: usize| (first + lane) as u64;
    let mut a: [u32; LANES] = std::array::from_fn(|lane| counter(lane) as u32);
    let mut b: [u32; LANES] = std::array::from_fn(|lane| (counter(lane) >> 32) as u32);
    let mut c = [stream; LANES];
    let mut d = [0; LANES];
    let mut key = key;
    for _ in 0..ROUNDS {
        for (((a, b), c), d) in a.iter_mut().zip(&mut b).zip(&mut c).zip(&mut d) {
            let first = u64::from(MULTIPLIERS[0]) * u64::from(*a);
            let second = u64::from(MULTIPLIERS[1]) * u64::from(*c);
            *a = (second >> 32) as u32 ^ *b ^ key[0];
            *b = second as u32;
            *c = (first >> 32) as u32 ^ *d ^ key[1];
            *d = first as u32;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    let mut words = [0; LANES * WORDS];
    let lanes = a.iter().zip(&b).zip(&c).zip(&d);
    for (words, (((a, b), c), d)) in words.as_chunks_mut::<WORDS>().0.iter_mut().zip(lanes) {
        *words = [*a, *b, *c, *d];
    }
    words
}

/// A probability as a bound: a uniform u32 lies below it that often.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 0 and 2^32 after the clamp"
)]
pub(super) fn probability(share: f64) -> u64 {
    (share.clamp(0.0, 1.0) * 4_294_967_296.0).round() as u64
}

/// `⌊share·count⌋`, computed in f64 as Python does; at most `count`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of a number of elements, which is far below 2^53"
)]
pub(super) fn floor(share: f64, count: usize) -> usize {
    ((share * count as f64).max(0.0) as usize).min(count)
}
