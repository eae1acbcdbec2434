//! Operands that adapters change, against dense arithmetic in f64.

use crate::fixtures::{self, Tensor, open_job, publish, random_floats, source, write};
use safemerge_fast::Error;
use safemerge_fast::checkpoint::{Checkpoint, ReadBackend};
use safemerge_fast::difference::{Difference, Matrix};
use safemerge_fast::kernels::{Kernels, Level};
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, execute};
use safemerge_fast::plan::Plan;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

type Dense = Vec<Vec<f64>>;

fn matrix(tensor: &Tensor) -> Dense {
    let columns = tensor.shape[tensor.shape.len() - 1];
    let size = tensor.dtype.bitsize() / 8;
    let value = |b: &[u8]| match tensor.dtype {
        Dtype::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f64(),
        Dtype::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f64(),
        Dtype::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        _ => f64::from_le_bytes(b.try_into().unwrap()),
    };
    tensor
        .bytes
        .chunks_exact(size * columns)
        .map(|row| row.chunks_exact(size).map(value).collect())
        .collect()
}

fn product(b: &Dense, a: &Dense) -> Dense {
    b.iter()
        .map(|row| {
            (0..a[0].len()).map(|j| row.iter().zip(a).map(|(x, a)| x * a[j]).sum()).collect()
        })
        .collect()
}

fn transposed(m: &Dense) -> Dense {
    (0..m[0].len()).map(|j| m.iter().map(|row| row[j]).collect()).collect()
}

/// `w += scale·x`.
fn add(w: &mut Dense, scale: f64, x: &Dense) {
    for (w, x) in w.iter_mut().zip(x) {
        for (w, x) in w.iter_mut().zip(x) {
            *w += scale * x;
        }
    }
}

/// A model with one matrix `w` (out, in), and everything an adapter may bring for it.
struct Fixture {
    directory: TempDir,
    tensors: Vec<Tensor>,
}

const OUT: usize = 37;
const IN: usize = 211;
const RANK: usize = 5;

impl Fixture {
    fn new(dtype: Dtype) -> Self {
        let tensor = |seed: u64, name: &str, dtype: Dtype, shape: &[usize]| {
            Tensor::new(name, dtype, shape, random_floats(seed, dtype, shape.iter().product()))
        };
        let tensors = vec![
            tensor(1, "w", Dtype::F32, &[OUT, IN]),
            tensor(2, "a", dtype, &[RANK, IN]),
            tensor(3, "b", dtype, &[OUT, RANK]),
            tensor(4, "a2", Dtype::F32, &[2, IN]),
            tensor(5, "b2", dtype, &[OUT, 2]),
            // For the transposed matrix: in and out change places.
            tensor(6, "at", dtype, &[RANK, OUT]),
            tensor(7, "bt", dtype, &[IN, RANK]),
            tensor(8, "m", Dtype::F32, &[OUT]),
            tensor(9, "mt", Dtype::F32, &[1, IN]),
            tensor(10, "rows", dtype, &[3, IN]),
        ];
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("in")).unwrap();
        write(&directory.path().join("in/model.safetensors"), &tensors);
        Self { directory, tensors }
    }

    fn get(&self, name: &str) -> Dense {
        matrix(self.tensors.iter().find(|t| t.name == name).unwrap())
    }

    fn plan(&self, operands: &[(Value, f64)]) -> Plan {
        let operands: Vec<Value> = operands
            .iter()
            .map(|(operand, weight)| json!({"operand": operand, "weight": weight}))
            .collect();
        let shard = json!({"file": "model.safetensors", "tensors": [{
            "name": "w", "dtype": "F32", "shape": [OUT, IN],
            "merge": {"method": "linear", "parameters": {"normalize": false}, "operands": operands},
        }]});
        let sources = json!({"x": source(&self.directory.path().join("in"))});
        let plan = fixtures::plan(sources, vec![shard]);
        self.check_positioned_reads(&plan.to_string());
        Plan::from_json(&plan.to_string()).unwrap()
    }

    /// The plan must give the same values whether its inputs are mapped or read.
    fn check_positioned_reads(&self, plan: &str) {
        let options = Options { threads: 2, tile_bytes: 4096, ..Options::default() };
        let values = [ReadBackend::Mmap, ReadBackend::Pread]
            .map(|backend| self.run(&fixtures::open(plan, backend), &options));
        let bits = values.map(|values| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        assert_eq!(bits[0], bits[1]);
    }

    fn run(&self, plan: &Plan, options: &Options) -> Vec<f32> {
        let out = self.directory.path().join("out");
        let output = open_job(&out).unwrap();
        let shards = plan.select(None).unwrap();
        execute(plan, &shards, &output, options, &Progress::default(), &mut || true).unwrap();
        publish(&output, "test").unwrap();
        self.read(&out)
    }

    fn read(&self, out: &Path) -> Vec<f32> {
        let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
        let data = &bytes[bytes.len() - 4 * OUT * IN..];
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// Runs on one worker and compares with the expected values; then in other cuts, and compares the bits.
    fn check(&self, operands: &[(Value, f64)], expected: &Dense) {
        let plan = self.plan(operands);
        let found = self.run(&plan, &Options { threads: 1, ..Options::default() });
        let scale = expected.iter().flatten().fold(0.0_f64, |m, v| m.max(v.abs()));
        for (found, expected) in found.iter().zip(expected.iter().flatten()) {
            assert!(
                (f64::from(*found) - expected).abs() < 2e-6 * scale,
                "{found} is not {expected}"
            );
        }
        let bits: Vec<u32> = found.iter().map(|v| v.to_bits()).collect();
        self.check_matrix(operands, &bits);
        for level in Level::available() {
            for (threads, tile_bytes) in [(1, 4096), (3, 4096), (2, 8192)] {
                let kernels = Kernels::named(level.name()).unwrap();
                let options = Options { threads, tile_bytes, kernels, ..Options::default() };
                let again: Vec<u32> =
                    self.run(&plan, &options).iter().map(|v| v.to_bits()).collect();
                assert!(again == bits, "{level:?}, {threads} threads, tiles of {tile_bytes}");
            }
        }
    }
}

impl Fixture {
    /// What the analysis reads of the sum, whole or by blocks of rows and columns, is what the merge makes of it.
    fn check_matrix(&self, operands: &[(Value, f64)], merged: &[u32]) {
        let terms = operands.iter().map(|(operand, weight)| {
            serde_json::from_value(json!({"operand": operand, "weight": weight})).unwrap()
        });
        let terms: Vec<_> = terms.collect();
        for backend in [ReadBackend::Mmap, ReadBackend::Pread] {
            let path = self.directory.path().join("in");
            let checkpoint = Arc::new(Checkpoint::open_with(&path, backend).unwrap());
            let sources = [("x".to_owned(), checkpoint)].into();
            let sum = Matrix::sum(&sources, "w", &terms).unwrap();
            assert_eq!(sum.shape(), (OUT, IN));
            for (rows, columns) in [
                (0..OUT, 0..IN),
                (5..6, 0..IN),
                (0..OUT, 100..103),
                (30..37, 200..211),
                (0..9, 7..99),
            ] {
                let mut out = vec![0.0; rows.len() * columns.len()];
                sum.read(&rows, &columns, &|| false, &mut out).unwrap();
                let whole = rows.flat_map(|row| merged[row * IN..][columns.clone()].to_vec());
                assert!(whole.eq(out.iter().map(|value| value.to_bits())), "{columns:?}");
                let difference = Difference::new(&sum, &sum).unwrap();
                let (rows, kernels) = (0..out.len() / columns.len(), Kernels::detect());
                let found =
                    difference.read(&kernels, &rows, &columns, true, &|| false, &mut out).unwrap();
                assert!(found.difference == 0.0 && found.minuend > 0.0);
            }
        }
    }
}

fn reference(name: &str) -> Value {
    json!({"source": "x", "tensor": name})
}

fn low_rank(a: &str, b: &str, scale: f64, transpose: bool) -> Value {
    json!({"a": reference(a), "b": reference(b), "scale": scale, "transpose": transpose})
}

#[test]
fn products_are_added_to_the_matrix() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let fixture = Fixture::new(dtype);
        let mut expected = fixture.get("w");
        add(&mut expected, 0.75, &product(&fixture.get("b"), &fixture.get("a")));
        add(&mut expected, -1.5, &product(&fixture.get("b2"), &fixture.get("a2")));
        let mut operand = reference("w");
        operand["low_rank"] =
            json!([low_rank("a", "b", 0.75, false), low_rank("a2", "b2", -1.5, false)]);
        fixture.check(&[(operand, 1.0)], &expected);
    }
}

#[test]
fn a_matrix_stored_as_in_out_gets_the_transposed_product() {
    let fixture = Fixture::new(Dtype::F32);
    let mut expected = fixture.get("w");
    add(&mut expected, 2.0, &transposed(&product(&fixture.get("bt"), &fixture.get("at"))));
    let mut operand = reference("w");
    operand["low_rank"] = json!([low_rank("at", "bt", 2.0, true)]);
    fixture.check(&[(operand, 1.0)], &expected);
}

/// Each row of `w` rescaled to the norm given for it.
fn rescaled(w: &Dense, norms: &[f64]) -> Dense {
    w.iter()
        .zip(norms)
        .map(|(row, norm)| {
            let length = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.iter().map(|v| v * norm / length).collect()
        })
        .collect()
}

#[test]
fn magnitudes_set_the_norms_of_output_features() {
    let fixture = Fixture::new(Dtype::F32);
    let mut sum = fixture.get("w");
    add(&mut sum, 0.5, &product(&fixture.get("b"), &fixture.get("a")));
    let norms: Vec<f64> = fixture.get("m").concat();
    let mut operand = reference("w");
    operand["low_rank"] = json!([low_rank("a", "b", 0.5, false)]);
    operand["magnitude"] = reference("m");
    fixture.check(&[(operand, 1.0)], &rescaled(&sum, &norms));

    let mut sum = fixture.get("w");
    add(&mut sum, 0.5, &transposed(&product(&fixture.get("bt"), &fixture.get("at"))));
    let norms: Vec<f64> = fixture.get("mt").concat();
    let mut operand = reference("w");
    operand["low_rank"] = json!([low_rank("at", "bt", 0.5, true)]);
    operand["magnitude"] = json!({"source": "x", "tensor": "mt", "transpose": true});
    fixture.check(&[(operand, 1.0)], &transposed(&rescaled(&transposed(&sum), &norms)));
}

#[test]
fn rows_are_replaced_before_anything_else() {
    let fixture = Fixture::new(Dtype::F32);
    let mut expected = fixture.get("w");
    for (row, new) in [9, 0, 36].into_iter().zip(fixture.get("rows")) {
        expected[row] = new;
    }
    let mut operand = reference("w");
    operand["rows"] = json!({"source": "x", "tensor": "rows", "indices": [9, 0, 36]});
    fixture.check(&[(operand.clone(), 1.0)], &expected);
    add(&mut expected, 1.0, &product(&fixture.get("b"), &fixture.get("a")));
    operand["low_rank"] = json!([low_rank("a", "b", 1.0, false)]);
    fixture.check(&[(operand, 1.0)], &expected);
}

#[test]
fn adapted_and_plain_operands_blend() {
    let fixture = Fixture::new(Dtype::BF16);
    let mut expected = fixture.get("w");
    add(&mut expected, 0.75 * 3.0, &product(&fixture.get("b"), &fixture.get("a")));
    let mut operand = reference("w");
    operand["low_rank"] = json!([low_rank("a", "b", 3.0, false)]);
    fixture.check(&[(operand, 0.75), (reference("w"), 0.25)], &expected);
}

#[test]
fn factors_that_do_not_fit_are_refused_by_name() {
    let fixture = Fixture::new(Dtype::F32);
    let plan = |change: &dyn Fn(&mut Value)| {
        let mut operand = reference("w");
        change(&mut operand);
        let shard = json!({"file": "model.safetensors", "tensors": [{
            "name": "w", "dtype": "F32", "shape": [OUT, IN],
            "merge": {"method": "linear", "operands": [{"operand": operand, "weight": 1.0}]},
        }]});
        let sources = json!({"x": source(&fixture.directory.path().join("in"))});
        let plan = fixtures::plan(sources, vec![shard]);
        Plan::from_json(&plan.to_string()).unwrap_err().to_string()
    };
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(Change<'_>, &str); 6] = [
        (&|o| o["low_rank"] = json!([low_rank("at", "b", 1.0, false)]), "`at`"),
        (&|o| o["low_rank"] = json!([low_rank("a", "b2", 1.0, false)]), "`b2`"),
        (&|o| o["low_rank"] = json!([low_rank("a", "b", 1.0, true)]), "`a`"),
        (&|o| o["magnitude"] = reference("mt"), "`mt`"),
        (
            &|o| o["rows"] = json!({"source": "x", "tensor": "rows", "indices": [1, 1, 2]}),
            "different",
        ),
        (
            &|o| o["rows"] = json!({"source": "x", "tensor": "rows", "indices": [1, 2, 37]}),
            "below 37",
        ),
    ];
    for (change, fault) in cases {
        let message = plan(change);
        assert!(message.contains(fault), "expected {fault} in {message}");
    }
}

#[test]
fn norms_that_cannot_be_taken_say_why_to_all_workers() {
    let fixture = Fixture::new(Dtype::F32);
    let mut operand = reference("w");
    operand["low_rank"] = json!([low_rank("at", "bt", 0.5, true)]);
    operand["magnitude"] = json!({"source": "x", "tensor": "mt", "transpose": true});
    let merge = json!({"method": "linear", "operands": [{"operand": operand, "weight": 1.0}]});
    let tensor = json!({"name": "w", "dtype": "F32", "shape": [OUT, IN], "merge": merge});
    let path = fixture.directory.path().join("in");
    let shard = json!({"file": "model.safetensors", "tensors": [tensor]});
    let text = fixtures::plan(json!({"x": source(&path)}), vec![shard]).to_string();
    let plan = fixtures::open(&text, ReadBackend::Pread);
    // Half of the file goes after it has been opened; all workers wait for norms that one of them cannot take.
    let held = plan.tensor(&plan.shards()[0], 0).unwrap();
    for input in held.operation.reads().map(|(input, _)| input) {
        input.file().unwrap();
    }
    let file = std::fs::File::options().write(true).open(path.join("model.safetensors")).unwrap();
    file.set_len(1000).unwrap();
    for _ in 0..20 {
        let out = fixture.directory.path().join("out");
        let output = open_job(&out).unwrap();
        let options = Options { threads: 8, tile_bytes: 4096, ..Options::default() };
        let shards = plan.select(None).unwrap();
        let failed = execute(&plan, &shards, &output, &options, &Progress::default(), &mut || true);
        assert!(matches!(failed, Err(Error::InputChanged { .. })), "{failed:?}");
    }
}
