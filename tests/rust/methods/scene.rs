//! Checkpoints of related models, and plans that merge them by every method.

use crate::fixtures::{self, encode, open_job, publish, random_values, source, write_raw};
use safemerge_fast::Result;
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::{Options, execute};
use safemerge_fast::plan::Plan;
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use tempfile::TempDir;

/// A method with parameters under which it does all it can.
#[derive(Debug, Clone)]
pub struct Case {
    pub method: &'static str,
    pub operands: usize,
    pub base: bool,
    pub shared: Value,
    /// Parameters of every operand; each gets a weight of its own if there is one.
    pub each: Value,
}

fn case(method: &'static str, operands: usize, base: bool, shared: Value, each: Value) -> Case {
    Case { method, operands, base, shared, each }
}

/// Every method, most of them in several ways.
pub fn cases() -> Vec<Case> {
    let weight = || json!({"weight": 1});
    let sparse = || json!({"weight": 1, "density": 0.4});
    let l1 = || json!({"rescale": "l1"});
    let band = json!({"weight": 1, "density": 0.4, "gamma": 0.1});
    let ranked = json!({"weight": 1, "density": 0.4, "epsilon": 0.2});
    vec![
        case("linear", 3, false, json!({}), weight()),
        case("passthrough", 1, false, json!({}), json!({"scale": 0.3})),
        case("task_arithmetic", 2, true, json!({"lambda": 0.7, "normalize": true}), weight()),
        case("ties", 3, true, json!({}), sparse()),
        case("ties", 2, true, l1(), sparse()),
        case("dare_linear", 2, true, json!({"seed": 3}), sparse()),
        case("dare_ties", 3, true, l1(), sparse()),
        case("breadcrumbs", 2, true, json!({}), band.clone()),
        case("breadcrumbs_ties", 2, true, l1(), band),
        case("della", 2, true, json!({}), ranked.clone()),
        case("della_linear", 2, true, l1(), ranked),
        case("sce", 3, true, json!({"select_topk": 0.3}), json!({})),
        case("sce", 2, true, json!({}), json!({})),
        case("slerp", 1, true, json!({"t": 0.3}), json!({})),
        case("nuslerp", 2, true, json!({}), weight()),
        case("nuslerp", 2, false, json!({"nuslerp_flatten": false}), weight()),
        case(
            "nuslerp",
            2,
            true,
            json!({"nuslerp_flatten": false, "nuslerp_row_wise": true}),
            weight(),
        ),
        case("multislerp", 3, true, json!({}), weight()),
        case("karcher", 3, false, json!({}), json!({})),
        case("model_stock", 3, true, json!({}), json!({})),
        case("model_stock", 2, true, json!({"filter_wise": true}), json!({})),
        case("nearswap", 1, true, json!({"t": 0.05}), json!({})),
    ]
}

/// A tensor of every model: name, dtype, shape.
pub type Shape = (&'static str, Dtype, &'static [usize]);

/// Models on disk: `base`, and `model0` to `model2`, which are the base plus updates a tenth as large.
pub struct Scene {
    directory: TempDir,
    layout: Vec<Shape>,
}

pub const MODELS: usize = 3;

impl Scene {
    /// Random values; data starts at an odd offset, so that nothing in the files is aligned.
    pub fn new(layout: &[Shape]) -> Self {
        Self::with(layout, |_, _, values| values)
    }

    /// Values as `change(model, tensor, values)` returns them; the base is model 3.
    pub fn with(layout: &[Shape], change: impl Fn(usize, &str, Vec<f32>) -> Vec<f32>) -> Self {
        let scene =
            Self { directory: tempfile::tempdir().expect("fixture"), layout: layout.to_vec() };
        for model in 0..=MODELS {
            let (mut header, mut data) = (Map::new(), Vec::new());
            for (&(name, dtype, shape), number) in layout.iter().zip(0_u64..) {
                let count = shape.iter().product();
                let update = random_values(1000 * (model as u64 + 1) + number, count);
                let share = if model == MODELS { 0.0 } else { 0.1 };
                let values = random_values(number, count).zip(update);
                let values = values.map(|(start, update)| start + share * update).collect();
                let start = data.len();
                data.extend(encode(dtype, change(model, name, values).into_iter()));
                let entry = json!({
                    "dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, data.len()],
                });
                header.insert(name.to_owned(), entry);
            }
            let mut text = Value::Object(header).to_string();
            text.push_str(if text.len().is_multiple_of(2) { " " } else { "" });
            let path = scene.path(&role(model));
            std::fs::create_dir(&path).expect("fixture");
            write_raw(&path.join("model.safetensors"), &text, &data);
        }
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Every tensor by every case, as `<number of the case>.<tensor>`, over `shards` files.
    pub fn plan(&self, cases: &[Case], shards: usize) -> Value {
        let mut tensors: Vec<Value> = Vec::new();
        for (number, case) in cases.iter().enumerate() {
            for &(name, dtype, shape) in &self.layout {
                let merge = merge(case, name);
                tensors.push(json!({
                    "name": format!("{number}.{name}"), "dtype": dtype.to_string(), "shape": shape,
                    "merge": merge,
                }));
            }
        }
        let per_shard = tensors.len().div_ceil(shards).max(1);
        let files = tensors.chunks(per_shard).enumerate().map(|(number, tensors)| {
            json!({"file": format!("model-{number}.safetensors"), "tensors": tensors})
        });
        let sources: Map<String, Value> =
            (0..=MODELS).map(|model| (role(model), source(&self.path(&role(model))))).collect();
        fixtures::plan(sources.into(), files.collect())
    }

    /// Executes a plan and gives the bytes of its files.
    pub fn run(&self, plan: &Plan, options: &Options) -> Result<Vec<Vec<u8>>> {
        let path = self.path("out");
        let output = open_job(&path)?;
        let shards = plan.select(None)?;
        execute(plan, &shards, &output, options, &Progress::default(), &mut || true)?;
        publish(&output, "test")?;
        let files = plan.shards().iter().map(|shard| path.join(&shard.file));
        Ok(files.map(|file| std::fs::read(file).expect("output")).collect())
    }
}

fn role(model: usize) -> String {
    if model == MODELS { "base".to_owned() } else { format!("model{model}") }
}

fn merge(case: &Case, tensor: &str) -> Value {
    let operand = |model: usize| json!({"source": role(model), "tensor": tensor});
    let operands: Vec<Value> = (0..case.operands)
        .map(|number| {
            let mut parameters = case.each.clone();
            let mut entry = json!({"operand": operand(number)});
            if parameters.as_object_mut().and_then(|all| all.remove("weight")).is_some() {
                entry["weight"] = json!([0.7, 0.4, -0.2][number]);
            }
            entry["parameters"] = parameters;
            entry
        })
        .collect();
    let mut merge = json!({"method": case.method, "parameters": case.shared, "operands": operands});
    if case.base {
        merge["base"] = operand(MODELS);
    }
    merge
}
