//! The random numbers against a second implementation, which is itself checked with the known answers of Random123.

use proptest::prelude::*;
use safemerge_fast::methods::uniforms;

/// Philox4x32-10 word by word, as the paper's figure has it.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let product = |multiplier: u64, word: u32| {
            let product = multiplier * u64::from(word);
            (u32::try_from(product >> 32).unwrap(), u32::try_from(product & 0xFFFF_FFFF).unwrap())
        };
        let (high0, low0) = product(0xD251_1F53, counter[0]);
        let (high1, low1) = product(0xCD9E_8D57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
    }
    counter
}

/// The number of one element, as `uniforms` documents it.
fn number(key: [u32; 2], stream: u32, element: usize) -> u32 {
    let block = (element / 4) as u64;
    let [low, high] = [block & 0xFFFF_FFFF, block >> 32].map(|half| u32::try_from(half).unwrap());
    philox([low, high, stream, 0], key)[element % 4]
}

#[test]
fn known_answers_of_random123() {
    let zeros = [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8];
    assert_eq!(philox([0; 4], [0; 2]), zeros);
    assert_eq!(
        philox([u32::MAX; 4], [u32::MAX; 2]),
        [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]
    );
    assert_eq!(
        philox([0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344], [0xA409_3822, 0x299F_31D0]),
        [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]
    );
    // The one vector that the engine's counters can reach.
    let mut found = [0; 4];
    uniforms([0; 2], 0, 0, &mut found);
    assert_eq!(found, zeros);
}

#[test]
fn consecutive_elements_cross_the_counter_s_halves() {
    // Around the first element whose block number needs 33 bits.
    let first = (1_usize << 34) - 70;
    let mut found = vec![0; 200];
    uniforms([7, 8], 9, first, &mut found);
    for (place, &found) in found.iter().enumerate() {
        assert_eq!(found, number([7, 8], 9, first + place));
    }
}

proptest! {
    #[test]
    fn numbers_are_those_of_the_counters(
        key in any::<[u32; 2]>(), stream in any::<u32>(), first in 0_usize..1 << 50, length in 0_usize..300,
    ) {
        let mut found = vec![0; length];
        uniforms(key, stream, first, &mut found);
        for (place, &found) in found.iter().enumerate() {
            prop_assert_eq!(found, number(key, stream, first + place));
        }
    }

    #[test]
    fn any_cut_gives_the_same_numbers(
        key in any::<[u32; 2]>(),
        first in 0_usize..1 << 40,
        cuts in prop::collection::vec(0_usize..150, 1..9),
    ) {
        let mut whole = vec![0; cuts.iter().sum()];
        uniforms(key, 2, first, &mut whole);
        let mut done = 0;
        for length in cuts {
            let mut part = vec![0; length];
            uniforms(key, 2, first + done, &mut part);
            prop_assert_eq!(&part, &whole[done..done + length]);
            done += length;
        }
    }
}
