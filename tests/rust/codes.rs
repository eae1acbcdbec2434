//! Codes of 8 and 4 bits against formulas in f64 and a search for the nearest, and every SIMD level against the scalar one.

use crate::fixtures::noise;
use safemerge_fast::code::{Code, GlobalScale, ScaleType, e2m1_to_f32, scale_of};
use safemerge_fast::dtype::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use safemerge_fast::kernels::{Groups, Kernels, Level};

const CODES: [Code; 4] = [Code::E4M3, Code::E5M2, Code::E2M1, Code::Int4];

fn levels() -> Vec<Kernels> {
    Level::available().into_iter().map(|level| Kernels::named(level.name()).unwrap()).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to nearest is meant")]
fn single(value: f64) -> f32 {
    value as f32
}

fn count(code: Code) -> u32 {
    1 << code.bits()
}

/// The number of a code as the formats are defined: sign, exponent, mantissa.
fn defined(code: Code, bits: u32) -> f64 {
    let float = |exponent_bits: i32, mantissa_bits: i32| {
        let sign = if bits >> (exponent_bits + mantissa_bits) == 1 { -1.0 } else { 1.0 };
        let exponent = i32::try_from(bits >> mantissa_bits).unwrap() & ((1 << exponent_bits) - 1);
        let mantissa = f64::from(bits & ((1 << mantissa_bits) - 1)) / 2_f64.powi(mantissa_bits);
        let bias = (1 << (exponent_bits - 1)) - 1;
        match exponent {
            0 => sign * mantissa * 2_f64.powi(1 - bias),
            _ => sign * (1.0 + mantissa) * 2_f64.powi(exponent - bias),
        }
    };
    match code {
        Code::E4M3 if bits & 0x7F == 0x7F => f64::NAN,
        Code::E4M3 => float(4, 3),
        Code::E5M2 if bits & 0x7F == 0x7C => f64::INFINITY * if bits > 0x7F { -1.0 } else { 1.0 },
        Code::E5M2 if bits & 0x7C == 0x7C => f64::NAN,
        Code::E5M2 => float(5, 2),
        Code::E2M1 => float(2, 1),
        Code::Int4 => f64::from(bits) - 8.0,
    }
}

/// Bytes of all codes, in order.
fn all_codes(code: Code) -> Vec<u8> {
    match code.bits() {
        8 => (0..=u8::MAX).collect(),
        _ => (0..8).map(|pair| (2 * pair) | ((2 * pair + 1) << 4)).collect(),
    }
}

#[test]
fn every_code_is_the_number_that_its_format_defines() {
    for code in CODES {
        for kernels in levels() {
            let mut values = vec![0.0; count(code) as usize];
            kernels.decode(code, &all_codes(code), 0, None, &mut values);
            for (bits, &value) in (0..).zip(&values) {
                let expected = defined(code, bits);
                let same = f64::from(value) == expected || (value.is_nan() && expected.is_nan());
                let sign = value.is_sign_negative() == expected.is_sign_negative();
                assert!(same && (sign || value.is_nan()), "{code:?} {bits:#x}: {value} {expected}");
            }
        }
    }
}

#[test]
fn decoding_starts_at_any_element() {
    for code in CODES {
        let bytes = noise(3, 80);
        for kernels in levels() {
            let mut all = vec![0.0; bytes.len() * 8 / code.bits()];
            kernels.decode(code, &bytes, 0, None, &mut all);
            for (first, length) in [(1, 70), (2, 1), (3, 0), (7, 33), (0, 79), (5, 64)] {
                let mut part = vec![0.0; length];
                kernels.decode(code, &bytes, first, None, &mut part);
                let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&part), bits(&all[first..first + length]), "{code:?} {first}");
            }
        }
    }
}

/// The code of the number nearest to a value; of two the one with an even mantissa.
fn nearest(code: Code, value: f32) -> u32 {
    let value = f64::from(value).clamp(-f64::from(code.most()), f64::from(code.most()));
    let usable = |&bits: &u32| {
        let number = defined(code, bits);
        let sign = code == Code::Int4 || number.is_sign_negative() == value.is_sign_negative();
        number.abs() <= f64::from(code.most()) && sign
    };
    let distance = |bits: &u32| (defined(code, *bits) - value).abs();
    let odd = |bits: &u32| bits & 1;
    (0..count(code))
        .filter(usable)
        .min_by(|a, b| distance(a).total_cmp(&distance(b)).then(odd(a).cmp(&odd(b))))
        .unwrap()
}

/// Values around everything that rounding turns on.
fn interesting(code: Code) -> Vec<f32> {
    let numbers: Vec<f32> = (0..count(code))
        .map(|bits| defined(code, bits))
        .filter(|number| number.is_finite())
        .map(|number| format!("{number:e}").parse().unwrap())
        .collect();
    let mut sorted = numbers.clone();
    sorted.sort_by(f32::total_cmp);
    let middles = sorted.windows(2).map(|pair| f32::midpoint(pair[0], pair[1]));
    let mut values: Vec<f32> = numbers.iter().copied().chain(middles).collect();
    values.extend([448.0, 464.0, 480.0, 6.5, 7.5, 8.0, 1e9, f32::MAX, 57344.0, 61440.0, 65536.0]);
    values.extend([f32::MIN_POSITIVE, 1e-40, 1e-9, 2_f32.powi(-10), 2_f32.powi(-17)]);
    let around: Vec<f32> = values.iter().flat_map(|v| [v.next_up(), v.next_down(), *v]).collect();
    let random = noise(5, 40_000);
    let random = random.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four));
    let mut all: Vec<f32> = around.iter().flat_map(|v| [*v, -v]).chain(random).collect();
    all.retain(|value| value.is_finite());
    all.truncate(all.len() / 2 * 2);
    all
}

#[test]
fn encoding_gives_the_nearest_code_and_the_even_one_of_two() {
    for code in CODES {
        let values = interesting(code);
        for kernels in levels() {
            let mut bytes = vec![0; code.bytes(values.len())];
            kernels.encode(code, &values, None, &mut bytes);
            for (place, &value) in values.iter().enumerate() {
                let byte = u32::from(bytes[place / code.per_byte()]);
                let found = if code.bits() == 8 { byte } else { (byte >> (place % 2 * 4)) & 15 };
                assert_eq!(found, nearest(code, value), "{code:?} of {value:e}, {kernels:?}");
            }
        }
    }
}

/// Factors without pattern, of every size that a number may have.
fn factors(count: usize) -> Vec<f32> {
    (1..).map(|place: i16| f32::from(place) / 3.0).take(count).collect()
}

#[test]
fn groups_are_decoded_and_scaled_by_one_rounding() {
    for code in CODES {
        let bytes = noise(3, 500);
        for kernels in levels() {
            for (start, length, columns) in
                [(0, 300, 128), (0, 300, 32), (40, 333, 128), (7, 90, 16), (5, 3, 64), (0, 1, 2)]
            {
                let head = columns - start % columns;
                let count = 1 + usize::saturating_sub(length, head).div_ceil(columns);
                let factors = factors(count);
                let groups = Groups { factors: &factors, first: head, columns };
                let (mut plain, mut scaled) = (vec![0.0; length], vec![0.0; length]);
                kernels.decode(code, &bytes, start, None, &mut plain);
                kernels.decode(code, &bytes, start, Some(&groups), &mut scaled);
                for (place, (plain, scaled)) in plain.iter().zip(&scaled).enumerate() {
                    let factor = factors[(start % columns + place) / columns];
                    let expected = plain * factor;
                    assert!(
                        scaled.to_bits() == expected.to_bits()
                            || (scaled.is_nan() && expected.is_nan()),
                        "{code:?} {start} {place}: {scaled} {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn groups_are_divided_by_one_rounding_and_encoded() {
    for code in CODES {
        let values = interesting(code);
        let values = &values[..2048];
        for kernels in levels() {
            for columns in [2, 6, 16, 32, 128, 300, 5000] {
                let factors = factors(values.len().div_ceil(columns));
                let groups = Groups { factors: &factors, first: columns, columns };
                let divided: Vec<f32> = (0..)
                    .zip(values)
                    .map(|(place, value)| value / factors[place / columns])
                    .collect();
                let mut found = vec![0; code.bytes(values.len())];
                let mut expected = found.clone();
                kernels.encode(code, values, Some(&groups), &mut found);
                kernels.encode(code, &divided, None, &mut expected);
                assert_eq!(found, expected, "{code:?}, {columns}, {kernels:?}");
            }
        }
    }
}

#[test]
fn the_largest_magnitude_is_found_and_nan_is_not_lost() {
    for kernels in levels() {
        assert_eq!(kernels.amax(&[]), 0.0);
        let mut values = vec![0.5_f32; 1003];
        values[777] = -3.0;
        assert_eq!(kernels.amax(&values), 3.0);
        values[1002] = f32::NAN;
        assert!(kernels.amax(&values).is_nan());
    }
}

#[test]
fn a_power_of_two_is_read_as_one() {
    for byte in 0..=u8::MAX {
        let expected = 2_f64.powi(i32::from(byte) - 127);
        let found = ScaleType::E8M0.load(&[byte]);
        assert!(if byte == 255 { found.is_nan() } else { f64::from(found) == expected }, "{byte}");
    }
}

/// Magnitudes that blocks may have as their largest.
fn magnitudes() -> impl Iterator<Item = f32> {
    let random = noise(9, 8000)
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b).abs())
        .collect::<Vec<_>>();
    let powers =
        (-149..128).map(|e| 2_f64.powi(e)).map(|v| format!("{v:e}").parse::<f32>().unwrap());
    let near: Vec<f32> =
        powers.flat_map(|v| [v, v * 1.75, v * 1.5, v.next_up(), v.next_down()]).collect();
    near.into_iter().chain(random).filter(|v| v.is_finite() && *v > 0.0)
}

#[test]
fn powers_of_two_follow_their_rules() {
    for amax in magnitudes() {
        let log = |byte: u8| i32::from(byte) - 127;
        for (code, most) in [(Code::E4M3, 448.0), (Code::E5M2, 57344.0)] {
            let exponent = log(scale_of(code, ScaleType::E8M0, amax, None).bytes[0]);
            let fits = |exponent| f64::from(amax) <= most * 2_f64.powi(exponent);
            assert!(fits(exponent) || exponent == 127, "{amax:e}");
            assert!(exponent == -127 || !fits(exponent - 1), "{amax:e}");
        }
        let scale = scale_of(Code::E2M1, ScaleType::E8M0, amax, None);
        let exponent = log(scale.bytes[0]);
        let fits = |exponent| f64::from(amax) <= 7.0 * 2_f64.powi(exponent);
        assert!(fits(exponent), "{amax:e}");
        assert!(exponent == -127 || !fits(exponent - 1), "{amax:e}");
        assert_eq!(f64::from(scale.factor), 2_f64.powi(exponent));
    }
}

#[test]
fn other_scales_are_the_largest_magnitude_over_the_largest_code() {
    for amax in magnitudes() {
        let expected = single(f64::from(amax) / 448.0);
        let scale = scale_of(Code::E4M3, ScaleType::F32, amax, None);
        assert_eq!(scale.factor, expected.max(f32::from_bits(1)));
        assert_eq!(scale.bytes, scale.factor.to_le_bytes());
        let sevenths = single(f64::from(amax) / 7.0);
        let scale = scale_of(Code::Int4, ScaleType::BF16, amax, None);
        assert_eq!(scale.factor, half::bf16::from_f32(sevenths).to_f32().max(bf16_to_f32(1)));
        let scale = scale_of(Code::Int4, ScaleType::F16, amax, None);
        let expected = half::f16::from_f32(sevenths).to_f32().clamp(f16_to_f32(1), 65504.0);
        assert_eq!(scale.factor, expected);
    }
}

#[test]
fn scales_of_nvfp4_are_relative_to_the_global_one() {
    for (value, divides) in [(0.003_f32, false), (411.7, true)] {
        let global = GlobalScale { value, divides };
        let share = if divides { 1.0 / f64::from(value) } else { f64::from(value) };
        for amax in [1e-9_f32, 0.001, 0.02, 0.7, 1.0, 4.2, 1e6] {
            let scale = scale_of(Code::E2M1, ScaleType::E4M3, amax, Some(global));
            let wanted = f64::from(amax) / 6.0 / share;
            let stored = u8::try_from(nearest(Code::E4M3, single(wanted))).unwrap().max(1);
            assert_eq!(scale.bytes[0], stored, "{amax}");
            let factor = defined(Code::E4M3, u32::from(stored)) * share;
            assert!((f64::from(scale.factor) / factor - 1.0).abs() < 2e-7);
        }
    }
}

#[test]
fn blocks_of_zeros_have_the_scale_one() {
    let pairs = [
        (Code::E4M3, ScaleType::F32),
        (Code::E4M3, ScaleType::BF16),
        (Code::E5M2, ScaleType::F16),
        (Code::E4M3, ScaleType::E8M0),
        (Code::E2M1, ScaleType::E8M0),
        (Code::E2M1, ScaleType::E4M3),
        (Code::Int4, ScaleType::BF16),
    ];
    for (code, scale_type) in pairs {
        assert_eq!(scale_of(code, scale_type, 0.0, None).factor, 1.0, "{code:?} {scale_type:?}");
    }
    assert_eq!(f32_to_bf16(1.0), 0x3F80);
    assert_eq!(f32_to_f16(1.0), 0x3C00);
    assert_eq!(e2m1_to_f32(2), 1.0);
}
