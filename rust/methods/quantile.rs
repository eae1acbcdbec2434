//! The exact k-th largest magnitude of a tensor, without sorting or keeping it.
//!
//! The bits of a magnitude, as an unsigned number, are ordered as the magnitudes are. A first pass over a sample counts
//! them in wide bins and brackets the wanted one; a second, over all, counts what lies above the bracket and each value
//! inside it. The few passes more that this may need, where the bracket was missed or is wide, narrow it for certain.
//!
//! Equal magnitudes at the cut are told apart by a random number of each element, so that the share that is kept is
//! the wanted one; in bf16 many are equal.

use std::sync::atomic::{AtomicU32, Ordering};

/// Passes at most: the sample, the bracket, all values, one bin of them.
pub(super) const PASSES: usize = 4;
/// Numbers that a search needs from pass to pass.
pub(super) const FACTS: usize = 4;
/// Counts of a pass: what lies above the bins, then the bins.
pub(super) const COUNTS: usize = 1 + BINS;

const BINS: usize = 1 << 18;
/// Magnitudes are below 2³¹; this shift spreads all of them over the bins.
const WIDEST: u32 = 13;
/// Of a large tensor, the sample is one sub-tile in so many.
const STRIDE: usize = 32;
/// Smaller tensors are counted whole.
const LEAST_SAMPLED: usize = 1 << 20;
/// Neighbouring elements are alike: the bracket is wider than independent samples would need.
const MARGIN_DEVIATIONS: f64 = 6.0;
const MARGIN_SHARE: f64 = 0.002;

/// Where a search stands; kept as [`FACTS`] numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Search {
    /// Bins of `1 << shift` values from `low` on are to be counted, in a sample or in all elements.
    Counting {
        /// The first value of the first bin.
        low: u32,
        /// Binary logarithm of the values in a bin.
        shift: u32,
        /// Whether a sample will do.
        sample: bool,
    },
    /// The cut is known.
    Found(Cut),
}

/// The border of the largest magnitudes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cut {
    /// Bits of the smallest magnitude among them.
    pub threshold: u32,
    /// Elements of that very magnitude belong to them if their random number is below this.
    pub ties_below: u64,
}

/// One above the largest u32.
const ALL: u64 = 1 << 32;

impl Cut {
    /// Whether an element with these magnitude bits and this random number is among the largest.
    #[inline(always)]
    pub(super) fn takes(self, bits: u32, random: u32) -> bool {
        bits > self.threshold || (bits == self.threshold && u64::from(random) < self.ties_below)
    }

    /// Whether equal magnitudes at the border are told apart by random numbers.
    pub(super) fn draws(self) -> bool {
        self.ties_below != 0 && self.ties_below != ALL
    }
}

/// Bits of the magnitude of a value.
#[inline(always)]
pub(super) fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7FFF_FFFF
}

impl Search {
    /// The start of the search for the `top` largest of `elements` magnitudes.
    pub(super) fn start(top: usize, elements: usize) -> Self {
        if top == 0 {
            Self::Found(Cut { threshold: u32::MAX, ties_below: 0 })
        } else if top >= elements {
            Self::Found(Cut { threshold: 0, ties_below: ALL })
        } else {
            Self::Counting { low: 0, shift: WIDEST, sample: elements >= LEAST_SAMPLED }
        }
    }

    /// A search of all elements from the start, whatever their number.
    pub(super) fn of_all() -> Self {
        Self::Counting { low: 0, shift: WIDEST, sample: false }
    }

    /// The search that these numbers stand for.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "they are the whole numbers that `facts` wrote"
    )]
    pub(super) fn from_facts(facts: &[f64]) -> Self {
        let (first, second) = (facts[1] as u32, facts[2] as u64);
        if facts[0] == 1.0 {
            Self::Found(Cut { threshold: first, ties_below: second })
        } else {
            Self::Counting { low: first, shift: second as u32, sample: facts[3] == 1.0 }
        }
    }

    /// The numbers that stand for it; f64 holds all of them exactly.
    #[expect(clippy::cast_precision_loss, reason = "at most 2^32")]
    pub(super) fn facts(self) -> [f64; FACTS] {
        match self {
            Self::Found(cut) => [1.0, f64::from(cut.threshold), cut.ties_below as f64, 0.0],
            Self::Counting { low, shift, sample } => {
                [0.0, f64::from(low), f64::from(shift), f64::from(u8::from(sample))]
            }
        }
    }

    /// Every how many sub-tiles have to be counted.
    pub(super) fn stride(self) -> usize {
        if matches!(self, Self::Counting { sample: true, .. }) { STRIDE } else { 1 }
    }

    /// Counts some values.
    #[inline(always)]
    pub(super) fn count(self, values: &[f32], counts: &[AtomicU32]) {
        let Self::Counting { low, shift, .. } = self else { return };
        let Some((above, bins)) = counts.split_first() else { return };
        let width = u32::try_from(u64::from(ALL_BINS) << shift).unwrap_or(u32::MAX);
        let mut higher = 0_u32;
        for block in values.chunks(BLOCK) {
            let mut inside = 0_u32;
            for &value in block {
                let bits = magnitude(value);
                let offset = bits.wrapping_sub(low);
                higher += u32::from(bits >= low && offset >= width);
                inside |= u32::from(offset < width);
            }
            // Most blocks have nothing inside a narrow bracket.
            if inside != 0 {
                for &value in block {
                    let offset = magnitude(value).wrapping_sub(low);
                    if offset < width {
                        bins[(offset >> shift) as usize].fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }
        if higher > 0 {
            above.fetch_add(higher, Ordering::Relaxed);
        }
    }

    /// Draws the conclusion of a pass in the search for the `top` largest of `elements`.
    pub(super) fn conclude(self, counts: &[u32], top: usize, elements: usize) -> Self {
        let Self::Counting { low, shift, sample } = self else { return self };
        let (above, bins) = (counts[0] as usize, &counts[1..]);
        if sample {
            return Self::bracket(bins, top, elements);
        }
        let start = |bin: usize| low + (u32::try_from(bin).unwrap_or(u32::MAX) << shift);
        let mut higher = above;
        if higher >= top {
            // Above the bracket: what lies there, in bins as narrow as fit.
            let low = u32::try_from((u64::from(ALL_BINS) << shift) + u64::from(low));
            return Self::over(low.unwrap_or(u32::MAX), MAGNITUDES);
        }
        for (bin, &count) in bins.iter().enumerate().rev() {
            let count = count as usize;
            if higher + count < top {
                higher += count;
                continue;
            }
            if shift > 0 {
                return Self::over(start(bin), u64::from(start(bin)) + (1 << shift));
            }
            let ties_below = share(top - higher, count);
            return Self::Found(Cut { threshold: start(bin), ties_below });
        }
        Self::over(0, u64::from(low))
    }

    /// From a sample's bins, the narrowest range that should hold the wanted value.
    #[expect(clippy::cast_precision_loss, reason = "counts of elements, as shares")]
    fn bracket(bins: &[u32], top: usize, elements: usize) -> Self {
        let sampled: f64 = bins.iter().map(|&count| f64::from(count)).sum();
        let wanted = top as f64 / elements as f64;
        let deviation = (wanted * (1.0 - wanted) / sampled.max(1.0)).sqrt();
        let margin = MARGIN_DEVIATIONS * deviation + MARGIN_SHARE;
        let (mut high, mut low) = (MAGNITUDES, 0);
        let mut higher = 0.0;
        for (bin, &count) in bins.iter().enumerate().rev() {
            let start = (bin as u64) << WIDEST;
            let next = higher + f64::from(count);
            if higher <= (wanted - margin) * sampled {
                high = start + (1 << WIDEST);
            }
            if next >= (wanted + margin) * sampled && higher < (wanted + margin) * sampled {
                low = u32::try_from(start).unwrap_or_default();
            }
            higher = next;
        }
        Self::over(low, high)
    }

    /// All elements, in the narrowest bins that reach from `low` to `high`.
    fn over(low: u32, high: u64) -> Self {
        let values = high.saturating_sub(u64::from(low));
        let shift = (0..=WIDEST).find(|&shift| u64::from(ALL_BINS) << shift >= values);
        Self::Counting { low, shift: shift.unwrap_or(WIDEST), sample: false }
    }
}

/// One above the largest magnitude.
const MAGNITUDES: u64 = 1 << 31;
const ALL_BINS: u32 = 1 << 18;
/// Elements that are looked at together.
const BLOCK: usize = 16;

/// `part / whole` of all u32, to be compared with random ones.
fn share(part: usize, whole: usize) -> u64 {
    let share = ((part as u128) << 32) / (whole.max(1) as u128);
    u64::try_from(share).unwrap_or(ALL)
}
