//! Bands of quantised matrices against element-by-element formulas, and encoding again what was decoded.

use crate::fixtures::noise;
use safemerge_fast::code::{Code, GlobalScale, ScaleType};
use safemerge_fast::kernels::{Band, Kernels, Level};

fn levels() -> Vec<Kernels> {
    Level::available().into_iter().map(|level| Kernels::named(level.name()).unwrap()).collect()
}

fn band(code: Code, scale_type: ScaleType, rows: usize, columns: usize, block: usize) -> Band {
    Band { code, scale_type: Some(scale_type), rows, columns, block }
}

/// Values without pattern, of this many rows; the size varies from block to block.
fn values(seed: u64, rows: usize, columns: usize) -> Vec<f32> {
    let bytes = noise(seed, 2 * rows * columns);
    let number = |pair: &[u8; 2]| f32::from(i16::from_le_bytes(*pair)) / 65536.0;
    let pairs = bytes.as_chunks().0.iter().enumerate();
    pairs
        .map(|(place, pair)| number(pair) * ([1.0, 2.0, 0.3, 5.0, 0.01, 1.5, 7.0][place / 50 % 7]))
        .collect()
}

struct Encoded {
    codes: Vec<u8>,
    scales: Vec<u8>,
    factors: Vec<f32>,
}

fn encode(band: &Band, kernels: &Kernels, values: &[f32], global: Option<GlobalScale>) -> Encoded {
    let mut encoded = Encoded {
        codes: vec![0; band.row_bytes() * values.len() / band.columns],
        scales: vec![0; band.scale_bytes()],
        factors: vec![0.0; band.scales()],
    };
    let Encoded { codes, scales, factors } = &mut encoded;
    band.encode(kernels, values, global, factors, codes, scales);
    encoded
}

fn decode(
    band: &Band,
    kernels: &Kernels,
    encoded: &Encoded,
    global: Option<GlobalScale>,
) -> Vec<f32> {
    let mut factors = vec![0.0; band.scales()];
    band.factors(kernels, &encoded.scales, global, &mut factors);
    let mut out = vec![f32::NAN; encoded.codes.len() / band.row_bytes() * band.columns];
    band.decode(kernels, &encoded.codes, &factors, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Code, scale, rows, columns, block, global scale.
fn bands() -> Vec<(Band, usize, Option<GlobalScale>)> {
    let multiplies = GlobalScale { value: 0.0021, divides: false };
    let divides = GlobalScale { value: 1100.0, divides: true };
    vec![
        (band(Code::E4M3, ScaleType::F32, 128, 300, 128), 128, None),
        (band(Code::E4M3, ScaleType::F32, 128, 576, 128), 64, None),
        (band(Code::E4M3, ScaleType::BF16, 1, 100, 100), 1, None),
        (band(Code::E5M2, ScaleType::F16, 40, 96, 96), 40, None),
        (band(Code::E4M3, ScaleType::E8M0, 1, 160, 32), 1, None),
        (band(Code::E2M1, ScaleType::E8M0, 1, 160, 32), 1, None),
        (band(Code::Int4, ScaleType::BF16, 1, 256, 32), 1, None),
        (band(Code::Int4, ScaleType::F16, 1, 256, 128), 1, None),
        (band(Code::E2M1, ScaleType::E4M3, 1, 144, 16), 1, Some(multiplies)),
        (band(Code::E2M1, ScaleType::E4M3, 1, 144, 16), 1, Some(divides)),
    ]
}

#[test]
fn what_is_encoded_is_within_half_a_step_of_the_values() {
    for (band, rows, global) in bands() {
        let values = values(1, rows, band.columns);
        for kernels in levels() {
            let encoded = encode(&band, &kernels, &values, global);
            let decoded = decode(&band, &kernels, &encoded, global);
            for (place, (value, found)) in values.iter().zip(&decoded).enumerate() {
                let factor = encoded.factors[place % band.columns / band.block];
                let scaled = (value / factor).abs();
                // The spacing of the codes just there, in units of the factor; what is beyond the largest is clipped.
                let step = match band.code {
                    Code::E4M3 => (scaled.log2().floor().max(-6.0) - 3.0).exp2(),
                    Code::E5M2 => (scaled.log2().floor().max(-14.0) - 2.0).exp2(),
                    Code::E2M1 => (scaled.log2().floor().max(0.0) - 1.0).exp2(),
                    Code::Int4 => 1.0,
                };
                let clipped = (scaled - band.code.most()).max(0.0);
                let most = (step / 2.0).max(clipped) * factor * 1.0001;
                assert!((value - found).abs() <= most, "{band:?} {place}: {value} {found}");
            }
        }
    }
}

#[test]
fn every_level_encodes_and_decodes_alike() {
    let scalar = Kernels::named("scalar").unwrap();
    for (band, rows, global) in bands() {
        let values = values(2, rows, band.columns);
        let expected = encode(&band, &scalar, &values, global);
        for kernels in levels() {
            let found = encode(&band, &kernels, &values, global);
            assert_eq!((&found.codes, &found.scales), (&expected.codes, &expected.scales));
            let decoded = decode(&band, &kernels, &found, global);
            assert_eq!(bits(&decoded), bits(&decode(&band, &scalar, &expected, global)));
        }
    }
}

#[test]
fn four_bit_integers_that_were_decoded_are_encoded_to_the_same_bytes() {
    for (scale_type, block) in [(ScaleType::BF16, 32), (ScaleType::F16, 128)] {
        let band = band(Code::Int4, scale_type, 1, 512, block);
        for seed in 0..50 {
            // Any codes from -7 to 7 whose largest is 7, or -7, as an encoder makes them.
            let mut nibbles: Vec<u8> = noise(seed, 512).iter().map(|byte| 1 + byte % 15).collect();
            for (group, codes) in nibbles.chunks_mut(block).enumerate() {
                codes[group % block] = if seed % 2 == 0 { 15 } else { 1 };
            }
            let codes: Vec<u8> =
                nibbles.as_chunks::<2>().0.iter().map(|[a, b]| a | (b << 4)).collect();
            let scales: Vec<u8> = noise(seed + 100, 512 / block)
                .iter()
                .flat_map(|&byte| {
                    let value = f32::from(byte) / 4096.0 + 0.001;
                    match scale_type {
                        ScaleType::BF16 => half::bf16::from_f32(value).to_le_bytes(),
                        _ => half::f16::from_f32(value).to_le_bytes(),
                    }
                })
                .collect();
            let stored = Encoded { codes, scales, factors: Vec::new() };
            for kernels in levels() {
                let decoded = decode(&band, &kernels, &stored, None);
                let again = encode(&band, &kernels, &decoded, None);
                assert_eq!((&again.codes, &again.scales), (&stored.codes, &stored.scales));
            }
        }
    }
}

#[test]
fn what_was_decoded_is_encoded_to_the_same_values() {
    // Powers of two as scales change with the largest code that a group has, but no value does.
    for (band, rows, global) in bands() {
        if band.scale_type == Some(ScaleType::F32) || band.scales() == 1 {
            continue;
        }
        let kernels = Kernels::detect();
        let first = decode(
            &band,
            &kernels,
            &encode(&band, &kernels, &values(3, rows, band.columns), global),
            global,
        );
        let second = decode(&band, &kernels, &encode(&band, &kernels, &first, global), global);
        assert_eq!(bits(&first), bits(&second), "{band:?}");
    }
}

#[test]
fn parts_of_rows_are_decoded_as_the_rows_are() {
    for (band, _, global) in bands() {
        let kernels = Kernels::detect();
        let values = values(4, 1, band.columns);
        let encoded = encode(&band, &kernels, &values, global);
        let whole = decode(&band, &kernels, &encoded, global);
        for (start, stop) in [(0, 1), (1, 2), (15, 18), (31, 96), (33, band.columns), (0, 90)] {
            let mut part = vec![0.0; stop - start];
            let codes = &encoded.codes[start / band.code.per_byte()..];
            band.decode_part(&kernels, codes, start, &encoded.factors, &mut part);
            assert_eq!(bits(&part), bits(&whole[start..stop]), "{band:?} {start}..{stop}");
        }
    }
}

#[test]
fn codes_without_scales_are_numbers_by_themselves() {
    let band = Band { code: Code::E4M3, scale_type: None, rows: 1, columns: 256, block: 256 };
    assert_eq!((band.scales(), band.scale_bytes(), band.row_bytes()), (0, 0, 256));
    // All but the two NaN.
    let codes: Vec<u8> = (0..=255).map(|code| if code % 128 == 127 { 0 } else { code }).collect();
    let stored = Encoded { codes, scales: Vec::new(), factors: Vec::new() };
    for kernels in levels() {
        let decoded = decode(&band, &kernels, &stored, None);
        assert_eq!(encode(&band, &kernels, &decoded, None).codes, stored.codes);
    }
}
