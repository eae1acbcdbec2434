//! How large blocks are, from the number of scales: no tensor says it.

/// What nearly all who quantise in blocks take.
const USUAL: usize = 128;

/// Where neither it nor a power of two fits, a side is believed that is a multiple of this: any number of scales may be
/// divided by somehow.
const STEP: usize = 8;

/// The side of blocks of which `count` cover `length`: the usual one if it does, else the power of two that does, else
/// the divisor. `None` if none of them does.
pub(super) fn side(length: usize, count: usize) -> Option<usize> {
    let covers = |side: usize| length.div_ceil(side) == count;
    if length == 0 {
        return (count <= 1).then_some(USUAL);
    }
    if count == 0 || count > length {
        return None;
    }
    // Two powers of two both cover only where one block covers all, or two do; then the larger is as good.
    let largest = if count == 1 { length } else { (length - 1) / (count - 1) };
    let power = 1 << largest.ilog2();
    let divisor = (length / count).is_multiple_of(STEP).then_some(length / count);
    [Some(USUAL), (count == 1).then_some(length), Some(power), divisor]
        .into_iter()
        .flatten()
        .find(|&side| covers(side))
}

/// As [`side`], where groups of `usual` come first.
pub(super) fn group(length: usize, count: usize, usual: usize) -> Option<usize> {
    let fits = length > 0 && length.div_ceil(usual) == count;
    if fits { Some(usual) } else { side(length, count) }
}
