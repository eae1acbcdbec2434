//! Quantised inputs and outputs: what the engine reads and writes against codes and scales that the test decodes in f64.

use crate::fixtures::{
    Tensor, encode, noise, open, open_job, publish, random_values, source, write,
};
use half::bf16;
use safemerge_fast::checkpoint::{Checkpoint, ReadBackend};
use safemerge_fast::difference::Matrix;
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, ShardFacts, execute};
use safemerge_fast::merge::verify::{self, verify};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The number of a code, from the definition of its format.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    E4M3,
    E2M1,
    Int4,
}

impl Kind {
    fn number(self, code: u8) -> f64 {
        let float = |code: u8, exponent_bits: u32, mantissa_bits: u32, bias: i32| {
            let mantissa =
                f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
            let exponent = i32::from((code >> mantissa_bits) & ((1 << exponent_bits) - 1));
            let sign = if code >> (exponent_bits + mantissa_bits) & 1 == 1 { -1.0 } else { 1.0 };
            sign * if exponent == 0 {
                mantissa * 2_f64.powi(1 - bias)
            } else {
                (1.0 + mantissa) * 2_f64.powi(exponent - bias)
            }
        };
        match self {
            Self::E4M3 => float(code, 4, 3, 7),
            Self::E2M1 => float(code & 15, 2, 1, 1),
            Self::Int4 => f64::from(code & 15) - 8.0,
        }
    }

    /// The numbers that are written, ascending.
    fn all(self) -> Vec<f64> {
        let codes = if self == Self::E4M3 { 0..=255 } else { 0..=15 };
        let finite = codes.filter(|code| self != Self::E4M3 || code & 0x7F != 0x7F);
        let mut all: Vec<f64> = finite.map(|code| self.number(code)).collect();
        all.sort_by(f64::total_cmp);
        all
    }
}

/// A quantised tensor: what it is called, the tensors that it is stored as, and how to decode it.
#[derive(Clone)]
struct Quantised {
    name: &'static str,
    shape: Vec<usize>,
    kind: Kind,
    blocks: [usize; 2],
    codes: &'static str,
    scales: Option<&'static str>,
    stored: Vec<Tensor>,
    global: f64,
}

impl Quantised {
    fn tensor(&self, name: &str) -> &Tensor {
        self.stored.iter().find(|tensor| tensor.name == name).unwrap()
    }

    fn matrix(&self) -> [usize; 2] {
        [self.shape[self.shape.len() - 2], self.shape[self.shape.len() - 1]]
    }

    /// Number of the scale of an element.
    fn scale(&self, element: usize) -> usize {
        let [rows, columns] = self.matrix();
        let grid = [rows.div_ceil(self.blocks[0]), columns.div_ceil(self.blocks[1])];
        let (matrix, row, column) =
            (element / columns / rows, element / columns % rows, element % columns);
        (matrix * grid[0] + row / self.blocks[0]) * grid[1] + column / self.blocks[1]
    }

    /// Decodes stored tensors like its own.
    fn decode(&self, codes: &[u8], scales: &[f64]) -> Vec<f64> {
        (0..self.shape.iter().product())
            .map(|element| {
                let code = match self.kind {
                    Kind::E4M3 => codes[element],
                    _ => codes[element / 2] >> (4 * (element % 2)) & 15,
                };
                let scale = if self.scales.is_some() { scales[self.scale(element)] } else { 1.0 };
                self.kind.number(code) * scale * self.global
            })
            .collect()
    }

    fn values(&self) -> Vec<f64> {
        let scales = self.scales.map_or(vec![], |name| numbers(self.tensor(name)));
        self.decode(&self.tensor(self.codes).bytes, &scales)
    }
}

/// Scales as numbers.
fn numbers(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype {
        Dtype::F32 => {
            tensor.bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
        }
        Dtype::BF16 => {
            tensor.bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect()
        }
        Dtype::F8_E4M3 => tensor.bytes.iter().map(|&code| Kind::E4M3.number(code)).collect(),
        _ => tensor.bytes.iter().map(|&code| 2_f64.powi(i32::from(code) - 127)).collect(),
    }
}

fn quantised(seed: u64) -> Vec<Quantised> {
    // Without the codes of NaN, and so that every block has its largest code.
    let e4m3 = |count: usize| -> Vec<u8> {
        noise(seed, count)
            .into_iter()
            .map(|code| if code & 0x7F == 0x7F { 0x7E } else { code })
            .collect()
    };
    let near = |count: usize| {
        random_values(seed + 1, count).map(|value| (value.abs() + 0.1) * 0.01).collect::<Vec<f32>>()
    };
    let floats = |count: usize| encode(Dtype::F32, near(count).into_iter());
    let halves = |count: usize| encode(Dtype::BF16, near(count).into_iter());
    let powers =
        |count: usize| noise(seed + 2, count).into_iter().map(|b| 118 + b % 4).collect::<Vec<u8>>();
    let small = |count: usize| {
        noise(seed + 2, count).into_iter().map(|b| 0x28 + b % 16).collect::<Vec<u8>>()
    };
    let tensor = Tensor::new;
    let single =
        |name: &str, value: f32| Tensor::new(name, Dtype::F32, &[], value.to_le_bytes().to_vec());
    vec![
        Quantised {
            name: "block.weight",
            shape: vec![300, 200],
            kind: Kind::E4M3,
            blocks: [128, 128],
            codes: "block.weight",
            scales: Some("block.weight_scale_inv"),
            global: 1.0,
            stored: vec![
                tensor("block.weight", Dtype::F8_E4M3, &[300, 200], e4m3(60_000)),
                tensor("block.weight_scale_inv", Dtype::F32, &[3, 2], floats(6)),
            ],
        },
        Quantised {
            name: "row.weight",
            shape: vec![150, 96],
            kind: Kind::E4M3,
            blocks: [1, 96],
            codes: "row.weight",
            scales: Some("row.weight_scale"),
            global: 1.0,
            stored: vec![
                tensor("row.weight", Dtype::F8_E4M3, &[150, 96], e4m3(14_400)),
                tensor("row.weight_scale", Dtype::BF16, &[150, 1], halves(150)),
            ],
        },
        Quantised {
            name: "all.weight",
            shape: vec![130, 70],
            kind: Kind::E4M3,
            blocks: [130, 70],
            codes: "all.weight",
            scales: Some("all.weight_scale"),
            global: 1.0,
            stored: vec![
                tensor("all.weight", Dtype::F8_E4M3, &[130, 70], e4m3(9_100)),
                tensor("all.weight_scale", Dtype::F32, &[], floats(1)),
            ],
        },
        Quantised {
            name: "mx8.weight",
            shape: vec![60, 160],
            kind: Kind::E4M3,
            blocks: [1, 32],
            codes: "mx8.weight",
            scales: Some("mx8.weight_scale"),
            global: 1.0,
            stored: vec![
                tensor("mx8.weight", Dtype::F8_E4M3, &[60, 160], e4m3(9_600)),
                tensor("mx8.weight_scale", Dtype::F8_E8M0, &[60, 5], powers(300)),
            ],
        },
        Quantised {
            name: "experts.gate_up_proj",
            shape: vec![3, 40, 96],
            kind: Kind::E2M1,
            blocks: [1, 32],
            codes: "experts.gate_up_proj_blocks",
            scales: Some("experts.gate_up_proj_scales"),
            global: 1.0,
            stored: vec![
                tensor(
                    "experts.gate_up_proj_blocks",
                    Dtype::U8,
                    &[3, 40, 3, 16],
                    noise(seed, 5_760),
                ),
                tensor("experts.gate_up_proj_scales", Dtype::U8, &[3, 40, 3], powers(360)),
            ],
        },
        Quantised {
            name: "int.weight",
            shape: vec![70, 128],
            kind: Kind::Int4,
            blocks: [1, 32],
            codes: "int.weight_packed",
            scales: Some("int.weight_scale"),
            global: 1.0,
            stored: vec![
                tensor("int.weight_packed", Dtype::I32, &[70, 16], noise(seed, 4_480)),
                tensor("int.weight_scale", Dtype::BF16, &[70, 4], halves(280)),
                tensor(
                    "int.weight_shape",
                    Dtype::I32,
                    &[2],
                    [70_i32, 128].iter().flat_map(|n| n.to_le_bytes()).collect(),
                ),
            ],
        },
        Quantised {
            name: "nv.weight",
            shape: vec![50, 96],
            kind: Kind::E2M1,
            blocks: [1, 16],
            codes: "nv.weight",
            scales: Some("nv.weight_scale"),
            global: 0.125,
            stored: vec![
                tensor("nv.weight", Dtype::U8, &[50, 48], noise(seed, 2_400)),
                tensor("nv.weight_scale", Dtype::F8_E4M3, &[50, 6], small(300)),
                single("nv.weight_scale_2", 0.125),
            ],
        },
        Quantised {
            name: "packed.weight",
            shape: vec![50, 96],
            kind: Kind::E2M1,
            blocks: [1, 16],
            codes: "packed.weight_packed",
            scales: Some("packed.weight_scale"),
            global: 0.125,
            stored: vec![
                tensor("packed.weight_packed", Dtype::U8, &[50, 48], noise(seed, 2_400)),
                tensor("packed.weight_scale", Dtype::F8_E4M3, &[50, 6], small(300)),
                single("packed.weight_global_scale", 8.0),
            ],
        },
    ]
}

/// Writes a checkpoint of two shards, scales in another one than codes.
fn checkpoint(directory: &Path, tensors: &[Quantised]) {
    std::fs::create_dir(directory).unwrap();
    let all: Vec<Tensor> = tensors.iter().flat_map(|it| it.stored.clone()).collect();
    let (codes, scales): (Vec<Tensor>, Vec<Tensor>) =
        all.into_iter().partition(|tensor| tensor.bytes.len() > 2000);
    let mut map = BTreeMap::new();
    for (number, tensors) in [codes, scales].iter().enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", number + 1);
        write(&directory.join(&file), tensors);
        map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), file.clone())));
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(directory.join("model.safetensors.index.json"), index).unwrap();
}

struct Output {
    facts: Vec<ShardFacts>,
    tensors: BTreeMap<String, Tensor>,
}

fn run(plan: &Value, output: &Path, backend: ReadBackend, tile_bytes: usize) -> Output {
    let plan = open(&plan.to_string(), backend);
    let job = open_job(output).unwrap();
    let shards = plan.select(None).unwrap();
    let options = Options { tile_bytes, threads: 3, ..Options::default() };
    let facts =
        execute(&plan, &shards, &job, &options, &Progress::default(), &mut || true).unwrap();
    // Facts of what is committed are known to a run that goes on.
    let again =
        execute(&plan, &shards, &job, &options, &Progress::default(), &mut || true).unwrap();
    for (first, again) in facts.iter().zip(&again) {
        assert!(again.resumed);
        assert_eq!(again.changes, first.changes);
    }
    publish(&job, "test").unwrap();
    let options = verify::Options { threads: 2, sample: 1.0, seed: 0, kernels: options.kernels };
    let found =
        verify(&plan, &shards, output, &options, &Progress::default(), &mut || true).unwrap();
    assert_eq!((found.mismatches, found.bytes_checked), (vec![], found.bytes_total));
    let mut tensors = BTreeMap::new();
    for shard in plan.shards() {
        let bytes = std::fs::read(output.join(&shard.file)).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let found = Tensor::new(&name, view.dtype(), view.shape(), view.data().to_vec());
            tensors.insert(name, found);
        }
    }
    Output { facts, tensors }
}

fn linear() -> Value {
    json!({"merge": {"method": "linear", "parameters": {"normalize": false}, "operands": [
        {"operand": {"source": "first"}, "weight": 0.8}, {"operand": {"source": "second"}, "weight": 0.2},
    ]}})
}

struct Scene {
    directory: tempfile::TempDir,
    first: Vec<Quantised>,
    second: Vec<Quantised>,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (quantised(1), quantised(100));
        checkpoint(&directory.path().join("first"), &first);
        checkpoint(&directory.path().join("second"), &second);
        Self { directory, first, second }
    }

    fn sources(&self) -> Value {
        json!({
            "first": source(&self.directory.path().join("first")),
            "second": source(&self.directory.path().join("second")),
        })
    }

    /// 0.8 first + 0.2 second of each tensor, in f64.
    fn blended(&self) -> Vec<Vec<f64>> {
        let pairs = self.first.iter().zip(&self.second);
        let weights = (f64::from(0.8_f32), f64::from(0.2_f32));
        pairs
            .map(|(a, b)| {
                a.values()
                    .iter()
                    .zip(b.values())
                    .map(|(a, b)| weights.0 * a + weights.1 * b)
                    .collect()
            })
            .collect()
    }
}

const SETTINGS: [(ReadBackend, usize); 3] =
    [(ReadBackend::Mmap, 4 << 20), (ReadBackend::Mmap, 4096), (ReadBackend::Pread, 8192)];

#[test]
fn what_is_dequantised_is_the_blend_rounded_once() {
    let scene = Scene::new();
    let tensors: Vec<Value> = scene
        .first
        .iter()
        .map(|it| json!({"name": it.name, "operation": 0, "dtype": "F32", "shape": it.shape}))
        .collect();
    let plan = json!({
        "version": 2, "sources": scene.sources(), "operations": [linear()],
        "shards": [{"file": "model.safetensors", "tensors": tensors}],
    });
    for (number, (backend, tile)) in SETTINGS.into_iter().enumerate() {
        let output = run(&plan, &scene.directory.path().join(format!("{number}")), backend, tile);
        for (it, expected) in scene.first.iter().zip(scene.blended()) {
            let found = numbers(&output.tensors[it.name]);
            let largest = expected.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() <= 3e-7 * largest, "{}", it.name);
            }
        }
    }
}

#[test]
fn what_is_quantised_again_is_the_nearest_code_of_the_blend() {
    let scene = Scene::new();
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    let mut operations = vec![linear()];
    for it in &scene.first {
        let part = |part: &str, name: &str| json!({"name": name, "operation": 0, "encode": {"source": "first", "tensor": it.name, "part": part}});
        codes.push(part("codes", it.codes));
        scales.extend(it.scales.map(|name| part("scales", name)));
        for rider in
            it.stored.iter().filter(|t| t.name != it.codes && Some(t.name.as_str()) != it.scales)
        {
            scales.push(json!({"name": rider.name, "operation": operations.len()}));
            operations.push(json!({"copy": {"source": "first"}}));
        }
    }
    let plan = json!({
        "version": 2, "sources": scene.sources(), "operations": operations,
        "shards": [
            {"file": "model-1.safetensors", "tensors": codes},
            {"file": "model-2.safetensors", "tensors": scales},
        ],
    });
    let mut first: Option<BTreeMap<String, Tensor>> = None;
    for (number, (backend, tile)) in SETTINGS.into_iter().enumerate() {
        let output = run(&plan, &scene.directory.path().join(format!("{number}")), backend, tile);
        for (it, wanted) in scene.first.iter().zip(scene.blended()) {
            for tensor in &it.stored {
                let found = &output.tensors[&tensor.name];
                assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape));
            }
            let scales = numbers(&output.tensors[it.scales.unwrap()]);
            let found = it.decode(&output.tensors[it.codes].bytes, &scales);
            let all = it.kind.all();
            // The largest magnitude of each block nearly reaches the largest code.
            let mut largest = vec![0.0_f64; scales.len()];
            for (element, (&found, &wanted)) in found.iter().zip(&wanted).enumerate() {
                let scale = scales[it.scale(element)] * it.global;
                largest[it.scale(element)] = largest[it.scale(element)].max(wanted.abs() / scale);
                let place = wanted / scale;
                let above = all.partition_point(|&number| number < place).min(all.len() - 1);
                let nearest = all[above.saturating_sub(1)..=above]
                    .iter()
                    .map(|number| (number - place).abs())
                    .fold(f64::INFINITY, f64::min);
                let off = (found / scale - place).abs();
                assert!(
                    off <= nearest + 1e-5 * place.abs().max(1e-2),
                    "{}: {off} {nearest}",
                    it.name
                );
            }
            let most = if it.kind == Kind::Int4 { 7.0 } else { *all.last().unwrap() };
            for largest in largest {
                let exact = !it.name.starts_with("mx") && !it.name.starts_with("experts");
                let [low, high] = if exact { [0.93, 1.07] } else { [0.49, 1.34] };
                assert!(
                    (most * low..=most * high).contains(&largest),
                    "{}: {largest} of {most}",
                    it.name
                );
            }
            let before = it.values();
            let norm = |left: &[f64]| -> f64 {
                left.iter().zip(&before).map(|(a, b)| (a - b).powi(2)).sum()
            };
            let change = output.facts.iter().find_map(|facts| facts.changes.get(it.name)).unwrap();
            let shares = [change.wanted / norm(&wanted), change.stored / norm(&found)];
            assert!(
                shares.iter().all(|share| (share - 1.0).abs() < 1e-4),
                "{}: {shares:?}",
                it.name
            );
        }
        match &first {
            Some(first) => {
                for (name, tensor) in first {
                    assert_eq!(
                        output.tensors[name].bytes, tensor.bytes,
                        "{name}, {backend:?}, {tile}"
                    );
                }
            }
            None => first = Some(output.tensors),
        }
    }
}

/// Of a fused tensor some experts change; the others keep their bytes, codes and scales.
#[test]
fn what_nothing_changes_keeps_its_bytes() {
    let scene = Scene::new();
    let it = scene.first.iter().position(|it| it.name.starts_with("experts")).unwrap();
    let it = &scene.first[it];
    let (experts, rows, columns) = (it.shape[0], it.shape[1], it.shape[2]);
    // Every second row of the experts: only the odd rows of the second one change.
    let pieces: Vec<Value> = (0..experts)
        .flat_map(|expert| [0, 1].map(|odd| (expert, odd)))
        .map(|(expert, odd)| {
            let start = expert * rows * columns + odd * columns;
            json!({"view": {"start": start, "shape": [rows / 2, columns], "strides": [2 * columns, 1]},
                   "operation": usize::from(expert == 1 && odd == 1)})
        })
        .collect();
    let tensors: Vec<Value> = [("codes", it.codes), ("scales", it.scales.unwrap())]
        .iter()
        .map(|(part, name)| {
            json!({"name": name, "pieces": pieces, "encode": {"source": "first", "tensor": it.name, "part": part}})
        })
        .collect();
    let plan = json!({
        "version": 2, "sources": scene.sources(),
        "operations": [{"copy": {"source": "first"}}, linear()],
        "shards": [{"file": "model.safetensors", "tensors": tensors}],
    });
    for (number, (backend, tile)) in SETTINGS.into_iter().enumerate() {
        let output = run(&plan, &scene.directory.path().join(format!("{number}")), backend, tile);
        for name in [it.codes, it.scales.unwrap()] {
            let (before, after) = (&it.tensor(name).bytes, &output.tensors[name].bytes);
            let width = before.len() / experts / rows;
            let mut changed = 0;
            for (row, (before, after)) in before.chunks(width).zip(after.chunks(width)).enumerate()
            {
                if row / rows == 1 && row % 2 == 1 {
                    changed += usize::from(before != after);
                } else {
                    assert_eq!(before, after, "{name}, row {row}");
                }
            }
            assert!(changed > 2, "{name}: {changed}");
        }
    }
}

#[test]
fn an_analysis_reads_numbers() {
    let scene = Scene::new();
    let opened = Arc::new(Checkpoint::open(&scene.directory.path().join("first")).unwrap());
    for it in scene.first.iter().filter(|it| it.shape.len() == 2) {
        let matrix = Matrix::stored(&opened, it.name).unwrap();
        let (rows, columns) = matrix.shape();
        let values = it.values();
        let mut found = vec![0.0; 13 * 21];
        matrix.read(&(20..33), &(33..54), &|| false, &mut found).unwrap();
        assert_eq!([rows, columns], it.matrix());
        for (place, found) in found.iter().enumerate() {
            let expected = values[(20 + place / 21) * columns + 33 + place % 21];
            assert!((f64::from(*found) - expected).abs() <= 1.2e-7 * expected.abs(), "{}", it.name);
        }
    }
}
