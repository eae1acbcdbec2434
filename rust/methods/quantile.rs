//! The exact k-th largest magnitude of a tensor, without sorting or keeping it.
//!
//! The bits of a magnitude, as an unsigned number, are ordered as the magnitudes are. A first pass over a sample counts
//! them in wide bins and brackets the wanted one; a second, over all, counts what lies above the bracket and each value
//! inside it. The few passes more that this may need, where the bracket was missed or is wide, narrow it for certain.
//! A bin of several values is as good as one of a single value if the bits that it merges are zero in all that it holds:
//! differences of bf16 weights have few significant bits.
//!
//! Equal magnitudes at the cut are told apart by a random number of each element, so that the share that is kept is
//! the wanted one; in bf16 many are equal.

use super::counts::Counts;
use crate::kernels::{COLLECT_MARGIN, Kernels};

/// Passes at most: the sample, the bracket, all values, one bin of them.
pub(super) const PASSES: usize = 4;

/// Bins at most: one for each value of a bracket, if they are no more.
const MOST_BINS: u64 = 1 << 20;
/// Magnitudes are below this.
const MAGNITUDES: u64 = 1 << 31;
/// Binary logarithm of the values in a bin when nothing is known yet.
const WIDEST: u32 = 15;
/// Before the counts of the bins: that of what lies above them, and the bits that any value inside them has.
const ABOVE: u32 = 0;
const PRESENT: u32 = 1;
const FIRST_BIN: u32 = 2;
/// Of a large tensor, the sample is one sub-tile in so many.
const STRIDE: usize = 128;
/// Smaller tensors are counted whole.
const LEAST_SAMPLED: usize = 1 << 20;
/// Neighbouring elements are alike: the bracket is wider than independent samples would need.
const MARGIN_DEVIATIONS: f64 = 4.0;
const MARGIN_SHARE: f64 = 0.001;

/// The search for the `top` largest of `elements` magnitudes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Search {
    top: usize,
    elements: usize,
    state: State,
}

/// Where a search stands.
#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    /// So many bins of `1 << shift` values from `low` on are to be counted, in a sample or in all elements.
    Counting(Bins, Scope),
    /// The cut is known.
    Found(Cut),
}

/// So many bins of `1 << shift` values from `low` on.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bins {
    low: u32,
    number: u32,
    shift: u32,
}

/// Which elements are counted.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scope {
    Sample,
    All,
}

/// The border of the largest magnitudes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cut {
    /// Bits from which on all magnitudes belong to them.
    from: u32,
    /// Bits of magnitudes of which some belong to them.
    tie: u32,
    /// Those do whose elements have a random number below this.
    below: u32,
}

impl Cut {
    /// None of the magnitudes.
    pub(super) const NOTHING: Self = Self { from: u32::MAX, tie: u32::MAX, below: 0 };
    /// All of them.
    pub(super) const ALL: Self = Self { from: 0, tie: u32::MAX, below: 0 };

    /// A cut at magnitudes of these bits, `count` elements, of which `wanted` belong to the largest.
    fn at(bits: u32, wanted: usize, count: usize) -> Self {
        let share = ((wanted as u128) << 32) / (count.max(1) as u128);
        match u32::try_from(share) {
            Ok(below) => Self { from: bits + 1, tie: bits, below },
            Err(_) => Self { from: bits, tie: u32::MAX, below: 0 },
        }
    }

    /// 1 if an element with these magnitude bits and this random number is among the largest, 0 if not: a number, since
    /// the compiler vectorises operations on numbers more readily than on truth values.
    #[inline(always)]
    pub(super) fn takes(self, bits: u32, random: u32) -> u32 {
        let tied = u32::from(bits == self.tie) & u32::from(random < self.below);
        u32::from(bits >= self.from) | tied
    }

    /// Whether random numbers decide about magnitudes of these bits.
    #[inline(always)]
    pub(super) fn draws(self, bits: u32) -> bool {
        bits == self.tie
    }
}

/// Bits of the magnitude of a value.
#[inline(always)]
pub(super) fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7FFF_FFFF
}

impl Search {
    /// The start of the search.
    pub(super) fn start(top: usize, elements: usize) -> Self {
        let state = if top == 0 {
            State::Found(Cut::NOTHING)
        } else if top >= elements {
            State::Found(Cut::ALL)
        } else {
            let scope = if elements >= LEAST_SAMPLED { Scope::Sample } else { Scope::All };
            State::Counting(Bins::EVERYTHING, scope)
        };
        Self { top, elements, state }
    }

    /// A search of all elements from the start, whatever their number; how many are wanted is said later.
    pub(super) fn of_all(elements: usize) -> Self {
        Self { top: 0, elements, state: State::Counting(Bins::EVERYTHING, Scope::All) }
    }

    /// Says how many are wanted.
    pub(super) fn wanting(self, top: usize) -> Self {
        match Self::start(top, self.elements) {
            found @ Self { state: State::Found(_), .. } => found,
            _ => Self { top, ..self },
        }
    }

    /// Nothing to be searched for: the cut is this.
    pub(super) const fn found(cut: Cut) -> Self {
        Self { top: 0, elements: 0, state: State::Found(cut) }
    }

    /// The cut, once it is known.
    pub(super) fn cut(&self) -> Option<Cut> {
        match self.state {
            State::Found(cut) => Some(cut),
            State::Counting(..) => None,
        }
    }

    /// Length of the counts of the next pass; none if the cut is known.
    pub(super) fn counts(&self) -> usize {
        match self.state {
            State::Found(_) => 0,
            State::Counting(bins, _) => (FIRST_BIN + bins.number) as usize,
        }
    }

    /// Every how many sub-tiles have to be counted, if any.
    pub(super) fn stride(&self) -> Option<usize> {
        match self.state {
            State::Found(_) => None,
            State::Counting(_, Scope::Sample) => Some(STRIDE),
            State::Counting(_, Scope::All) => Some(1),
        }
    }

    /// Counts values, or their differences from a base as long, if there is anything to count. Its counts, as many as
    /// [`Search::counts`] says, begin at the place `start`.
    pub(super) fn count(
        &self,
        kernels: &Kernels,
        values: &[f32],
        base: Option<&[f32]>,
        counts: &mut Counts<'_>,
        start: u32,
    ) {
        let State::Counting(Bins { low, number, shift }, _) = self.state else { return };
        let (mut higher, mut any) = (0, 0);
        let mut found = [0; PART + COLLECT_MARGIN];
        for (part, values) in values.chunks(PART).enumerate() {
            let base = base.map(|base| &base[part * PART..part * PART + values.len()]);
            let (count, above) =
                kernels.collect_between(values, base, low, number << shift, &mut found);
            higher += above;
            for &offset in &found[..count] {
                any |= offset;
                counts.add(start + FIRST_BIN + (offset >> shift), 1);
            }
        }
        counts.add(start + ABOVE, higher);
        counts.mark(start + PRESENT, any);
    }

    /// Draws the conclusion of a pass.
    pub(super) fn conclude(self, counts: &[u32]) -> Self {
        let State::Counting(bins, scope) = self.state else { return self };
        let (extra, counts) = counts.split_at(FIRST_BIN as usize);
        let state = match scope {
            Scope::Sample => self.bracket(counts),
            Scope::All => self.narrow(bins, extra, counts),
        };
        Self { state, ..self }
    }

    /// From the bins of all elements, the cut, or the one bin in which it lies.
    fn narrow(&self, bins: Bins, extra: &[u32], counts: &[u32]) -> State {
        let Bins { low, number, shift } = bins;
        let start = |bin: usize| low + (u32::try_from(bin).unwrap_or(u32::MAX) << shift);
        let mut higher = extra[ABOVE as usize] as usize;
        if higher >= self.top {
            // Above the bracket.
            return State::over(low + (number << shift), MAGNITUDES);
        }
        for (bin, &count) in counts.iter().enumerate().rev() {
            let count = count as usize;
            if higher + count < self.top {
                higher += count;
                continue;
            }
            let merged = (1_u32 << shift) - 1;
            if extra[PRESENT as usize] & merged != 0 {
                return State::over(start(bin), u64::from(start(bin)) + (1 << shift));
            }
            return State::Found(Cut::at(start(bin), self.top - higher, count));
        }
        State::over(0, u64::from(low))
    }

    /// From a sample's bins, the narrowest range that should hold the wanted value.
    #[expect(clippy::cast_precision_loss, reason = "counts of elements, as shares")]
    fn bracket(&self, bins: &[u32]) -> State {
        let sampled: f64 = bins.iter().map(|&count| f64::from(count)).sum();
        let wanted = self.top as f64 / self.elements as f64;
        let deviation = (wanted * (1.0 - wanted) / sampled.max(1.0)).sqrt();
        let margin = MARGIN_DEVIATIONS * deviation + MARGIN_SHARE;
        let (first, last) = ((wanted - margin) * sampled, (wanted + margin) * sampled);
        let (mut high, mut low) = (MAGNITUDES, 0);
        let mut higher = 0.0;
        for (bin, &count) in bins.iter().enumerate().rev() {
            let start = (bin as u64) << WIDEST;
            if count == 0 {
                continue;
            }
            if higher <= first {
                high = start + (1 << WIDEST);
            }
            higher += f64::from(count);
            if higher >= last {
                low = start;
                break;
            }
        }
        State::over(u32::try_from(low).unwrap_or_default(), high)
    }
}

impl Bins {
    /// All magnitudes, in wide bins.
    const EVERYTHING: Self = Self { low: 0, number: 1 << (31 - WIDEST), shift: WIDEST };
}

impl State {
    /// All elements, in the narrowest bins that reach from `low` to `high`.
    fn over(low: u32, high: u64) -> Self {
        let values = high.saturating_sub(u64::from(low)).max(1);
        let shift = (0..=WIDEST).find(|&shift| values.div_ceil(1 << shift) <= MOST_BINS);
        let shift = shift.unwrap_or(WIDEST);
        let number = u32::try_from(values.div_ceil(1 << shift)).unwrap_or(u32::MAX);
        Self::Counting(Bins { low, number, shift }, Scope::All)
    }
}

/// Elements that are looked at together.
const PART: usize = 256;
