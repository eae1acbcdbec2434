//! The validator, which trusts nothing.

use crate::fixtures::{Pair, Tensor, write};
use proptest::prelude::*;
use safemerge_fast::Error;
use safemerge_fast::checkpoint::{Checkpoint, ReadBackend};
use safemerge_fast::plan::{GivenSources, OutputTensor, Plan};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::sync::Arc;

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

#[test]
fn what_is_left_out_is_the_input_s_own() {
    let pair = pair();
    let spelled = pair.plan(1);
    let mut short = spelled.clone();
    for tensor in short["shards"][0]["tensors"].as_array_mut().unwrap() {
        let fields = tensor.as_object_mut().unwrap();
        fields.remove("dtype").unwrap();
        fields.remove("shape").unwrap();
    }
    // One operation for all floats, one for the integers.
    let mut merge = spelled["operations"][0].clone();
    for number in 0..2 {
        let operand = &mut merge["merge"]["operands"][number]["operand"];
        operand.as_object_mut().unwrap().remove("tensor").unwrap();
    }
    short["operations"] = json!([{"copy": {"source": "first"}}, merge]);
    for (number, operation) in [1, 0, 1, 1].into_iter().enumerate() {
        short["shards"][0]["tensors"][number]["operation"] = json!(operation);
    }
    let [long, short] = [spelled, short].map(|plan| Plan::from_json(&plan.to_string()).unwrap());
    let (left, right) = (&long.shards()[0], &short.shards()[0]);
    assert_eq!(long.header(left).unwrap(), short.header(right).unwrap());
    assert_eq!(long.traffic(), short.traffic());
    for number in 0..4 {
        let [a, b] = [long.tensor(left, number).unwrap(), short.tensor(right, number).unwrap()];
        assert_eq!((&a.name, &a.range), (&b.name, &b.range));
        let inputs = |tensor: &OutputTensor| -> Vec<_> {
            let inputs = tensor.operation.reads().map(|(input, _)| input);
            inputs.map(|input| (input.path().to_owned(), input.range.clone())).collect()
        };
        assert_eq!(inputs(&a), inputs(&b));
        assert_eq!(inputs(&a).len(), if number == 1 { 1 } else { 2 });
    }
}

#[test]
fn the_digest_does_not_know_how_the_plan_is_written() {
    let pair = pair();
    let digest =
        |plan: &Value| Plan::from_json(&plan.to_string()).unwrap().shards()[0].digest.clone();
    let sound = pair.plan(1);
    let mut short = sound.clone();
    short["shards"][0]["tensors"][0].as_object_mut().unwrap().remove("dtype").unwrap();
    // Another order of the table, with an entry that nobody uses.
    let mut turned: Vec<Value> = sound["operations"].as_array().unwrap().clone();
    turned.reverse();
    turned.push(json!({"copy": {"source": "second"}}));
    short["operations"] = turned.into();
    for number in 0..4 {
        short["shards"][0]["tensors"][number]["operation"] = json!(3 - number);
    }
    assert_eq!(digest(&sound), digest(&short));
    // But another operation for a tensor is another output.
    short["shards"][0]["tensors"][1]["operation"] = json!(4);
    assert_ne!(digest(&sound), digest(&short));
}

#[test]
fn plans_of_other_versions_and_shapes_are_refused_whatever_else_they_hold() {
    let old = json!({"version": 1, "sources": {}, "shards": []}).to_string();
    let message = Plan::from_json(&old).unwrap_err().to_string();
    assert!(message.contains("earlier version") && message.contains("merge again"), "{message}");
    for text in ["", "[]", "null", "{", r#"{"version": 2}"#, r#"{"version": "2"}"#] {
        assert!(matches!(Plan::from_json(text), Err(Error::Plan(_))), "{text}");
    }
    // Deeper than any plan, within a value that may be anything.
    let pair = pair();
    let mut plan = pair.plan(1);
    plan["operations"][0]["merge"]["parameters"] = json!({"t": "deep"});
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let text = plan.to_string().replace("\"deep\"", &deep);
    assert!(Plan::from_json(&text).unwrap_err().to_string().contains("recursion limit"));
}

#[test]
fn only_the_files_that_a_plan_lists_are_read() {
    let pair = pair();
    let more = Tensor::f32("c", &[1.0, 2.0, 3.0, 4.0, 5.0]);
    write(&pair.path("first").join("more.safetensors"), &[more]);
    let mut plan = pair.plan(1);
    // An index that places `c` in the other file, which the plan does not list.
    let weights = ["a", "b", "d"].map(|name| (name.to_owned(), json!("model.safetensors")));
    let mut map: serde_json::Map<String, Value> = weights.into_iter().collect();
    map.insert("c".to_owned(), json!("more.safetensors"));
    let first = pair.path("first");
    std::fs::rename(first.join("model.safetensors"), first.join("one.safetensors")).unwrap();
    let index =
        json!({"weight_map": map}).to_string().replace("model.safetensors", "one.safetensors");
    std::fs::write(first.join("model.safetensors.index.json"), index).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&first).unwrap());
    let identity = plan["sources"]["first"]["files"]["model.safetensors"].take();
    plan["sources"]["first"]["files"] = json!({"one.safetensors": identity});
    let given: GivenSources = [("first".to_owned(), checkpoint)].into();
    let refused = Plan::open(plan.to_string().as_bytes(), ReadBackend::Auto, &given, None);
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("more.safetensors") && message.contains("does not list"), "{message}");
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
