//! Small checkpoints on disk, written with the crate `safetensors` rather than with our own layout code.

use safemerge_fast::Result;
use safemerge_fast::checkpoint::ReadBackend;
use safemerge_fast::plan::{GivenSources, Plan};
use safemerge_fast::writer::{JobDirectory, Overwrite, REPORT};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A tensor to be written: name, dtype, shape, bytes.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn new(name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    }

    pub fn f32(name: &str, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(name, Dtype::F32, &[values.len()], bytes)
    }
}

/// Writes one shard.
pub fn write(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|t| {
        (t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("fixture"))
    });
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(views, Some(metadata), path).expect("fixture");
}

/// Writes a file with this header text and data, valid or not.
pub fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    std::fs::write(path, bytes).expect("fixture");
}

/// Pseudo-random bytes (xorshift), the same for the same seed.
pub fn noise(mut seed: u64, length: usize) -> Vec<u8> {
    seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..length)
        .map(|_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_le_bytes()[3]
        })
        .collect()
}

/// Random finite values of moderate size.
pub fn random_values(seed: u64, count: usize) -> impl Iterator<Item = f32> {
    let values = noise(seed, 2 * count);
    (0..count).map(move |place| {
        let pair = [values[2 * place], values[2 * place + 1]];
        f32::from(i16::from_le_bytes(pair)) / 4096.0 + f32::from(pair[0]) * 1e-4
    })
}

/// Values as the bytes of this dtype, little-endian.
pub fn encode(dtype: Dtype, values: impl Iterator<Item = f32>) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Dtype::F64 => values.flat_map(|v| (f64::from(v) * 1.000_000_1).to_le_bytes()).collect(),
        _ => unreachable!("only floats"),
    }
}

/// Random finite values of moderate size in this dtype.
pub fn random_floats(seed: u64, dtype: Dtype, count: usize) -> Vec<u8> {
    encode(dtype, random_values(seed, count))
}

/// Opens the job of an output whose inputs are of no account, over what an earlier job of the same test made.
pub fn open_job(output: &Path) -> Result<JobDirectory> {
    JobDirectory::open(output, "test", &[], false, Overwrite::Exchange)
}

/// Lists the files so far in a report, as the program does, and publishes.
pub fn publish(job: &JobDirectory, identity: &str) -> Result<()> {
    let files: Vec<Value> = job
        .written()
        .iter()
        .map(|file| json!({"name": file.name, "bytes": file.bytes, "digest": file.digest}))
        .collect();
    let report = json!({"ignored": [{}], "files": files, "job": {"identity": identity, "more": 1}});
    job.write_file(REPORT, report.to_string().as_bytes())?;
    job.publish()
}

/// The identity section of a plan for these files of a directory.
pub fn source(directory: &Path) -> Value {
    let checkpoint = safemerge_fast::checkpoint::Checkpoint::open(directory).expect("fixture");
    let files: BTreeMap<_, _> = checkpoint
        .shards()
        .iter()
        .map(|shard| (shard.name.clone(), json!(shard.header.identity)))
        .collect();
    json!({"path": directory, "files": files})
}

/// Two single-file checkpoints with the same tensors and other values, and a plan that copies integers and blends floats.
pub struct Pair {
    pub directory: tempfile::TempDir,
    pub first: Vec<Tensor>,
    pub second: Vec<Tensor>,
}

pub const WEIGHTS: [f64; 2] = [0.8, 0.2];

impl Pair {
    /// `layout` gives names, dtypes and shapes.
    pub fn new(layout: &[(&str, Dtype, &[usize])]) -> Self {
        let directory = tempfile::tempdir().expect("fixture");
        let make = |role: u64| -> Vec<Tensor> {
            layout
                .iter()
                .enumerate()
                .map(|(number, (name, dtype, shape))| {
                    let count = shape.iter().product();
                    let seed = role * 1000 + number as u64;
                    let bytes = match dtype {
                        Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64 => {
                            random_floats(seed, *dtype, count)
                        }
                        _ => noise(seed, count * dtype.bitsize() / 8),
                    };
                    Tensor::new(name, *dtype, shape, bytes)
                })
                .collect()
        };
        let pair = Self { first: make(1), second: make(2), directory };
        for (role, tensors) in [("first", &pair.first), ("second", &pair.second)] {
            std::fs::create_dir(pair.path(role)).expect("fixture");
            write(&pair.path(role).join("model.safetensors"), tensors);
        }
        pair
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The plan, its output tensors in the order of `first`, over `shards` output files.
    pub fn plan(&self, shards: usize) -> Value {
        let per_shard = self.first.len().div_ceil(shards);
        let shards: Vec<Value> = self
            .first
            .chunks(per_shard)
            .enumerate()
            .map(|(number, tensors)| {
                let tensors: Vec<Value> = tensors.iter().map(planned).collect();
                json!({"file": format!("model-{number}.safetensors"), "tensors": tensors})
            })
            .collect();
        let sources = json!({
            "first": source(&self.path("first")), "second": source(&self.path("second")),
        });
        plan(sources, shards)
    }
}

/// A plan of these shards, whose tensors hold their operation as a field `copy` or `merge`: it goes into the table, one
/// entry for each tensor, in the order of the tensors.
pub fn plan(sources: Value, mut shards: Vec<Value>) -> Value {
    let mut operations = Vec::new();
    for shard in &mut shards {
        for tensor in shard["tensors"].as_array_mut().expect("fixture") {
            let fields = tensor.as_object_mut().expect("fixture");
            for kind in ["copy", "merge"] {
                if let Some(operation) = fields.remove(kind) {
                    fields.insert("operation".to_owned(), json!(operations.len()));
                    operations.push(json!({kind: operation}));
                }
            }
        }
    }
    json!({"version": 2, "sources": sources, "operations": operations, "shards": shards})
}

/// A plan whose inputs are read in this way.
pub fn open(plan: &str, backend: ReadBackend) -> Plan {
    Plan::open(plan.as_bytes(), backend, &GivenSources::new(), None).expect("a sound plan")
}

/// Floats are blended, all else is copied from the first.
fn planned(tensor: &Tensor) -> Value {
    let operand = |source: &str| json!({"source": source, "tensor": tensor.name});
    let mut planned = json!({
        "name": tensor.name, "dtype": tensor.dtype.to_string(), "shape": tensor.shape,
    });
    if matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64) {
        planned["merge"] = json!({
            "method": "linear", "parameters": {"normalize": false},
            "operands": [
                {"operand": operand("first"), "weight": WEIGHTS[0]},
                {"operand": operand("second"), "weight": WEIGHTS[1]},
            ],
        });
    } else {
        planned["copy"] = operand("first");
    }
    planned
}
