//! Execution: values against the formula, and the same bits however the work is cut.

use crate::fixtures::{self, Pair, Tensor, WEIGHTS, open_job, publish, source, write, write_raw};
use half::{bf16, f16};
use safemerge_fast::checkpoint::ReadBackend;
use safemerge_fast::kernels::{Kernels, Level};
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, execute, memory};
use safemerge_fast::merge::verify::{self, Mismatch, verify};
use safemerge_fast::plan::Plan;
use safemerge_fast::writer::WriteMode;
use safemerge_fast::{Error, Result};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use std::path::Path;

const LAYOUT: &[(&str, Dtype, &[usize])] = &[
    ("embed", Dtype::BF16, &[321, 72]),
    ("odd", Dtype::U8, &[3]),
    ("position", Dtype::I64, &[9]),
    ("empty", Dtype::F32, &[0, 4]),
    ("half", Dtype::F16, &[211, 173]),
    ("scalar", Dtype::F32, &[]),
    ("double", Dtype::F64, &[1031]),
    ("norm", Dtype::F32, &[72]),
    ("large", Dtype::BF16, &[700, 503]),
    ("flags", Dtype::BOOL, &[5]),
];

fn run(plan: &Plan, output: &Path, options: &Options) -> Result<()> {
    let output = open_job(output)?;
    let shards = plan.select(None)?;
    execute(plan, &shards, &output, options, &Progress::default(), &mut || true)?;
    publish(&output, "test")
}

/// What `linear` must give for one element: a chain of fused multiply-adds in f32, rounded once.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to single is what the engine must do"
)]
fn blend(dtype: Dtype, first: &[u8], second: &[u8]) -> Vec<u8> {
    let value = |b: &[u8]| match dtype {
        Dtype::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
        Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        _ => f64::from_le_bytes(b.try_into().unwrap()) as f32,
    };
    let [w1, w2] = WEIGHTS.map(|w| w as f32);
    let sum = value(second).mul_add(w2, value(first).mul_add(w1, 0.0));
    match dtype {
        Dtype::BF16 => bf16::from_f32(sum).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(sum).to_le_bytes().to_vec(),
        Dtype::F32 => sum.to_le_bytes().to_vec(),
        _ => f64::from(sum).to_le_bytes().to_vec(),
    }
}

fn expected(first: &Tensor, second: &Tensor) -> Vec<u8> {
    match first.dtype {
        Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64 => {
            let size = first.dtype.bitsize() / 8;
            let pairs = first.bytes.chunks_exact(size).zip(second.bytes.chunks_exact(size));
            pairs.flat_map(|(a, b)| blend(first.dtype, a, b)).collect()
        }
        _ => first.bytes.clone(),
    }
}

#[test]
fn values_are_those_of_the_formula() {
    let pair = Pair::new(LAYOUT);
    let plan = Plan::from_json(&pair.plan(3).to_string()).unwrap();
    run(&plan, &pair.path("out"), &Options::default()).unwrap();
    let mut seen = 0;
    for shard in plan.shards() {
        let bytes = std::fs::read(pair.path("out").join(&shard.file)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in file.tensors() {
            let number = pair.first.iter().position(|t| t.name == name).unwrap();
            assert_eq!(view.data(), expected(&pair.first[number], &pair.second[number]), "{name}");
            seen += 1;
        }
    }
    assert_eq!(seen, LAYOUT.len());
}

#[test]
fn bits_do_not_depend_on_threads_tiles_writes_or_simd() {
    let pair = Pair::new(LAYOUT);
    let plan = Plan::from_json(&pair.plan(2).to_string()).unwrap();
    let read = |name: &str| -> Vec<Vec<u8>> {
        let files = plan.shards().iter().map(|shard| pair.path(name).join(&shard.file));
        files.map(|file| std::fs::read(file).unwrap()).collect()
    };
    let reference = Options { threads: 1, ..Options::default() };
    run(&plan, &pair.path("reference"), &reference).unwrap();
    let expected = read("reference");
    for threads in [1, 2, 7] {
        for tile_bytes in [4096, 64 << 10, 4 << 20] {
            for write in [WriteMode::Auto, WriteMode::Buffered] {
                for level in Level::available() {
                    let kernels = Kernels::named(level.name()).unwrap();
                    let options =
                        Options { threads, tile_bytes, write, kernels, ..Options::default() };
                    run(&plan, &pair.path("out"), &options).unwrap();
                    assert!(read("out") == expected, "{options:?}");
                }
            }
        }
    }
}

#[test]
fn positioned_reads_give_the_same_bytes() {
    let pair = Pair::new(LAYOUT);
    let json = pair.plan(2).to_string();
    for backend in [ReadBackend::Mmap, ReadBackend::Pread] {
        let plan = fixtures::open(&json, backend);
        run(&plan, &pair.path(&format!("{backend:?}")), &Options::default()).unwrap();
        let found = verify(
            &plan,
            &plan.select(None).unwrap(),
            &pair.path(&format!("{backend:?}")),
            &verify::Options { threads: 2, sample: 1.0, seed: 0, kernels: Kernels::detect() },
            &Progress::default(),
            &mut || true,
        );
        assert_eq!(found.unwrap().mismatches, []);
    }
    let bytes = |name: &str| std::fs::read(pair.path(name).join("model-1.safetensors")).unwrap();
    assert!(bytes("Mmap") == bytes("Pread"));
}

#[test]
fn a_file_that_shrinks_under_positioned_reads_is_an_error() {
    let pair = Pair::new(LAYOUT);
    let plan = fixtures::open(&pair.plan(1).to_string(), ReadBackend::Pread);
    let path = pair.path("first").join("model.safetensors");
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let failed = run(&plan, &pair.path("out"), &Options::default());
    assert!(matches!(failed, Err(Error::InputChanged { .. })), "{failed:?}");
    assert!(!pair.path("out").join("model-0.safetensors").exists());
}

#[test]
fn elements_that_a_tile_cuts_in_two_are_whole_again() {
    // A 3-byte tensor in front puts every later element across a 4 KiB boundary sooner or later.
    let pair = Pair::new(&[
        ("odd", Dtype::U8, &[3]),
        ("wide", Dtype::F64, &[4099]),
        ("x", Dtype::F32, &[3001]),
    ]);
    // The crate sorts by alignment when it writes; the plan keeps our order, and the engine must cope.
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    assert_ne!(plan.shards()[0].layout.range(1).start % 8, 0);
    let options = Options { tile_bytes: 4096, ..Options::default() };
    run(&plan, &pair.path("out"), &options).unwrap();
    let bytes = std::fs::read(pair.path("out").join("model-0.safetensors")).unwrap();
    for number in 0..pair.first.len() {
        let range = plan.shards()[0].layout.range(number);
        let expected = expected(&pair.first[number], &pair.second[number]);
        assert_eq!(&bytes[range], expected, "{}", pair.first[number].name);
    }
}

#[test]
fn a_copy_to_another_dtype_is_rounded_once_and_keeps_signed_zeros() {
    let pair = Pair::new(&[("x", Dtype::F32, &[4])]);
    let values = [-0.0_f32, 1.0 + 1.0 / 256.0, 3.3, -7.0e-40];
    write(&pair.path("first").join("model.safetensors"), &[Tensor::f32("x", &values)]);
    let mut plan = pair.plan(1);
    plan["sources"]["first"] = source(&pair.path("first"));
    plan["operations"] = json!([{"copy": {"source": "first"}}]);
    plan["shards"][0]["tensors"] = json!([{"name": "x", "operation": 0, "dtype": "BF16"}]);
    let plan = Plan::from_json(&plan.to_string()).unwrap();
    run(&plan, &pair.path("out"), &Options::default()).unwrap();
    let bytes = std::fs::read(pair.path("out").join("model-0.safetensors")).unwrap();
    let expected: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    assert_eq!(bytes[bytes.len() - 8..], expected);
}

#[test]
fn normalize_divides_by_the_sum_of_the_weights() {
    let pair = Pair::new(&[("x", Dtype::F32, &[999])]);
    let mut plan = pair.plan(1);
    let merge = &mut plan["operations"][0]["merge"];
    merge["parameters"] = json!({});
    merge["operands"][0]["weight"] = json!(3.0);
    merge["operands"][1]["weight"] = json!(-1.5);
    let plan = Plan::from_json(&plan.to_string()).unwrap();
    run(&plan, &pair.path("out"), &Options::default()).unwrap();
    let bytes = std::fs::read(pair.path("out").join("model-0.safetensors")).unwrap();
    let float = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
    let inputs = pair.first[0].bytes.chunks_exact(4).zip(pair.second[0].bytes.chunks_exact(4));
    let found = bytes[plan.shards()[0].layout.range(0)].chunks_exact(4);
    for ((a, b), found) in inputs.zip(found) {
        assert_eq!(float(found), float(b).mul_add(-1.5, float(a) * 3.0) / 1.5);
    }
}

fn with_values(first: &[f32], second: &[f32], dtype: &str) -> (Pair, Plan) {
    let pair = Pair::new(&[("x", Dtype::F32, &[first.len()])]);
    for (role, values) in [("first", first), ("second", second)] {
        write(&pair.path(role).join("model.safetensors"), &[Tensor::f32("x", values)]);
    }
    let mut plan = pair.plan(1);
    plan["shards"][0]["tensors"][0]["dtype"] = json!(dtype);
    let plan = Plan::from_json(&plan.to_string()).unwrap();
    (pair, plan)
}

#[test]
fn infinities_that_the_merge_makes_are_errors() {
    let (pair, plan) = with_values(&[1.0, 70000.0, 3.0], &[1.0, 70000.0, 3.0], "F16");
    let options = Options { allow_nonfinite: true, ..Options::default() };
    let error = run(&plan, &pair.path("out"), &options).unwrap_err();
    assert!(
        matches!(&error, Error::NonFiniteResult { tensor, element: 1, .. } if tensor == "x"),
        "{error}"
    );
    assert!(!pair.path("out").exists(), "a failed first shard leaves no directory");
}

#[test]
fn infinities_of_an_input_are_errors_unless_allowed() {
    let (pair, plan) = with_values(&[1.0, 2.0, f32::NAN], &[f32::INFINITY, 2.0, 3.0], "F32");
    let error = run(&plan, &pair.path("out"), &Options::default()).unwrap_err();
    let Error::NonFiniteInput { path, element: 0, .. } = &error else { panic!("{error}") };
    assert!(path.starts_with(pair.path("second")));

    let output = open_job(&pair.path("out")).unwrap();
    let options = Options { allow_nonfinite: true, ..Options::default() };
    let shards = plan.select(None).unwrap();
    let facts =
        execute(&plan, &shards, &output, &options, &Progress::default(), &mut || true).unwrap();
    assert_eq!(facts[0].nonfinite_inputs.len(), 2);
    let bytes = std::fs::read(output.files().join("model-0.safetensors")).unwrap();
    let values: Vec<f32> = bytes[bytes.len() - 12..]
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert!(values[0].is_infinite() && (values[1] - 2.0).abs() < 1e-6 && values[2].is_nan());
}

#[test]
fn an_interruption_stops_the_work_and_leaves_no_partial_file() {
    let pair = Pair::new(&[("x", Dtype::BF16, &[4096, 512])]);
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    let output = open_job(&pair.path("out")).unwrap();
    let progress = Progress::default();
    progress.cancel();
    let shards = plan.select(None).unwrap();
    let stopped = execute(&plan, &shards, &output, &Options::default(), &progress, &mut || true);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    drop(output);
    assert!(!pair.path("out").exists());
}

#[test]
fn memory_budgets_are_kept_or_refused() {
    let pair = Pair::new(LAYOUT);
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    run(&plan, &pair.path("reference"), &Options::default()).unwrap();
    let small = Options { memory_budget: Some(1 << 20), ..Options::default() };
    run(&plan, &pair.path("out"), &small).unwrap();
    let read = |name: &str| std::fs::read(pair.path(name).join("model-0.safetensors")).unwrap();
    assert!(read("out") == read("reference"));
    // Less than what it takes without a budget, and no more than the budget.
    let shards = plan.select(None).unwrap();
    let free = memory(&plan, &shards, &Options::default()).unwrap();
    let bound = memory(&plan, &shards, &small).unwrap();
    assert!(bound <= 1 << 20 && free > 4 * bound, "{bound} and {free}");
    let tiny = Options { memory_budget: Some(1000), ..Options::default() };
    let error = run(&plan, &pair.path("none"), &tiny).unwrap_err().to_string();
    assert!(error.contains("1000"), "{error}");
    let crooked = Options { tile_bytes: 5000, ..Options::default() };
    assert!(run(&plan, &pair.path("none"), &crooked).unwrap_err().to_string().contains("5000"));
}

#[test]
fn verification_finds_the_tensor_of_a_flipped_bit() {
    let pair = Pair::new(LAYOUT);
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    run(&plan, &pair.path("out"), &Options::default()).unwrap();
    let shards = plan.select(None).unwrap();
    let options = verify::Options { threads: 2, sample: 1.0, seed: 0, kernels: Kernels::detect() };
    let check =
        || verify(&plan, &shards, &pair.path("out"), &options, &Progress::default(), &mut || true);
    let sound = check().unwrap();
    assert_eq!(sound.mismatches, []);
    assert_eq!(sound.bytes_checked, plan.shards()[0].layout.size);

    let path = pair.path("out").join("model-0.safetensors");
    let clean = std::fs::read(&path).unwrap();
    let number = LAYOUT.iter().position(|(name, ..)| *name == "half").unwrap();
    let half = plan.shards()[0].layout.range(number).start;
    for (offset, tensor) in [(half + 77, Some("half")), (20, None)] {
        let mut bytes = clean.clone();
        bytes[offset] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let found = check().unwrap().mismatches;
        let tensor = tensor.map(str::to_owned);
        assert_eq!(found, [Mismatch { file: "model-0.safetensors".into(), tensor, offset }]);
    }
    std::fs::write(&path, &clean[..clean.len() - 1]).unwrap();
    assert!(matches!(check(), Err(Error::Verification { .. })));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(check(), Err(Error::Verification { .. })));
}

#[test]
fn unpadded_headers_and_misaligned_data_are_read_right() {
    let pair = Pair::new(&[("x", Dtype::F32, &[3])]);
    let header = r#"{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#;
    assert_ne!(header.len() % 4, 0);
    let values = [1.5_f32, -2.25, 1e-3];
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    write_raw(&pair.path("first").join("model.safetensors"), header, &data);
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    run(&plan, &pair.path("out"), &Options::default()).unwrap();
    let bytes = std::fs::read(pair.path("out").join("model-0.safetensors")).unwrap();
    let unaligned = Tensor::f32("x", &values);
    assert_eq!(bytes[bytes.len() - 12..], expected(&unaligned, &pair.second[0]));
}
