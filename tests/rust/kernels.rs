//! Conversions against the crate `half` and the hardware's own casts, and every SIMD level against the scalar one.

use half::{bf16, f16};
use proptest::prelude::*;
use safemerge_fast::dtype::{Float, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use safemerge_fast::kernels::{COLLECT_MARGIN, Kernels, Level};

/// Bit patterns of f32 around every boundary that rounding to 16 bits has, and a stride through all of them.
fn interesting_f32() -> Vec<u32> {
    let mut patterns: Vec<u32> = (0..=u32::MAX).step_by(65_521).collect();
    for upper in 0..=0xFFFF_u32 {
        for lower in [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
            patterns.push(upper << 16 | lower);
        }
    }
    patterns
}

#[test]
fn widening_is_exact_for_all_16_bit_patterns() {
    for bits in 0..=u16::MAX {
        let (ours, theirs) = (bf16_to_f32(bits), bf16::from_bits(bits).to_f32());
        assert!(
            ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
            "bf16 {bits:#x}"
        );
        let (ours, theirs) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
        assert!(
            ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
            "f16 {bits:#x}"
        );
    }
}

#[test]
fn narrowing_rounds_to_nearest_even() {
    for bits in interesting_f32() {
        let value = f32::from_bits(bits);
        let (ours, theirs) = (bf16::from_bits(f32_to_bf16(value)), bf16::from_f32(value));
        assert!(
            ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
            "bf16 {bits:#x}"
        );
        let (ours, theirs) = (f16::from_bits(f32_to_f16(value)), f16::from_f32(value));
        assert!(
            ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
            "f16 {bits:#x}"
        );
    }
}

const FLOATS: [Float; 4] = [Float::BF16, Float::F16, Float::F32, Float::F64];

fn levels() -> Vec<Kernels> {
    Level::available().into_iter().map(|level| Kernels::named(level.name()).unwrap()).collect()
}

fn load(kernels: &Kernels, dtype: Float, bytes: &[u8]) -> Vec<u32> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    kernels.load(dtype, bytes, &mut values);
    values.iter().map(|v: &f32| v.to_bits()).collect()
}

fn store(kernels: &Kernels, dtype: Float, values: &[f32]) -> (Vec<u8>, bool) {
    let mut bytes = vec![0; values.len() * dtype.size()];
    let finite = kernels.store(dtype, values, &mut bytes);
    (bytes, finite)
}

#[test]
fn every_level_loads_all_16_bit_patterns_alike() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let scalar = Kernels::named("scalar").unwrap();
    for kernels in levels() {
        for dtype in [Float::BF16, Float::F16] {
            assert_eq!(
                load(&kernels, dtype, &bytes),
                load(&scalar, dtype, &bytes),
                "{dtype:?}, {kernels:?}"
            );
        }
    }
}

#[test]
fn every_level_stores_alike_nan_payloads_included() {
    let values: Vec<f32> = interesting_f32().into_iter().map(f32::from_bits).collect();
    let scalar = Kernels::named("scalar").unwrap();
    for kernels in levels() {
        for dtype in FLOATS {
            // Through chunks of odd length, so that vector bodies and tails both meet every kind of value.
            for chunk in values.chunks(1021) {
                assert_eq!(
                    store(&kernels, dtype, chunk),
                    store(&scalar, dtype, chunk),
                    "{dtype:?}"
                );
            }
        }
    }
}

#[test]
fn store_reports_what_is_not_finite_after_rounding() {
    let cases = [
        (Float::F16, 65519.996, true),
        (Float::F16, 65520.0, false),
        (Float::F16, -65520.0, false),
        (Float::BF16, f32::from_bits(0x7F7F_7FFF), true),
        (Float::BF16, f32::from_bits(0x7F7F_8000), false),
        (Float::F32, f32::MAX, true),
        (Float::F32, f32::INFINITY, false),
        (Float::F32, f32::NAN, false),
        (Float::F64, f32::NEG_INFINITY, false),
    ];
    for kernels in levels() {
        for (dtype, value, finite) in cases {
            for place in [0, 7, 16] {
                let mut values = vec![1.0; 17];
                values[place] = value;
                assert_eq!(
                    store(&kernels, dtype, &values).1,
                    finite,
                    "{dtype:?} {value} at {place}"
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn multiply_add_rounds_once_at_every_level(
        values in prop::collection::vec((any::<f32>(), any::<f32>()), 0..70),
        weight in any::<f32>(),
    ) {
        let (sums, factors): (Vec<f32>, Vec<f32>) = values.into_iter().unzip();
        let expected: Vec<u32> =
            sums.iter().zip(&factors).map(|(sum, x)| x.mul_add(weight, *sum).to_bits()).collect();
        for kernels in levels() {
            let mut found = sums.clone();
            kernels.multiply_add(&mut found, &factors, weight);
            for (found, expected) in found.iter().zip(&expected) {
                let both_nan = found.is_nan() && f32::from_bits(*expected).is_nan();
                prop_assert!(found.to_bits() == *expected || both_nan);
            }
        }
    }

    #[test]
    fn dot_products_are_summed_in_one_order_at_every_level(
        pairs in prop::collection::vec((any::<f32>(), any::<f32>()), 0..200),
    ) {
        let (left, right): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
        // 32 sums side by side, then from the first to the last.
        let mut sums = [0.0_f64; 32];
        for (place, (x, y)) in left.iter().zip(&right).enumerate() {
            sums[place % 32] += f64::from(*x) * f64::from(*y);
        }
        let expected = sums.iter().fold(0.0, |total, sum| total + sum);
        for kernels in levels() {
            let found = kernels.dot(&left, &right);
            prop_assert_eq!(found.to_bits(), expected.to_bits(), "{:?}", kernels);
        }
    }

    #[test]
    fn dot_is_the_sum_of_the_products(
        values in prop::collection::vec((-1e3_f32..1e3, -1e3_f32..1e3), 0..200),
    ) {
        let (left, right): (Vec<f32>, Vec<f32>) = values.iter().copied().unzip();
        let products: Vec<f64> = values.iter().map(|&(x, y)| f64::from(x) * f64::from(y)).collect();
        let sizes: f64 = products.iter().map(|product| product.abs()).sum();
        // From the last to the first, and no sum is off by more than this.
        let expected: f64 = products.iter().rev().sum();
        for kernels in levels() {
            prop_assert!((kernels.dot(&left, &right) - expected).abs() <= 200.0 * f64::EPSILON * sizes);
        }
    }

    #[test]
    fn weighted_sums_are_fused_and_in_order(
        rows in prop::collection::vec((any::<f32>(), any::<f32>(), any::<f32>()), 0..200),
        weights in (any::<f32>(), any::<f32>(), any::<f32>()),
    ) {
        let columns: [Vec<f32>; 3] = [
            rows.iter().map(|row| row.0).collect(),
            rows.iter().map(|row| row.1).collect(),
            rows.iter().map(|row| row.2).collect(),
        ];
        let operands: Vec<&[f32]> = columns.iter().map(Vec::as_slice).collect();
        let (a, b, c) = weights;
        let expected: Vec<u32> = rows
            .iter()
            .map(|row| row.2.mul_add(c, row.1.mul_add(b, row.0.mul_add(a, 0.0))))
            .map(|sum| if sum.is_nan() { 0 } else { sum.to_bits() })
            .collect();
        for kernels in levels() {
            let mut out = vec![f32::NAN; rows.len()];
            kernels.weighted_sum(&mut out, &operands, &[a, b, c]);
            let bits = |sum: &f32| if sum.is_nan() { 0 } else { sum.to_bits() };
            prop_assert_eq!(out.iter().map(bits).collect::<Vec<_>>(), expected.clone(), "{:?}", kernels);
        }
    }

    #[test]
    fn magnitudes_between_bounds_are_collected_in_order(
        pairs in prop::collection::vec((any::<f32>(), any::<f32>()), 0..100),
        differences in any::<bool>(),
        low in 0_u32..1 << 31,
        width in 0_u32..1 << 31,
    ) {
        let (given, base): (Vec<f32>, Vec<f32>) = pairs.iter().copied().unzip();
        let subtract = |&(value, base): &(f32, f32)| value - base;
        let values = if differences { pairs.iter().map(subtract).collect() } else { given.clone() };
        let base = differences.then_some(&base[..]);
        let bits: Vec<u32> = values.iter().map(|value| value.abs().to_bits()).collect();
        let end = u64::from(low) + u64::from(width);
        let inside = |&bits: &u32| bits >= low && u64::from(bits) < end;
        let expected: Vec<u32> = bits.iter().copied().filter(inside).map(|bits| bits - low).collect();
        let above = bits.iter().filter(|&&bits| u64::from(bits) >= end).count();
        for kernels in levels() {
            let mut found = vec![0; values.len() + COLLECT_MARGIN];
            let (count, higher) = kernels.collect_between(&given, base, low, width, &mut found);
            prop_assert_eq!(&found[..count], &expected[..], "{:?}", kernels);
            prop_assert_eq!(higher as usize, above);
        }
    }

    #[test]
    fn work_of_every_level_gives_the_same_bits(
        values in prop::collection::vec((any::<f32>(), any::<f32>()), 0..100),
    ) {
        // What methods do in `run`: products that are not fused with sums, quotients, choices.
        let work = |kernels: &Kernels| -> Vec<u32> {
            kernels.run(|| {
                let step = |&(x, y): &(f32, f32)| {
                    let sum = x * 0.7 + y * 0.3;
                    let chosen = if sum >= 0.0 { sum / y } else { x - y };
                    if chosen.is_nan() { 0 } else { chosen.to_bits() }
                };
                values.iter().map(step).collect()
            })
        };
        let expected = work(&Kernels::named("scalar").unwrap());
        for kernels in levels() {
            prop_assert_eq!(work(&kernels), expected.clone());
        }
    }

    #[test]
    fn every_level_loads_wide_floats_alike(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let scalar = Kernels::named("scalar").unwrap();
        for kernels in levels() {
            for dtype in FLOATS {
                let whole = &bytes[..bytes.len() / dtype.size() * dtype.size()];
                let (found, expected) = (load(&kernels, dtype, whole), load(&scalar, dtype, whole));
                for (found, expected) in found.iter().zip(&expected) {
                    let both_nan = f32::from_bits(*found).is_nan() && f32::from_bits(*expected).is_nan();
                    prop_assert!(found == expected || both_nan);
                }
            }
        }
    }
}

#[test]
fn an_unknown_level_is_refused_with_those_there_are() {
    let message = Kernels::named("sse9").unwrap_err().to_string();
    assert!(message.contains("sse9") && message.contains("scalar"), "{message}");
}
