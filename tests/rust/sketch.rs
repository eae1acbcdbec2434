//! Thin products of every level against the scalar ones bit by bit, and moments against plain float64 products.

use crate::fixtures::{Tensor, write};
use safemerge_fast::Error;
use safemerge_fast::checkpoint::Checkpoint;
use safemerge_fast::difference::Matrix;
use safemerge_fast::kernels::{Kernels, Level, Models, Sums, Thin};
use safemerge_fast::sketch::{Images, Module, Moments, images, measure, normals};
use safetensors::Dtype;
use std::path::Path;
use std::sync::Arc;

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    normals(seed, 77, &mut values);
    values
}

#[test]
fn thin_products_have_the_same_bits_at_every_level() {
    let (rows, columns, terms) = (21, 19, 37);
    for columns in [1, 7, 8, 16, columns, 32, 48, 64, 112] {
        for transposed in [false, true] {
            let left = random(1, rows * terms);
            let right = random(2, terms * columns);
            let start = random(3, rows * columns);
            let (row_step, term_step) = if transposed { (1, rows) } else { (terms, 1) };
            let results = Level::available().into_iter().map(|level| {
                let mut out = start.clone();
                Kernels::named(level.name()).unwrap().add_thin(&mut Thin {
                    left: &left,
                    row_step,
                    term_step,
                    right: &right,
                    right_step: columns,
                    out: &mut out,
                    out_step: columns,
                    rows,
                    columns,
                    terms,
                });
                out
            });
            let mut expected = start.clone();
            for i in 0..rows {
                for j in 0..columns {
                    for t in 0..terms {
                        let sum = &mut expected[i * columns + j];
                        *sum = left[i * row_step + t * term_step]
                            .mul_add(right[t * columns + j], *sum);
                    }
                }
            }
            for found in results {
                assert_eq!(found, expected, "{columns} columns, transposed: {transposed}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "reaches beyond")]
fn a_thin_product_beyond_its_matrices_is_refused() {
    let (left, right, mut out) = (vec![0.0; 12], vec![0.0; 11], vec![0.0; 12]);
    Kernels::detect().add_thin(&mut Thin {
        left: &left,
        row_step: 4,
        term_step: 1,
        right: &right,
        right_step: 4,
        out: &mut out,
        out_step: 4,
        rows: 3,
        columns: 4,
        terms: 3 + 1,
    });
}

#[test]
fn updates_and_their_sums_are_the_same_at_every_level() {
    for count in [1, 15, 16, 100, 1024] {
        let [base, aligned, finetuned] = [1, 2, 3].map(|seed| random(seed, count));
        for against_base in [false, true] {
            let models =
                Models { base: &base, aligned: &aligned, finetuned: &finetuned, against_base };
            let mut all = Vec::new();
            for level in Level::available() {
                let (mut v, mut delta) = (vec![0.0; count], vec![0.0; count]);
                let mut sums = Sums::default();
                let kernels = Kernels::named(level.name()).unwrap();
                kernels.updates(&models, &mut v, &mut delta, Some(&mut sums));
                let (mut again, mut more) = (vec![0.0; count], vec![0.0; count]);
                kernels.updates(&models, &mut again, &mut more, None);
                assert_eq!((&v, &delta), (&again, &more));
                all.push((v, delta, sums));
            }
            let reference = if against_base { &base } else { &aligned };
            for (v, delta, sums) in &all {
                assert_eq!(v, &pairs(&aligned, &base, |x, y| x - y));
                assert_eq!(delta, &pairs(&finetuned, reference, |x, y| x - y));
                assert_eq!(*sums, all[0].2);
                close(sums.v, inner(v, v), 1e-6);
                close(sums.delta, inner(delta, delta), 1e-6);
                close(sums.weight, inner(&aligned, &aligned), 1e-6);
                assert!(
                    (sums.inner - inner(v, delta)).abs() <= 1e-6 * (sums.v * sums.delta).sqrt()
                );
            }
        }
    }
}

fn pairs(left: &[f32], right: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    left.iter().zip(right).map(|(&x, &y)| f(x, y)).collect()
}

fn inner(left: &[f32], right: &[f32]) -> f64 {
    left.iter().zip(right).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

fn close(found: f64, expected: f64, within: f64) {
    assert!((found - expected).abs() <= within * expected.abs(), "{found} {expected}");
}

#[test]
fn normal_numbers_are_normal_and_depend_on_seed_and_stream() {
    let mut numbers = vec![0.0; 1 << 20];
    normals(5, 1, &mut numbers);
    let count = f64::from(1 << 20);
    let moment = |power: i32| {
        numbers.iter().map(|&number| f64::from(number).powi(power)).sum::<f64>() / count
    };
    // Five standard deviations of each.
    for (power, mean, deviation) in [(1, 0.0, 1.0), (2, 1.0, 1.42), (3, 0.0, 3.9), (4, 3.0, 9.8)] {
        assert!((moment(power) - mean).abs() < 5.0 * deviation / count.sqrt(), "{power}");
    }
    let neighbours: f64 =
        numbers.windows(2).map(|pair| f64::from(pair[0]) * f64::from(pair[1])).sum::<f64>() / count;
    assert!(neighbours.abs() < 5.0 / count.sqrt());
    let mut first = vec![0.0; 1001];
    normals(5, 1, &mut first);
    assert_eq!(first, numbers[..1001], "a number depends on its index alone");
    for (seed, stream) in [(6, 1), (5, 2), (5 + (1 << 32), 1)] {
        let mut other = vec![0.0; 1001];
        normals(seed, stream, &mut other);
        assert!(first.iter().zip(&other).filter(|(x, y)| x == y).count() < 3);
    }
}

/// A matrix in float64, row by row.
#[derive(Clone)]
struct Dense {
    rows: usize,
    columns: usize,
    values: Vec<f64>,
}

impl Dense {
    fn new(rows: usize, columns: usize, values: impl Iterator<Item = f64>) -> Self {
        Self { rows, columns, values: values.collect() }
    }

    fn transpose(&self) -> Self {
        let entries =
            (0..self.columns).flat_map(|j| (0..self.rows).map(move |i| i * self.columns + j));
        Self::new(self.columns, self.rows, entries.map(|at| self.values[at]))
    }

    fn times(&self, other: &Self) -> Self {
        let mut out = vec![0.0; self.rows * other.columns];
        for i in 0..self.rows {
            for k in 0..self.columns {
                let x = self.values[i * self.columns + k];
                for j in 0..other.columns {
                    out[i * other.columns + j] += x * other.values[k * other.columns + j];
                }
            }
        }
        Self { rows: self.rows, columns: other.columns, values: out }
    }

    fn gram(&self) -> Vec<f64> {
        self.transpose().times(self).values
    }

    fn beside(&self, other: &Self) -> Self {
        let rows = (0..self.rows).flat_map(|i| {
            let own = self.values[i * self.columns..(i + 1) * self.columns].iter();
            own.chain(&other.values[i * other.columns..(i + 1) * other.columns])
        });
        Self::new(self.rows, self.columns + other.columns, rows.copied())
    }
}

fn matrix(directory: &Path, name: &str, shape: [usize; 2], values: &[f32]) -> Arc<Matrix> {
    let path = directory.join(format!("{name}.safetensors"));
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    write(&path, &[Tensor::new(name, Dtype::F32, &shape, bytes)]);
    Arc::new(Matrix::stored(&Arc::new(Checkpoint::open(&path).unwrap()), name).unwrap())
}

/// Compares Gram matrices entry by entry, relative to the lengths of the two columns.
fn same_gram(found: &[f64], expected: &[f64], width: usize) {
    assert_eq!(found.len(), width * width);
    for i in 0..width {
        for j in 0..width {
            let at = i * width + j;
            let size = (expected[i * width + i] * expected[j * width + j]).sqrt();
            assert!((found[at] - expected[at]).abs() <= 3e-6 * size, "({i}, {j}) of {width}");
        }
    }
}

#[test]
fn moments_are_those_of_dense_products() {
    let directory = tempfile::tempdir().unwrap();
    let (k, p) = (5, 3);
    // More columns than a chunk, more rows than a block; the reverse; and sizes that divide nothing.
    for (d_out, d_in) in [(70, 1100), (1300, 40), (1, 9), (33, 257)] {
        for transposed in [false, true] {
            for (against_base, scale) in [(false, 1.0_f32), (true, 1e-12), (false, 1e9)] {
                let stored = if transposed { [d_in, d_out] } else { [d_out, d_in] };
                let [base, aligned, finetuned] = [1, 2, 3].map(|seed| -> Vec<f32> {
                    random(seed, d_out * d_in).iter().map(|x| x * scale).collect()
                });
                let module = Module {
                    base: matrix(directory.path(), "base", stored, &base),
                    aligned: matrix(directory.path(), "aligned", stored, &aligned),
                    finetuned: Some(matrix(directory.path(), "finetuned", stored, &finetuned)),
                    against_base,
                    transposed,
                };
                let difference = |left: &[f32], right: &[f32]| {
                    let values = left.iter().zip(right).map(|(x, y)| f64::from(x - y));
                    let dense = Dense::new(stored[0], stored[1], values);
                    if transposed { dense.transpose() } else { dense }
                };
                let v = difference(&aligned, &base);
                let delta = difference(&finetuned, if against_base { &base } else { &aligned });
                let factors = random(9, d_in * (k + p));
                let part = |columns: std::ops::Range<usize>| {
                    let rows = (0..d_in).flat_map(|j| {
                        factors[j * (k + p)..][columns.clone()].iter().map(|&x| f64::from(x))
                    });
                    Dense::new(d_in, columns.len(), rows)
                };
                let y = delta.times(&part(0..k)).beside(&v.times(&part(k..k + p)));
                let z = v.transpose().times(&y);
                let x = v.times(&z);
                let last = Dense::new(
                    d_out,
                    p,
                    (0..d_out).flat_map(|i| x.values[i * (k + p) + k..(i + 1) * (k + p)].to_vec()),
                );
                let r = delta.transpose().times(&last);
                let levels = Level::available();
                let found: Vec<Moments> = levels
                    .iter()
                    .map(|level| {
                        let kernels = Kernels::named(level.name()).unwrap();
                        measure(&module, kernels, &factors, k, p, &|| false).unwrap()
                    })
                    .collect();
                for moments in &found {
                    assert_eq!(moments, &found[0], "all levels give the same bits");
                }
                for (found, expected) in found[0].grams.iter().zip([&y, &z, &x]) {
                    same_gram(found, &expected.gram(), k + p);
                }
                same_gram(&found[0].image, &r.gram(), p);
                let reached = last.transpose().times(&y);
                for (at, value) in found[0].cross.iter().enumerate() {
                    let (i, j) = (at / k, at % k);
                    let size = (last.gram()[i * (p + 1)] * y.gram()[j * (k + p + 1)]).sqrt();
                    let expected = reached.values[i * (k + p) + j];
                    assert!((value - expected).abs() <= 3e-6 * size);
                }
                let squares = |of: &Dense| of.values.iter().map(|x| x * x).sum::<f64>();
                close(found[0].sums.v, squares(&v), 1e-6);
                close(found[0].sums.delta, squares(&delta), 1e-6);
            }
        }
    }
}

#[test]
fn a_sketch_can_be_stopped_and_refuses_what_does_not_fit() {
    let directory = tempfile::tempdir().unwrap();
    let values = random(1, 40 * 30);
    let one = matrix(directory.path(), "one", [40, 30], &values);
    let other = matrix(directory.path(), "other", [30, 40], &values);
    let module = |finetuned: &Arc<Matrix>| Module {
        base: Arc::clone(&one),
        aligned: Arc::clone(&one),
        finetuned: Some(Arc::clone(finetuned)),
        against_base: false,
        transposed: false,
    };
    let factors = random(2, 30 * 8);
    let run = |module: &Module, factors: &[f32], stopped: bool| {
        measure(module, Kernels::detect(), factors, 5, 3, &|| stopped)
    };
    assert!(matches!(run(&module(&one), &factors, true), Err(Error::Interrupted)));
    let shapes = run(&module(&other), &factors, false).unwrap_err().to_string();
    assert!(shapes.contains("`one`") && shapes.contains("(30, 40)"), "{shapes}");
    let short = run(&module(&one), &factors[1..], false).unwrap_err().to_string();
    assert!(short.contains("239 random numbers"), "{short}");
}

#[test]
fn matrices_are_compared_and_looked_through() {
    let directory = tempfile::tempdir().unwrap();
    let mut values = random(1, 50 * 60);
    let one = matrix(directory.path(), "one", [50, 60], &values);
    let same = matrix(directory.path(), "same", [50, 60], &values);
    let turned = matrix(directory.path(), "turned", [60, 50], &values);
    values[2999] += 1.0;
    let last = matrix(directory.path(), "last", [50, 60], &values);
    values[1500] = f32::INFINITY;
    let infinite = matrix(directory.path(), "infinite", [50, 60], &values);
    let never = || false;
    assert!(one.equals(&same, &never).unwrap());
    assert!(!one.equals(&last, &never).unwrap());
    assert!(!one.equals(&turned, &never).unwrap());
    assert!(one.is_finite(&never).unwrap() && !infinite.is_finite(&never).unwrap());
}

#[test]
fn images_of_columns_are_those_of_the_formula() {
    for (rows, columns, width) in [(70, 300, 5), (300, 70, 17), (1, 9, 2), (64, 64, 0)] {
        for transposed in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let stored = if transposed { [columns, rows] } else { [rows, columns] };
            let (base, aligned) = (random(1, rows * columns), random(2, rows * columns));
            let module = Module {
                base: matrix(directory.path(), "base", stored, &base),
                aligned: matrix(directory.path(), "aligned", stored, &aligned),
                finetuned: None,
                against_base: false,
                transposed,
            };
            let v = |i: usize, j: usize| {
                let place = if transposed { j * rows + i } else { i * columns + j };
                f64::from(aligned[place] - base[place])
            };
            let given = random(3, rows * width);
            // G = VᵀC and H = VG, in f64.
            let mut g = vec![0.0; columns * width];
            let mut h = vec![0.0; rows * width];
            for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                for q in 0..width {
                    g[j * width + q] += v(i, j) * f64::from(given[i * width + q]);
                }
            }
            for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                for q in 0..width {
                    h[i * width + q] += v(i, j) * g[j * width + q];
                }
            }
            let gram = |values: &[f64]| -> Vec<f64> {
                let pairs = (0..width).flat_map(|p| (0..width).map(move |q| (p, q)));
                let of = |(p, q)| values.chunks(width).map(|row: &[f64]| row[p] * row[q]).sum();
                pairs.map(of).collect()
            };
            let near = |found: &[f64], expected: &[f64]| {
                let size = expected.iter().fold(1e-30_f64, |most, x| most.max(x.abs()));
                assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(expected) {
                    assert!((found - expected).abs() <= 2e-5 * size, "{found} {expected} {size}");
                }
            };
            let mut earlier: Option<Images> = None;
            for level in Level::available() {
                let kernels = Kernels::named(level.name()).unwrap();
                let found = images(&module, kernels, &given, width, &|| false).unwrap();
                let back: Vec<f64> =
                    found.images.iter().map(|&x| f64::from(x) / found.scale).collect();
                near(&back, &g);
                near(&found.grams[0], &gram(&g));
                near(&found.grams[1], &gram(&h));
                let squares: f64 = (0..rows)
                    .flat_map(|i| (0..columns).map(move |j| (i, j)))
                    .map(|(i, j)| v(i, j) * v(i, j))
                    .sum();
                assert!((found.sums.v - squares).abs() <= 1e-6 * squares);
                if let Some(earlier) = &earlier {
                    assert_eq!(earlier, &found, "{level:?}");
                }
                earlier = Some(found);
            }
            let short = images(&module, Kernels::detect(), &given, width + 1, &|| false);
            assert!(short.unwrap_err().to_string().contains("columns of"));
        }
    }
}
