//! The same bits however the work is cut: threads, tiles, SIMD levels, shards, a sample of the tiles.

use super::scene::{Case, MODELS, Scene, Shape, cases};
use crate::fixtures::{Tensor, random_floats, random_values, source, write};
use safemerge_fast::kernels::{Kernels, Level};
use safemerge_fast::merge::Progress;
use safemerge_fast::merge::stream::Options;
use safemerge_fast::merge::verify::{self, Verification, verify};
use safemerge_fast::methods::{METHODS, build};
use safemerge_fast::plan::Plan;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use std::collections::BTreeSet;

/// Rows longer than a tile of 4096 bytes, odd shapes, every dtype.
const SMALL: &[Shape] = &[
    ("scalar", Dtype::F32, &[]),
    ("empty", Dtype::F32, &[0, 4]),
    ("hollow", Dtype::BF16, &[4, 0]),
    ("vector", Dtype::F64, &[131]),
    ("matrix", Dtype::BF16, &[37, 29]),
    ("cube", Dtype::F16, &[5, 7, 6]),
    ("column", Dtype::F32, &[211, 1]),
    ("long", Dtype::BF16, &[3, 5003]),
];
/// Two chunks of an observe pass, the second of which is short; the search for quantiles samples it.
const LARGE: &[Shape] = &[("large", Dtype::BF16, &[1031, 1025])];

fn options(threads: usize, tile_bytes: usize, level: Level) -> Options {
    let kernels = Kernels::named(level.name()).unwrap();
    Options { threads, tile_bytes, kernels, ..Options::default() }
}

fn parse(scene: &Scene, cases: &[Case], shards: usize) -> Plan {
    Plan::from_json(&scene.plan(cases, shards).to_string()).unwrap()
}

/// Names the tensor in which files of one plan differ first.
fn assert_same(plan: &Plan, found: &[Vec<u8>], expected: &[Vec<u8>], how: &Options) {
    for ((shard, found), expected) in plan.shards().iter().zip(found).zip(expected) {
        for number in 0..shard.layout.len() {
            let range = shard.layout.range(number);
            let name = shard.name(number);
            assert!(found[range.clone()] == expected[range], "{name} with {how:?}");
        }
        assert!(found == expected, "the header of {}", shard.file);
    }
}

#[test]
fn the_cases_are_all_the_methods() {
    let tested: BTreeSet<_> = cases().iter().map(|case| case.method).collect();
    let known: BTreeSet<_> = METHODS.iter().map(|method| method.about.name).collect();
    assert_eq!(tested, known);
    for case in cases() {
        let each = vec![case.each.as_object().unwrap().clone(); case.operands];
        let shared = case.shared.as_object().unwrap();
        let made = build(case.method, shared, &each, case.base, "x", &[1031, 1025]).unwrap();
        let most = METHODS
            .iter()
            .map(|known| known.about)
            .find(|known| known.name == case.method)
            .unwrap()
            .passes;
        assert!(made.passes() <= most, "{case:?} makes {} passes, not {most}", made.passes());
    }
}

#[test]
fn small_tensors_do_not_depend_on_threads_tiles_or_simd() {
    let scene = Scene::new(SMALL);
    let plan = parse(&scene, &cases(), 3);
    let expected = scene.run(&plan, &options(1, 4 << 20, Level::Scalar)).unwrap();
    for shard in &expected {
        SafeTensors::deserialize(shard).unwrap();
    }
    let tiles = [4096, 8192, 1 << 20];
    let levels = Level::available();
    for threads in 1..=8 {
        // With eight thread counts every pair of tile size and level is met.
        let how = options(threads, tiles[threads % 3], levels[threads / 3 % levels.len()]);
        let found = scene.run(&plan, &how).unwrap();
        assert_same(&plan, &found, &expected, &how);
    }
}

#[test]
fn large_tensors_do_not_depend_on_threads_tiles_or_simd_and_verify() {
    let scene = Scene::new(LARGE);
    let plan = parse(&scene, &cases(), 2);
    let levels = Level::available();
    let expected = scene.run(&plan, &options(1, 4 << 20, levels[0])).unwrap();
    let ways = [(8, 8192, levels[0]), (3, 1 << 20, levels[levels.len() / 2])];
    for (threads, tile_bytes, level) in ways {
        let how = options(threads, tile_bytes, level);
        let found = scene.run(&plan, &how).unwrap();
        assert_same(&plan, &found, &expected, &how);
    }
    let check = |sample: f64, seed: u64, threads: usize| -> Verification {
        let kernels = Kernels::detect();
        let shards = plan.select(None).unwrap();
        let options = verify::Options { threads, sample, seed, kernels };
        verify(&plan, &shards, &scene.path("out"), &options, &Progress::default(), &mut || true)
            .unwrap()
    };
    let whole = check(1.0, 0, 2);
    assert_eq!((whole.bytes_checked, whole.mismatches), (whole.bytes_total, vec![]));
    // Tensors are cut by tiles that are compared and tiles that are not, in both orders.
    for seed in 0..3 {
        let part = check(0.3, seed, 4);
        assert_eq!(part.mismatches, []);
        assert!(part.bytes_checked < part.bytes_total, "seed {seed} takes every tile");
    }
}

#[test]
fn every_level_observes_large_tensors_alike() {
    // One case for each kind of pass, since the plainest level is slow.
    let kinds = ["ties", "sce", "nuslerp", "karcher", "dare_ties"];
    let mut seen = BTreeSet::new();
    let some: Vec<Case> = cases()
        .into_iter()
        .filter(|case| kinds.contains(&case.method) && seen.insert(case.method))
        .collect();
    let scene = Scene::new(LARGE);
    let plan = parse(&scene, &some, 1);
    let expected = scene.run(&plan, &options(2, 1 << 20, Level::Scalar)).unwrap();
    for level in Level::available() {
        let how = options(2, 1 << 20, level);
        assert_same(&plan, &scene.run(&plan, &how).unwrap(), &expected, &how);
    }
}

#[test]
fn sums_are_added_in_the_order_of_the_chunks() {
    // Five chunks of nearly opposite vectors: the arc's coefficients magnify the last bit of the cosine, which another
    // order of additions changes, until float32 shows it.
    let scene = Scene::with(&[("x", Dtype::F32, &[(4 << 20) + 5])], |model, _, values| {
        let shared = random_values(77, values.len());
        let step = if model == 0 { 0.0 } else { 1e-5 };
        let sign = if model == 0 { 1.0 } else { -1.0 };
        shared.zip(values).map(|(start, own)| sign * (start + step * own)).collect()
    });
    let flat = cases().into_iter().find(|case| case.method == "nuslerp").unwrap();
    let plan = parse(&scene, &[Case { base: false, ..flat }], 1);
    let level = Level::available()[0];
    let expected = scene.run(&plan, &options(1, 4 << 20, level)).unwrap();
    for threads in [2, 3, 4, 5, 8, 8] {
        let how = options(threads, 4 << 20, level);
        assert_same(&plan, &scene.run(&plan, &how).unwrap(), &expected, &how);
    }
}

#[test]
fn an_adapter_s_operand_is_merged_as_the_tensor_that_it_makes() {
    // Observe passes load operands as blends do: with the adapter. The same numbers, written out first by `linear`,
    // must give the same bits.
    let scene = Scene::new(&[("w", Dtype::F32, &[64, 48])]);
    let factor = |name: &str, seed: u64, shape: &[usize]| {
        let bytes = random_floats(seed, Dtype::F32, shape.iter().product());
        Tensor::new(name, Dtype::F32, shape, bytes)
    };
    let adapter = scene.path("adapter");
    std::fs::create_dir(&adapter).unwrap();
    let factors = [factor("a", 1, &[3, 48]), factor("b", 2, &[64, 3])];
    write(&adapter.join("model.safetensors"), &factors);
    let adapted = json!({
        "source": "base", "tensor": "w",
        "low_rank": [{
            "a": {"source": "adapter", "tensor": "a"}, "b": {"source": "adapter", "tensor": "b"},
            "scale": 0.01,
        }],
    });
    let two: Vec<Case> = cases().into_iter().filter(|case| case.operands == 2).collect();
    let mut with_adapter = scene.plan(&two, 1);
    with_adapter["sources"]["adapter"] = source(&adapter);
    let mut materialised = with_adapter.clone();
    let merge = json!({"method": "passthrough", "operands": [{"operand": adapted}]});
    materialised["operations"] = json!([{"merge": merge}]);
    materialised["shards"][0]["tensors"] = json!([{"name": "w", "operation": 0, "dtype": "F32"}]);
    let plan = Plan::from_json(&materialised.to_string()).unwrap();
    scene.run(&plan, &Options::default()).unwrap();
    std::fs::create_dir(scene.path("folded")).unwrap();
    std::fs::rename(
        scene.path("out").join("model-0.safetensors"),
        scene.path("folded").join("model.safetensors"),
    )
    .unwrap();
    let mut with_folded = with_adapter.clone();
    with_folded["sources"]["folded"] = source(&scene.path("folded"));
    let merges = |plan: &mut serde_json::Value, operand: &serde_json::Value| {
        for operation in plan["operations"].as_array_mut().unwrap() {
            operation["merge"]["operands"][1]["operand"] = operand.clone();
        }
    };
    merges(&mut with_adapter, &adapted);
    merges(&mut with_folded, &json!({"source": "folded", "tensor": "w"}));
    let [left, right] = [with_adapter, with_folded].map(|plan| {
        let plan = Plan::from_json(&plan.to_string()).unwrap();
        let found = scene.run(&plan, &Options::default()).unwrap();
        (plan, found)
    });
    assert!(two.len() > MODELS);
    assert_same(&left.0, &left.1, &right.1, &Options::default());
}
