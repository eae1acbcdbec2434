//! The validator, which trusts nothing.

use crate::fixtures::{Pair, Tensor, write};
use proptest::prelude::*;
use safemerge_fast::Error;
use safemerge_fast::plan::Plan;
use safetensors::Dtype;
use serde_json::{Value, json};

fn pair() -> Pair {
    Pair::new(&[
        ("a", Dtype::BF16, &[4, 3]),
        ("b", Dtype::I64, &[2]),
        ("c", Dtype::F32, &[5]),
        ("d", Dtype::F64, &[]),
    ])
}

fn refusal(plan: &Value) -> String {
    Plan::from_json(&plan.to_string()).expect_err("must be refused").to_string()
}

#[test]
fn the_header_is_what_safetensors_reads() {
    let pair = pair();
    let plan = Plan::from_json(&pair.plan(1).to_string()).unwrap();
    let layout = &plan.shards()[0].layout;
    let mut file = plan.header(&plan.shards()[0]).unwrap();
    file.resize(layout.size, 0);
    let (length, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
    assert_eq!(length + 8, layout.header);
    assert_eq!(layout.header % 8, 0);
    assert_eq!(metadata.offset_keys(), ["a", "b", "c", "d"]);
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    for (number, tensor) in pair.first.iter().enumerate() {
        let range = layout.range(number);
        let info = metadata.info(&tensor.name).unwrap();
        assert_eq!((info.dtype, &info.shape), (tensor.dtype, &tensor.shape));
        assert_eq!(info.data_offsets.0 + layout.header, range.start);
        assert_eq!(range.len(), tensor.bytes.len());
    }
}

#[test]
fn every_false_claim_is_refused_by_name() {
    let pair = pair();
    let tensor = |plan: &mut Value, number: usize| plan["shards"][0]["tensors"][number].take();
    type Spoil = Box<dyn Fn(&mut Value)>;
    let set = |path: &'static str, value: Value| -> Spoil {
        Box::new(move |plan| *plan.pointer_mut(path).expect(path) = value.clone())
    };
    let cases: Vec<(Spoil, &str)> = vec![
        (set("/version", json!(1)), "made by an earlier version of this program"),
        (set("/version", json!(3)), "version 3"),
        (set("/shards/0/file", json!("../x.safetensors")), "../x.safetensors"),
        (set("/shards/0/file", json!("x.bin")), "x.bin"),
        (set("/shards/0/file", json!(".x.safetensors")), ".x.safetensors"),
        (set("/shards/0/tensors", json!([])), "has no tensors"),
        (set("/shards/0/tensors/0/name", json!("b")), "`b`"),
        (set("/shards/0/tensors/0/name", json!("__metadata__")), "__metadata__"),
        (set("/shards/0/tensors/0/shape", json!([3, 4])), "[3, 4]"),
        (set("/shards/0/tensors/0/shape", json!([1_u64 << 62, 8])), "[4611686018427387904, 8]"),
        (set("/shards/0/tensors/0/dtype", json!("I64")), "I64"),
        (set("/shards/0/tensors/0/dtype", json!("F4")), "F4"),
        (set("/shards/0/tensors/1/dtype", json!("U64")), "I64"),
        (set("/operations/0", json!({})), "expected value"),
        (set("/operations/0", json!({"mix": {}})), "mix"),
        (set("/shards/0/tensors/0/operation", json!(4)), "operation 4"),
        (set("/operations/0/merge/method", json!("slurp")), "slurp"),
        (set("/operations/0/merge/operands", json!([])), "at least 1 operands, found 0"),
        (set("/operations/0/merge/operands/0/operand/tensor", json!("z")), "`z`"),
        (set("/operations/0/merge/operands/0/operand/tensor", json!("c")), "[5]"),
        (set("/operations/0/merge/operands/0/operand/source", json!("third")), "third"),
        (set("/operations/0/merge/operands/0/weight", json!(1e300)), "too large for f32"),
        (set("/operations/0/merge/parameters", json!({"normalise": true})), "normalise"),
        (set("/sources/first/files/model.safetensors/size", json!(3)), "its size differs"),
        (
            set("/sources/first/files/model.safetensors/header_digest", json!("00")),
            "its header differs",
        ),
        (set("/sources/first/path", json!("/nowhere")), "/nowhere"),
        (
            Box::new(move |plan| {
                let twice = tensor(plan, 1);
                plan["shards"][0]["tensors"][1] = twice.clone();
                plan["shards"]
                    .as_array_mut()
                    .unwrap()
                    .push(json!({"file": "other.safetensors", "tensors": [twice]}));
            }),
            "stands twice",
        ),
        (
            Box::new(|plan| {
                let shard = plan["shards"][0].clone();
                plan["shards"].as_array_mut().unwrap().push(shard);
            }),
            "twice",
        ),
        (Box::new(|plan| plan["shards"][0]["colour"] = json!("red")), "colour"),
        (
            Box::new(|plan| {
                let identity = plan["sources"]["first"]["files"]["model.safetensors"].clone();
                plan["sources"]["first"]["files"]["../m.safetensors"] = identity;
            }),
            "outside its directory",
        ),
    ];
    let sound = pair.plan(1);
    Plan::from_json(&sound.to_string()).unwrap();
    for (spoil, fault) in cases {
        let mut plan = sound.clone();
        spoil(&mut plan);
        let message = refusal(&plan);
        assert!(message.contains(fault), "expected {fault:?} in {message:?}");
    }
}

#[test]
fn an_input_that_changes_is_noticed() {
    let pair = pair();
    let json = pair.plan(1).to_string();
    let plan = Plan::from_json(&json).unwrap();
    plan.check_inputs_unchanged(&plan.shards()[0]).unwrap();
    let path = pair.path("second").join("model.safetensors");
    let file = std::fs::File::options().append(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let changed = plan.check_inputs_unchanged(&plan.shards()[0]);
    assert!(matches!(changed, Err(Error::InputChanged { what: "it was modified", .. })));
    // A new time alone does not make the plan invalid: copies have one.
    Plan::from_json(&json).unwrap();
    write(&path, &[Tensor::f32("a", &[1.0])]);
    assert!(matches!(Plan::from_json(&json), Err(Error::InputChanged { .. })));
}

#[test]
fn the_digest_follows_whatever_decides_the_bytes_and_nothing_else() {
    let pair = pair();
    let digest =
        |plan: &Value| Plan::from_json(&plan.to_string()).unwrap().shards()[0].digest.clone();
    let sound = pair.plan(1);
    assert_eq!(digest(&sound), digest(&sound));
    let mut weight = sound.clone();
    weight["operations"][0]["merge"]["operands"][0]["weight"] = json!(0.81);
    assert_ne!(digest(&sound), digest(&weight));
    let mut time = sound.clone();
    time["sources"]["first"]["files"]["model.safetensors"]["mtime_ns"] = json!(1);
    assert_ne!(digest(&sound), digest(&time));
    // A source that this shard does not read does not matter to it.
    let mut unused = sound.clone();
    unused["sources"]["third"] = sound["sources"]["first"].clone();
    assert_eq!(digest(&sound), digest(&unused));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Replaces one value anywhere in a sound plan; the answer must be a plan or an error, never a panic.
    #[test]
    fn no_spoilt_plan_makes_the_validator_panic(place in any::<prop::sample::Index>(), kind in 0..7) {
        let pair = pair();
        let mut plan = pair.plan(2);
        let mut places = Vec::new();
        collect(&plan, String::new(), &mut places);
        let pointer = &places[place.index(places.len())];
        *plan.pointer_mut(pointer).unwrap() = match kind {
            0 => json!(null),
            1 => json!(-1),
            2 => json!(u64::MAX),
            3 => json!("x"),
            4 => json!([]),
            5 => json!({}),
            _ => json!([u64::MAX, u64::MAX]),
        };
        if let Ok(plan) = Plan::from_json(&plan.to_string()) {
            prop_assert!(plan.shards().iter().all(|shard| shard.layout.size < 1 << 20));
        }
    }
}

fn collect(value: &Value, path: String, places: &mut Vec<String>) {
    places.push(path.clone());
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, value)| {
                let key = key.replace('~', "~0").replace('/', "~1");
                collect(value, format!("{path}/{key}"), places);
            });
        }
        Value::Array(list) => list
            .iter()
            .enumerate()
            .for_each(|(n, value)| collect(value, format!("{path}/{n}"), places)),
        _ => {}
    }
}
