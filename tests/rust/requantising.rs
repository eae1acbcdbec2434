//! Quantised inputs and outputs: what the engine reads and writes against codes and scales that the test decodes in f64.

use crate::fixtures::{Tensor, open, open_job, publish, source, write};
use crate::quantised::{Kind, Quantised, numbers, quantised};
use safemerge_fast::checkpoint::{Checkpoint, ReadBackend};
use safemerge_fast::difference::Matrix;
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, ShardFacts, execute};
use safemerge_fast::merge::verify::{self, verify};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

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
            let product = |left: &[f64], right: &[f64]| -> f64 {
                let pairs = left.iter().zip(right).zip(&before);
                pairs.map(|((a, b), before)| (a - before) * (b - before)).sum()
            };
            let norm = |left: &[f64]| product(left, left);
            let change = output.facts.iter().find_map(|facts| facts.changes.get(it.name)).unwrap();
            let along = product(&wanted, &found);
            let shares = [
                change.wanted / norm(&wanted),
                change.stored / norm(&found),
                1.0 + (change.along - along) / norm(&wanted),
            ];
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
