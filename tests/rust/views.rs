//! Views and pieces: what is read in another order, and tensors whose parts have operations of their own, against slices
//! that the test cuts out and puts together by itself.

use crate::fixtures::{Tensor, encode, open, open_job, publish, random_values, source, write};
use half::bf16;
use safemerge_fast::Error;
use safemerge_fast::checkpoint::{Checkpoint, ReadBackend};
use safemerge_fast::difference::Matrix;
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, execute};
use safemerge_fast::merge::verify::{self, verify};
use safemerge_fast::plan::{GivenSources, Plan};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Start, shape and strides.
type View<'a> = (usize, &'a [usize], &'a [usize]);

fn document((start, shape, strides): View<'_>) -> Value {
    json!({"start": start, "shape": shape, "strides": strides})
}

/// The places of a view's elements, in its order.
fn places((start, shape, strides): View<'_>) -> Vec<usize> {
    let mut places = vec![start];
    for (&extent, &stride) in shape.iter().zip(strides) {
        places = places
            .iter()
            .flat_map(|place| (0..extent).map(move |step| place + step * stride))
            .collect();
    }
    places
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

fn pick(values: &[f32], view: View<'_>) -> Vec<f32> {
    places(view).into_iter().map(|place| values[place]).collect()
}

fn tensor(name: &str, shape: &[usize], values: impl Iterator<Item = f32>) -> Tensor {
    Tensor::new(name, Dtype::BF16, shape, encode(Dtype::BF16, values))
}

fn checkpoint(directory: &Path, tensors: &[Tensor]) {
    std::fs::create_dir(directory).unwrap();
    write(&directory.join("model.safetensors"), tensors);
}

/// Executes a plan of one file, verifies it, and returns its tensors.
fn run(
    plan: &Value,
    directory: &Path,
    backend: ReadBackend,
    tile_bytes: usize,
) -> BTreeMap<String, Vec<f32>> {
    let plan = open(&plan.to_string(), backend);
    let output = directory.join(format!("out-{backend:?}-{tile_bytes}"));
    let job = open_job(&output).unwrap();
    let shards = plan.select(None).unwrap();
    let options = Options { tile_bytes, threads: 3, ..Options::default() };
    execute(&plan, &shards, &job, &options, &Progress::default(), &mut || true).unwrap();
    publish(&job, "test").unwrap();
    let options = verify::Options { threads: 2, sample: 1.0, seed: 0, kernels: options.kernels };
    let found =
        verify(&plan, &shards, &output, &options, &Progress::default(), &mut || true).unwrap();
    assert_eq!((found.mismatches, found.bytes_checked), (vec![], found.bytes_total));
    let bytes = std::fs::read(output.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, view)| (name, floats(view.data()))).collect()
}

fn merge(
    method: &str,
    operands: &[(Value, Option<f64>)],
    base: Option<Value>,
    parameters: Value,
) -> Value {
    let operands: Vec<Value> = operands
        .iter()
        .map(|(operand, weight)| match weight {
            Some(weight) => json!({"operand": operand, "weight": weight}),
            None => json!({"operand": operand}),
        })
        .collect();
    let mut merge = json!({"method": method, "parameters": parameters, "operands": operands});
    if let Some(base) = base {
        merge["base"] = base;
    }
    json!({"merge": merge})
}

/// The four operations that the tests give to pieces, of operands with these further fields.
fn operations(fields: &Value) -> Vec<Value> {
    let operand = |source: &str| {
        let mut operand = json!({"source": source});
        for (name, value) in fields.as_object().unwrap() {
            operand[name] = value.clone();
        }
        operand
    };
    vec![
        json!({"copy": operand("first")}),
        merge(
            "linear",
            &[(operand("first"), Some(0.8)), (operand("second"), Some(0.2))],
            None,
            json!({"normalize": false}),
        ),
        merge("slerp", &[(operand("first"), None)], Some(operand("second")), json!({"t": 0.3})),
        merge(
            "sce",
            &[(operand("first"), None), (operand("second"), None)],
            Some(operand("base")),
            json!({"select_topk": 0.5}),
        ),
    ]
}

const EXPERTS: usize = 5;
const ROWS: usize = 70;
const COLUMNS: usize = 96;
const MATRIX: usize = ROWS * COLUMNS;

/// Views of the gate and the up matrix of an expert.
type GateUp = [(usize, [usize; 2], [usize; 2]); 2];

/// Layouts of a gate and an up matrix in each expert's slice of a fused tensor.
fn layouts() -> Vec<(&'static str, Vec<GateUp>)> {
    let each = |gate_up: &dyn Fn(usize) -> GateUp| {
        (0..EXPERTS).map(|expert| gate_up(expert * MATRIX)).collect()
    };
    let (rows, columns) = (ROWS / 2, COLUMNS / 2);
    vec![
        (
            "halves of the rows",
            each(&|start| [start, start + MATRIX / 2].map(|s| (s, [rows, COLUMNS], [COLUMNS, 1]))),
        ),
        (
            "halves of the columns",
            each(&|start| [start, start + columns].map(|s| (s, [ROWS, columns], [COLUMNS, 1]))),
        ),
        (
            "every second row",
            each(&|start| [start, start + COLUMNS].map(|s| (s, [rows, COLUMNS], [2 * COLUMNS, 1]))),
        ),
        (
            "every second column",
            each(&|start| [start, start + 1].map(|s| (s, [ROWS, columns], [COLUMNS, 2]))),
        ),
    ]
}

struct Scene {
    directory: tempfile::TempDir,
    values: BTreeMap<&'static str, Vec<f32>>,
}

const ROLES: [&str; 3] = ["base", "first", "second"];

impl Scene {
    /// Three checkpoints with one fused tensor.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut values = BTreeMap::new();
        for (seed, role) in (7..).zip(ROLES) {
            let fused =
                tensor("fused", &[EXPERTS, ROWS, COLUMNS], random_values(seed, EXPERTS * MATRIX));
            values.insert(role, floats(&fused.bytes));
            checkpoint(&directory.path().join(role), &[fused]);
        }
        Self { directory, values }
    }

    fn sources(&self, extra: &[&str]) -> Value {
        let roles = ROLES.iter().chain(extra);
        roles.map(|role| ((*role).to_owned(), source(&self.directory.path().join(role)))).collect()
    }

    /// What an operation makes of a part that stands alone, as a tensor of the same name: the reference.
    fn alone(&self, operation: usize, view: View<'_>) -> Vec<f32> {
        let directory = tempfile::tempdir().unwrap();
        let mut sources = json!({});
        for role in ROLES {
            let path = directory.path().join(role);
            let part = pick(&self.values[role], view);
            checkpoint(&path, &[tensor("fused", view.1, part.into_iter())]);
            sources[role] = source(&path);
        }
        let plan = json!({
            "version": 2, "sources": sources, "operations": operations(&json!({})),
            "shards": [{"file": "model.safetensors", "tensors": [{"name": "fused", "operation": operation}]}],
        });
        run(&plan, directory.path(), ReadBackend::Mmap, 4 << 20).remove("fused").unwrap()
    }
}

#[test]
fn each_piece_is_what_it_is_alone() {
    let scene = Scene::new();
    for (number, (layout, experts)) in layouts().into_iter().enumerate() {
        let mut pieces = Vec::new();
        let mut expected = vec![f32::NAN; EXPERTS * MATRIX];
        for (expert, pair) in experts.iter().enumerate() {
            for (place, (start, shape, strides)) in pair.iter().enumerate() {
                let view: View<'_> = (*start, shape, strides);
                let operation = (2 * expert + place + number) % 4;
                pieces.push(json!({"view": document(view), "operation": operation}));
                for (place, value) in places(view).into_iter().zip(scene.alone(operation, view)) {
                    expected[place] = value;
                }
            }
        }
        pieces.reverse();
        let plan = json!({
            "version": 2, "sources": scene.sources(&[]), "operations": operations(&json!({})),
            "shards": [{"file": "model.safetensors", "tensors": [
                {"name": "fused", "shape": [EXPERTS, ROWS, COLUMNS], "pieces": pieces},
            ]}],
        });
        for backend in [ReadBackend::Mmap, ReadBackend::Pread] {
            for tile in [4096, 4 << 20] {
                let directory = scene.directory.path().join(format!("{number}"));
                std::fs::create_dir_all(&directory).unwrap();
                let found = run(&plan, &directory, backend, tile);
                assert_eq!(found["fused"], expected, "{layout}, {backend:?}, {tile}");
            }
        }
    }
}

/// Roles whose experts lie otherwise: one tensor each, transposed, as columns between others.
#[test]
fn operands_are_read_in_any_order() {
    let scene = Scene::new();
    let values = &scene.values["second"];
    let mut tensors = Vec::new();
    for expert in 0..EXPERTS {
        let start = expert * MATRIX;
        // Transposed, (columns, rows).
        let across = pick(values, (start, &[COLUMNS, ROWS], &[1, COLUMNS]));
        tensors.push(tensor(&format!("{expert}.across"), &[COLUMNS, ROWS], across.into_iter()));
        // Transposed, and each second row of a larger one.
        let across = pick(values, (start, &[COLUMNS, ROWS], &[1, COLUMNS]));
        let wide = across.chunks(ROWS).flat_map(|row| [row.to_vec(), vec![9.0; ROWS]].concat());
        tensors.push(tensor(&format!("{expert}.wide"), &[2 * COLUMNS, ROWS], wide));
    }
    // All experts, (row, expert, column).
    let mixed = (0..ROWS).flat_map(|row| {
        (0..EXPERTS).flat_map(move |expert| {
            let start = expert * MATRIX + row * COLUMNS;
            values[start..start + COLUMNS].iter().copied()
        })
    });
    tensors.push(tensor("mixed", &[ROWS, EXPERTS * COLUMNS], mixed));
    checkpoint(&scene.directory.path().join("other"), &tensors);
    let view = |expert: usize| (expert * MATRIX, [ROWS, COLUMNS], [COLUMNS, 1]);
    let others: [Box<dyn Fn(usize) -> Value>; 3] = [
        Box::new(|expert| {
            json!({"source": "other", "tensor": format!("{expert}.across"),
                   "view": document((0, &[ROWS, COLUMNS], &[1, ROWS]))})
        }),
        Box::new(|expert| {
            json!({"source": "other", "tensor": format!("{expert}.wide"),
                   "view": document((0, &[ROWS, COLUMNS], &[1, 2 * ROWS]))})
        }),
        Box::new(|expert| {
            json!({"source": "other", "tensor": "mixed",
                   "view": document((expert * COLUMNS, &[ROWS, COLUMNS], &[EXPERTS * COLUMNS, 1]))})
        }),
    ];
    let weighted =
        |first: f32, second: f32| bf16::from_f32(second.mul_add(0.2, first * 0.8)).to_f32();
    let expected: Vec<f32> =
        scene.values["first"].iter().zip(values).map(|(&a, &b)| weighted(a, b)).collect();
    for (number, other) in others.iter().enumerate() {
        let (mut operations, mut pieces) = (Vec::new(), Vec::new());
        for expert in 0..EXPERTS {
            let (start, shape, strides) = view(expert);
            pieces.push(json!({"view": document((start, &shape, &strides)), "operation": expert}));
            operations.push(merge(
                "linear",
                &[(json!({"source": "first"}), Some(0.8)), (other(expert), Some(0.2))],
                None,
                json!({"normalize": false}),
            ));
        }
        let plan = json!({
            "version": 2, "sources": scene.sources(&["other"]), "operations": operations,
            "shards": [{"file": "model.safetensors", "tensors": [
                {"name": "fused", "dtype": "BF16", "shape": [EXPERTS, ROWS, COLUMNS], "pieces": pieces},
            ]}],
        });
        for (backend, tile) in [(ReadBackend::Mmap, 4 << 20), (ReadBackend::Pread, 8192)] {
            let directory = scene.directory.path().join(format!("other{number}"));
            std::fs::create_dir_all(&directory).unwrap();
            let found = run(&plan, &directory, backend, tile);
            assert_eq!(found["fused"], expected, "{number}, {backend:?}");
        }
    }
}

/// What an analysis reads of one expert is what stands there, whichever way it is stored.
#[test]
fn a_matrix_may_be_a_view() {
    let scene = Scene::new();
    let path = scene.directory.path().join("first");
    let opened = Arc::new(Checkpoint::open(&path).unwrap());
    let sources: GivenSources = [("first".to_owned(), opened)].into();
    let views: [View<'_>; 3] = [
        (2 * MATRIX, &[ROWS, COLUMNS], &[COLUMNS, 1]),
        (2 * MATRIX + 1, &[ROWS, COLUMNS / 2], &[COLUMNS, 2]),
        (2 * MATRIX + 1, &[COLUMNS / 2, ROWS], &[2, COLUMNS]),
    ];
    for view in views {
        let term = json!({"operand": {"source": "first", "view": document(view)}});
        let terms = [serde_json::from_value(term).unwrap()];
        let matrix = Matrix::sum(&sources, "fused", &terms).unwrap();
        let (rows, columns) = matrix.shape();
        assert_eq!([rows, columns], view.1);
        let mut found = vec![0.0; rows * columns];
        matrix.read(&(0..rows), &(0..columns), &|| false, &mut found).unwrap();
        let expected = pick(&scene.values["first"], view);
        assert_eq!(found, expected);
        let mut block = vec![0.0; 7 * 11];
        matrix.read(&(5..12), &(3..14), &|| false, &mut block).unwrap();
        let wanted =
            (5..12).flat_map(|row| expected[row * columns + 3..row * columns + 14].to_vec());
        assert_eq!(block, wanted.collect::<Vec<_>>());
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let scene = Scene::new();
    let whole: View<'_> = (0, &[EXPERTS * MATRIX], &[1]);
    let half = EXPERTS * MATRIX / 2;
    let piece = |view: View<'_>| json!({"view": document(view), "operation": 0});
    let refusal = |tensor: Value| {
        let plan = json!({
            "version": 2, "sources": scene.sources(&[]), "operations": operations(&json!({})),
            "shards": [{"file": "model.safetensors", "tensors": [tensor]}],
        });
        match Plan::from_json(&plan.to_string()) {
            Err(Error::Plan(problem)) => problem,
            other => panic!("{other:?}"),
        }
    };
    let pieces = |pieces: Value| {
        refusal(json!({"name": "fused", "shape": [EXPERTS, ROWS, COLUMNS], "pieces": pieces}))
    };
    for (given, expected) in [
        (pieces(json!([piece((0, &[half], &[1]))])), "fill"),
        (pieces(json!([piece(whole), piece((0, &[half], &[1]))])), "fill"),
        (pieces(json!([piece((0, &[half], &[2])), piece((0, &[half], &[2]))])), "filled twice"),
        (pieces(json!([piece((1, &[half], &[2]))])), "element 0 is left out"),
        (pieces(json!([piece((0, &[half + 1], &[2]))])), "does not lie within"),
        (pieces(json!([piece((0, &[usize::MAX, 3], &[usize::MAX, 1]))])), "does not lie within"),
        (pieces(json!([piece((0, &[4, 0], &[1, 1]))])), "needs as many of both"),
        (pieces(json!([piece((0, &[4, 4], &[1]))])), "needs as many of both"),
        (pieces(json!([piece((0, &[COLUMNS, ROWS], &[1, COLUMNS]))])), "no row of runs"),
        (refusal(json!({"name": "fused"})), "either an operation or pieces"),
        (
            refusal(json!({"name": "fused", "operation": 0, "pieces": [piece(whole)]})),
            "either an operation or pieces",
        ),
        (refusal(json!({"name": "fused", "pieces": [piece(whole)]})), "its shape must be given"),
        (
            refusal(json!({"name": "fused", "shape": [EXPERTS, ROWS, COLUMNS],
                           "pieces": [{"view": document(whole), "operation": 9}]})),
            "operation 9, of which the plan has 4",
        ),
    ] {
        assert!(given.contains(expected), "{given}");
        assert!(given.contains("`fused`"), "{given}");
    }
}
