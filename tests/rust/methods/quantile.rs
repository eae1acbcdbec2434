//! Which elements stay: `ties` and `breadcrumbs` beside a sort of all magnitudes.
//!
//! The passes are driven here, in memory, as the engine drives them: 2048 elements at a time, every n-th of them where
//! a pass asks for a sample.

use proptest::prelude::*;
use safemerge_fast::kernels::Kernels;
use safemerge_fast::methods::{Counts, Method, Slice, Tally, build};
use serde_json::{Map, Value, json};
use std::sync::atomic::{AtomicU32, Ordering};

const SUB_TILE: usize = 2048;
/// From this size on, the first pass counts a sample, one sub-tile in 128.
const SAMPLED: usize = 1 << 20;

struct Outcome {
    values: Vec<f32>,
    /// Passes that were needed.
    passes: usize,
}

/// Merges one model into a base of zeros, so that the task vector is the model itself.
fn drive(method: &dyn Method, model: &[f32]) -> Outcome {
    let kernels = Kernels::detect();
    let zeros = [0.0; SUB_TILE];
    let slice = |first: usize, work: &mut dyn FnMut(&Slice<'_>)| {
        let operand = &model[first..model.len().min(first + SUB_TILE)];
        let base = Some(&zeros[..operand.len()]);
        work(&Slice { operands: &[operand], base, first });
    };
    let mut facts = method.start();
    let mut passes = 0;
    for _ in 0..method.passes() {
        let request = method.request(&facts);
        let mut sums = vec![0.0; request.sums];
        let counts: Vec<AtomicU32> = (0..request.counts).map(|_| AtomicU32::new(0)).collect();
        let mut counting = Counts::new(&counts);
        for first in (0..model.len()).step_by(SUB_TILE * request.stride) {
            slice(first, &mut |slice| {
                let mut tally = Tally { sums: &mut sums, counts: &mut counting };
                method.observe(&kernels, &facts, slice, &mut tally);
            });
        }
        counting.flush();
        let counts: Vec<u32> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let finding = method.conclude(&facts, &sums, &counts).unwrap();
        facts = finding.facts;
        passes += 1;
        if finding.settled {
            break;
        }
    }
    let mut values = vec![0.0; model.len()];
    for first in (0..model.len()).step_by(SUB_TILE) {
        slice(first, &mut |slice| {
            method.blend(&kernels, &facts, slice, &mut values[first..][..slice.len()]).unwrap();
        });
    }
    Outcome { values, passes }
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

/// A share whose floor of `of` is this count.
fn share(count: usize, of: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let share = (count as f64 + 0.5) / of as f64;
    share
}

/// Keeps `kept` elements below the `dropped` largest.
fn band(model: &[f32], dropped: usize, kept: usize) -> Outcome {
    let mut each = json!({"weight": 1.0, "density": share(kept, model.len())});
    let name = if dropped == 0 { "ties" } else { "breadcrumbs" };
    if dropped > 0 {
        each["gamma"] = share(dropped, model.len()).into();
    }
    let method = build(name, &Map::new(), &[object(each)], true, "x", &[model.len()]).unwrap();
    drive(&*method, model)
}

fn magnitude(value: f32) -> u32 {
    value.abs().to_bits()
}

/// How many of the elements with these magnitudes are among the `top` largest, and how many of magnitude `threshold`
/// there are: those above it are, and as many of the equal ones as fit.
struct Top {
    threshold: u32,
    above: usize,
    tied: usize,
}

impl Top {
    fn of(model: &[f32], top: usize) -> Self {
        let mut sorted: Vec<u32> = model.iter().map(|&value| magnitude(value)).collect();
        let (_, &mut threshold, _) = sorted.select_nth_unstable_by(top - 1, |a, b| b.cmp(a));
        let count = |what: &dyn Fn(u32) -> bool| sorted.iter().filter(|&&bits| what(bits)).count();
        Self {
            threshold,
            above: count(&|bits| bits > threshold),
            tied: count(&|bits| bits == threshold),
        }
    }
}

/// Checks what `ties` keeps of the `top` largest; returns the passes it took.
fn check_top(model: &[f32], top: usize) -> Result<usize, TestCaseError> {
    let expected = Top::of(model, top);
    let found = band(model, 0, top);
    let mut ties_kept = 0;
    for (place, (&value, &kept)) in model.iter().zip(&found.values).enumerate() {
        let bits = magnitude(value);
        let stays = kept != 0.0;
        prop_assert!(!stays || kept.to_bits() == value.to_bits(), "{value} became {kept}");
        if bits > expected.threshold {
            prop_assert!(stays, "element {place}, {value}, is above the cut but dropped");
        } else if bits < expected.threshold {
            prop_assert!(!stays, "element {place}, {value}, is below the cut but kept");
        } else {
            ties_kept += usize::from(stays);
        }
    }
    let wanted = top - expected.above;
    if expected.threshold == 0 {
        // Zeros, whether they are kept or not.
    } else if wanted == expected.tied {
        prop_assert_eq!(ties_kept, wanted, "no tie is to be drawn");
    } else {
        check_draw(ties_kept, wanted, expected.tied)?;
    }
    Ok(found.passes)
}

/// Whether a count of elements that are drawn independently is within six deviations of the count wanted.
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn check_draw(found: usize, wanted: usize, of: usize) -> Result<(), TestCaseError> {
    let share = wanted as f64 / of as f64;
    let deviation = (of as f64 * share * (1.0 - share)).sqrt();
    let distance = (found as f64 - wanted as f64).abs();
    prop_assert!(distance <= 6.0 * deviation + 1.0, "{found} of {of} ties kept, not {wanted}");
    Ok(())
}

/// Bit patterns of finite values, and infinities.
fn any_magnitude() -> impl Strategy<Value = u32> {
    0..=0x7F80_0000_u32
}

/// Values of one kind: each is a way to mislead a search by bins.
fn adversarial(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f32>> {
    let of = |magnitudes: BoxedStrategy<u32>| {
        let value = (magnitudes, any::<bool>());
        value.prop_map(|(bits, negative)| f32::from_bits(bits | u32::from(negative) << 31))
    };
    let list =
        |strategy: BoxedStrategy<u32>| prop::collection::vec(of(strategy), length.clone()).boxed();
    let around = any_magnitude().prop_flat_map({
        let length = length.clone();
        move |start| {
            let near = (0_u32..20).prop_map(move |step| (start + step).min(0x7F80_0000));
            prop::collection::vec(of(near.boxed()), length.clone())
        }
    });
    prop_oneof![
        list(any_magnitude().boxed()),
        // Subnormals and zeros of both signs.
        list((0_u32..300).boxed()),
        // A handful of magnitudes, infinity among them.
        list(prop::sample::select(vec![0, 1, 0x3F80_0000, 0x3F80_0001, 0x7F80_0000]).boxed()),
        // All within one bin of the first pass.
        around.boxed(),
        // Sorted.
        list(any_magnitude().boxed()).prop_map(|mut values| {
            values.sort_by(f32::total_cmp);
            values
        }),
        // All equal.
        (any_magnitude(), length.clone())
            .prop_map(|(bits, count)| vec![f32::from_bits(bits); count]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn the_largest_stay(model in adversarial(1..3000), place in any::<prop::sample::Index>()) {
        for top in [1, place.index(model.len()) + 1, model.len().max(2) - 1] {
            check_top(&model, top)?;
        }
    }

    /// Of distinct magnitudes `breadcrumbs` keeps exactly those between two ranks.
    #[test]
    fn a_band_of_ranks_stays(
        mut bits in prop::collection::hash_set(1..=0x7F80_0000_u32, 3..2000),
        first in any::<prop::sample::Index>(),
        second in any::<prop::sample::Index>(),
    ) {
        let model: Vec<f32> = bits.drain().map(f32::from_bits).collect();
        let mut sorted = model.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let dropped = first.index(model.len() - 2) + 1;
        let kept = second.index(model.len() - dropped) + 1;
        let range = sorted[dropped + kept - 1]..=sorted[dropped];
        if kept < model.len() - dropped {
            let found = band(&model, dropped, kept).values;
            for (value, found) in model.iter().zip(found) {
                prop_assert_eq!(found, if range.contains(value) { *value } else { 0.0 });
            }
        }
    }
}

/// A deterministic sequence of well mixed 32-bit words.
fn word(place: usize) -> u32 {
    let mixed = (place as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    u32::try_from(mixed >> 32).unwrap()
}

/// Magnitudes over all exponents, signs mixed.
fn wild(place: usize) -> f32 {
    let word = word(place);
    f32::from_bits((word % 0x7F80_0000) | (word >> 31 << 31))
}

/// About normal values, as weights are.
#[expect(clippy::cast_precision_loss, reason = "16 random bits")]
fn plain(place: usize) -> f32 {
    let part = |shift: u32| (word(8 * place + shift as usize) >> 16) as f32 / 65536.0 - 0.5;
    (0..4).map(part).sum::<f32>() * 0.02
}

/// Whether the first pass sees this element.
fn in_sample(place: usize) -> bool {
    (place / SUB_TILE).is_multiple_of(32)
}

#[test]
fn large_tensors_are_cut_exactly_whatever_the_sample_shows() {
    let length = SAMPLED + 12_345;
    let model = |value: &dyn Fn(usize) -> f32| (0..length).map(value).collect::<Vec<f32>>();
    let bf16 = |value: f32| half::bf16::from_f32(value).to_f32();
    let mut sorted = model(&wild);
    sorted.sort_by(f32::total_cmp);
    let misled_down = model(&|place| wild(place) * if in_sample(place) { 0.0 } else { 1.0 });
    let misled_up = model(&|place| if in_sample(place) { wild(place) } else { plain(place) });
    // A sample that lies far above, or far below, everything else.
    let far_above = model(&|place| if in_sample(place) { 1e30 } else { wild(place) * 1e-10 });
    let far_below = model(&|place| if in_sample(place) { 1e-30 } else { 1.0 + plain(place).abs() });
    let models: [(&str, Vec<f32>, usize); 9] = [
        ("plain", model(&plain), 3),
        ("bf16", model(&|place| bf16(plain(place))), 3),
        ("wild", model(&wild), 3),
        ("sorted", sorted, 4),
        ("zeros in the sample", misled_down, 4),
        ("large in the sample", misled_up, 4),
        ("sample above all", far_above, 4),
        ("sample below all", far_below, 4),
        ("equal", vec![-0.25; length], 2),
    ];
    let mut most = 0;
    for (name, model, passes) in &models {
        for top in [1, length / 5, length / 2, length - 1] {
            let needed = check_top(model, top).unwrap_or_else(|e| panic!("{name}, {top}: {e}"));
            // Next to an end of the order there is no bracket that is closed on both sides.
            let most_needed = if (2..length - 1).contains(&top) { *passes } else { 4 };
            assert!(needed <= most_needed, "{name}, {top}: {needed} passes, not {passes}");
            most = most.max(needed);
        }
    }
    assert_eq!(most, 4, "no sample misled the search");
}

#[test]
fn large_tensors_lose_a_band_exactly() {
    let length = SAMPLED + 77;
    let model: Vec<f32> = (0..length).map(wild).collect();
    let (dropped, kept) = (length / 100, length / 3);
    let [inner, outer] = [dropped, dropped + kept].map(|top| Top::of(&model, top));
    let found = band(&model, dropped, kept).values;
    for (&value, found) in model.iter().zip(found) {
        let bits = magnitude(value);
        if bits != inner.threshold && bits != outer.threshold {
            let stays = bits < inner.threshold && bits > outer.threshold;
            assert_eq!(found, if stays { value } else { 0.0 });
        }
    }
}

#[test]
fn a_tensor_of_ties_keeps_the_wanted_share_in_every_part() {
    // The draw must not favour a place: rows are kept alike.
    let (rows, columns) = (64, 4096);
    for model in [vec![0.5; rows * columns], vec![-3.0e-42; rows * columns]] {
        let found = band(&model, 0, rows * columns / 4).values;
        for row in found.chunks(columns) {
            let kept = row.iter().filter(|&&value| value != 0.0).count();
            check_draw(kept, columns / 4, columns).unwrap();
        }
    }
}
