//! Masks over methods: what is kept, taken and mixed, and what no share may be.

use safemerge_fast::kernels::Kernels;
use safemerge_fast::methods::{Masked, Method, Slice, build};
use serde_json::Map;

/// `passthrough` under a mask: kept, shares and the one model are its operands.
fn masked() -> Masked {
    let one = [Map::new()];
    let method = build("passthrough", &Map::new(), &one, false, "t", &[4]).expect("a sound method");
    Masked::over(method)
}

fn blend(kept: &[f32], shares: &[f32], other: &[f32]) -> Result<Vec<f32>, String> {
    let (masked, mut out) = (masked(), vec![0.0; kept.len()]);
    let slice = Slice { operands: &[kept, shares, other], base: None, first: 0 };
    masked.blend(&Kernels::detect(), &masked.start(), &slice, &mut out).map(|()| out)
}

#[test]
fn it_keeps_takes_and_mixes() {
    let found = blend(&[1.0, 1.0, f32::MAX, 2.0], &[0.0, 0.25, 1.0, 1.0], &[9.0, 5.0, 3.0, 0.1]);
    assert_eq!(found, Ok(vec![1.0, 2.0, 3.0, 0.1]));
}

#[test]
fn it_refuses_numbers_that_are_no_shares() {
    for share in [-0.1, 1.1, 255.0, f32::NAN, f32::INFINITY] {
        let problem = blend(&[1.0], &[share], &[2.0]).expect_err("no share");
        assert!(problem.contains("outside of 0 to 1"), "{share}");
    }
}

#[test]
fn what_is_kept_must_be_looked_at_for_nan() {
    assert!(masked().leaves_out());
}
