//! Blocks of differences against conversions by the crate `half` and plain float64 sums.

use crate::fixtures::{Tensor, random_floats, write, write_raw};
use safemerge_fast::checkpoint::Checkpoint;
use safemerge_fast::difference::{Difference, Matrix};
use safemerge_fast::kernels::Kernels;
use safetensors::Dtype;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

const FLOATS: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64];

/// More columns than a tile has, and a divisor of nothing.
const SHAPE: [usize; 2] = [7, 1500];

fn matrix(directory: &Path, name: &str, dtype: Dtype, bytes: Vec<u8>) -> Matrix {
    let path = directory.join(format!("{name}.safetensors"));
    write(&path, &[Tensor::new(name, dtype, &SHAPE, bytes)]);
    Matrix::stored(&Arc::new(Checkpoint::open(&path).unwrap()), name).unwrap()
}

#[expect(clippy::cast_possible_truncation, reason = "doubles are brought to single")]
fn values(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::BF16 => {
            bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
        Dtype::F16 => {
            bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
        }
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        _ => unreachable!("only floats"),
    }
}

fn block(values: &[f32], rows: &Range<usize>, columns: &Range<usize>) -> Vec<f32> {
    rows.clone().flat_map(|row| values[row * SHAPE[1]..][columns.clone()].to_vec()).collect()
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum()
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-13 * expected
}

#[test]
fn blocks_of_every_pair_of_dtypes_are_rounded_once() {
    let directory = tempfile::tempdir().unwrap();
    let blocks = [(0..7, 0..1500), (2..5, 0..1500), (1..6, 3..1499), (6..7, 700..701)];
    for left in FLOATS {
        let left_bytes = random_floats(1, left, SHAPE[0] * SHAPE[1]);
        let minuend = matrix(directory.path(), "left", left, left_bytes.clone());
        for right in FLOATS {
            let right_bytes = random_floats(2, right, SHAPE[0] * SHAPE[1]);
            let subtrahend = matrix(directory.path(), "right", right, right_bytes.clone());
            let difference = Difference::new(&minuend, &subtrahend).unwrap();
            for (rows, columns) in blocks.clone() {
                let x = block(&values(left, &left_bytes), &rows, &columns);
                let y = block(&values(right, &right_bytes), &rows, &columns);
                let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x - y).collect();
                for level in ["scalar", Kernels::detect().level().name()] {
                    let mut out = vec![9.0_f32; expected.len() + 1];
                    let kernels = Kernels::named(level).unwrap();
                    let found =
                        difference.read(&kernels, &rows, &columns, true, &|| false, &mut out);
                    let found = found.unwrap();
                    assert_eq!(out.pop(), Some(9.0), "what lies behind the block stays");
                    assert_eq!(out, expected, "{left:?} - {right:?}, {rows:?} x {columns:?}");
                    assert!(close(found.difference, squares(&expected)));
                    assert!(close(found.minuend, squares(&x)));
                }
            }
        }
    }
}

#[test]
fn squares_of_the_minuend_are_summed_on_request_only_and_nan_shows_in_them() {
    let directory = tempfile::tempdir().unwrap();
    let mut bytes = random_floats(1, Dtype::F32, SHAPE[0] * SHAPE[1]);
    let minuend = matrix(directory.path(), "a", Dtype::F32, bytes.clone());
    bytes[4 * 3000..4 * 3001].copy_from_slice(&f32::NAN.to_le_bytes());
    let subtrahend = matrix(directory.path(), "b", Dtype::F32, bytes);
    let difference = Difference::new(&minuend, &subtrahend).unwrap();
    let mut out = vec![0.0; SHAPE[0] * SHAPE[1]];
    let kernels = Kernels::detect();
    let found = difference.read(&kernels, &(0..7), &(0..1500), false, &|| false, &mut out).unwrap();
    assert!(found.difference.is_nan() && found.minuend == 0.0);
    let found = difference.read(&kernels, &(0..2), &(0..1500), false, &|| false, &mut out).unwrap();
    assert_eq!(found.difference, 0.0);
}

#[test]
fn data_may_start_at_any_byte() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("odd.safetensors");
    let data: Vec<u8> = [3.0_f32, 5.0, 8.0, 1.5].iter().flat_map(|v| v.to_le_bytes()).collect();
    let header = r#"{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]}}"#;
    for pad in 0..4 {
        write_raw(&path, &format!("{header}{}", " ".repeat(pad)), &data);
        let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
        let [a, b] = ["a", "b"].map(|name| Matrix::stored(&checkpoint, name).unwrap());
        let mut out = [0.0; 2];
        let difference = Difference::new(&a, &b).unwrap();
        difference.read(&Kernels::detect(), &(0..1), &(0..2), false, &|| false, &mut out).unwrap();
        assert_eq!(out, [-5.0, 3.5]);
    }
}

#[test]
fn what_cannot_be_read_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let float = |name: &str, shape: &[usize]| {
        let elements: usize = shape.iter().product();
        Tensor::new(name, Dtype::F32, shape, vec![0; 4 * elements])
    };
    let integers = Tensor::new("integers", Dtype::I32, &[2, 3], vec![0; 24]);
    let tensors =
        [float("a", &[2, 3]), float("b", &[3, 2]), float("vector", &[6]), float("none", &[0, 3])];
    write(&path, &[&tensors[..], &[integers]].concat());
    let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
    let open = |name: &str| Matrix::stored(&checkpoint, name);
    for name in ["vector", "integers"] {
        let message = open(name).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("not a matrix of floats"), "{message}");
    }
    assert!(open("c").unwrap_err().to_string().contains("no tensor `c`"));

    let (a, b, none) = (open("a").unwrap(), open("b").unwrap(), open("none").unwrap());
    assert!(Difference::new(&a, &b).unwrap_err().to_string().contains("(2, 3) and (3, 2)"));
    let read = |rows: Range<usize>, columns: Range<usize>, room: usize| {
        let mut out = vec![0.0; room];
        let difference = Difference::new(&a, &a).unwrap();
        difference.read(&Kernels::detect(), &rows, &columns, false, &|| false, &mut out)
    };
    assert!(read(0..2, 0..3, 6).is_ok());
    assert!(read(1..1, 0..3, 0).is_ok());
    assert!(read(0..3, 0..3, 9).unwrap_err().to_string().contains("rows 0 to 3"));
    assert!(read(0..2, 1..4, 9).unwrap_err().to_string().contains("columns 1 to 4"));
    #[expect(clippy::reversed_empty_ranges, reason = "is what is refused")]
    let reversed = read(2..1, 0..3, 9);
    assert!(reversed.unwrap_err().to_string().contains("rows 2 to 1"));
    assert!(read(0..2, 0..3, 5).unwrap_err().to_string().contains("does not fit into 5"));
    let empty = Difference::new(&none, &none).unwrap();
    assert!(empty.read(&Kernels::detect(), &(0..0), &(0..3), true, &|| false, &mut []).is_ok());
}
