//! How large blocks are, from the number of scales: no tensor says it.

use super::description::Blocks;

/// What nearly all who quantise in blocks take.
const USUAL: usize = 128;

/// Where neither it nor a power of two fits, a side is believed that is a multiple of this: any number of scales may be
/// divided by somehow.
const STEP: usize = 8;

/// How large blocks are of which `grid` cover a matrix. Where both sides are divided they are squares, as all known ones
/// are: with any pair of numbers, nearly every count would be explained somehow.
pub(super) fn blocks(sides: [usize; 2], grid: [usize; 2]) -> Option<Blocks> {
    let [(rows, down), (columns, across)] = [(sides[0], grid[0]), (sides[1], grid[1])];
    let divided = |length: usize, count: usize| count > 1 && count < length;
    if !divided(rows, down) || !divided(columns, across) {
        return Some(Blocks { rows: side(rows, down)?, columns: side(columns, across)? });
    }
    let mut candidates = candidates(rows, down).into_iter().chain(candidates(columns, across));
    let covers = |side: &usize| [rows.div_ceil(*side), columns.div_ceil(*side)] == grid;
    candidates.find(covers).map(|side| Blocks { rows: side, columns: side })
}

/// The side of blocks of which `count` cover `length`.
fn side(length: usize, count: usize) -> Option<usize> {
    if length == 0 {
        return (count <= 1).then_some(USUAL);
    }
    if count == 0 || count > length {
        return None;
    }
    // A block may be larger than what it covers.
    let whole = (count == 1).then_some(length.max(USUAL));
    let found = candidates(length, count).into_iter().find(|&side| length.div_ceil(side) == count);
    whole.or(found)
}

/// Sides that `count` blocks of a length may have: the usual one, the power of two that covers it, the divisor.
fn candidates(length: usize, count: usize) -> Vec<usize> {
    // Two powers of two both cover only where two blocks do; then the larger is as good.
    let power = 1 << ((length - 1) / (count - 1).max(1)).max(1).ilog2();
    let divisor = (length / count).is_multiple_of(STEP).then_some(length / count);
    [Some(USUAL), Some(power), divisor.filter(|&side| side > 0)].into_iter().flatten().collect()
}

/// As [`side`], where groups of `usual` come first.
pub(super) fn group(length: usize, count: usize, usual: usize) -> Option<usize> {
    let fits = length > 0 && length.div_ceil(usual) == count;
    if fits { Some(usual) } else { side(length, count) }
}
