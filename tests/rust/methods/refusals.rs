//! What methods refuse, and how: one sentence that names the tensor and the way out.

use super::scene::{Case, MODELS, Scene, Shape, cases};
use safemerge_fast::Error;
use safemerge_fast::merge::stream::Options;
use safemerge_fast::methods::build;
use safemerge_fast::plan::Plan;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

const LAYOUT: &[Shape] = &[("w", Dtype::F32, &[8, 6])];

fn find(method: &str) -> Case {
    cases().into_iter().find(|case| case.method == method).expect(method)
}

#[test]
fn parameters_that_do_not_fit_are_refused_by_name() {
    let scene = Scene::new(LAYOUT);
    let changed = |method: &str, change: &dyn Fn(&mut Case)| {
        let mut case = find(method);
        change(&mut case);
        case
    };
    let refused: Vec<(Case, &[&str])> = vec![
        (changed("ties", &|c| c.shared = json!({"lamda": 1})), &["lamda", "lambda", "normalize"]),
        (
            changed("ties", &|c| c.each["gamma"] = json!(0.1)),
            &["gamma", "of an operand", "density"],
        ),
        (changed("karcher", &|c| c.each["weight"] = json!(1)), &["weight", "it has none"]),
        (changed("linear", &|c| c.each = json!({})), &["needs `weight`"]),
        (changed("slerp", &|c| c.shared = json!({})), &["needs `t`"]),
        (changed("ties", &|c| c.each["density"] = json!(-0.1)), &["density", "at least 0", "-0.1"]),
        (changed("ties", &|c| c.each["density"] = json!("half")), &["density", "number", "half"]),
        (changed("della", &|c| c.each["epsilon"] = json!(2)), &["epsilon", "from 0 to 1", "not 2"]),
        (
            changed("della", &|c| c.each["epsilon"] = json!(0.5)),
            &["epsilon", "density", "0.4 ± 0.5"],
        ),
        (changed("breadcrumbs", &|c| c.each["gamma"] = json!(1.5)), &["gamma", "from 0 to 1"]),
        (changed("karcher", &|c| c.shared = json!({"max_iter": 0})), &["max_iter", "1 to 1000"]),
        (changed("karcher", &|c| c.shared = json!({"max_iter": 2.5})), &["max_iter", "whole"]),
        (changed("dare_ties", &|c| c.shared = json!({"seed": -1})), &["seed", "whole number"]),
        (
            changed("dare_ties", &|c| c.shared = json!({"rescale": true})),
            &["rescale", "l1", "none"],
        ),
        (changed("ties", &|c| c.shared = json!({"normalize": 1})), &["normalize", "true or false"]),
        (changed("nearswap", &|c| c.shared = json!({"t": -1})), &["`t`", "at least 0"]),
        (changed("slerp", &|c| c.operands = 2), &["takes 1 operands", "found 2"]),
        (changed("nuslerp", &|c| c.operands = 3), &["takes 2 operands", "found 3"]),
        (changed("model_stock", &|c| c.operands = 1), &["at least 2 operands", "found 1"]),
        (changed("linear", &|c| c.base = true), &["`linear` has no base"]),
        (changed("karcher", &|c| c.base = true), &["`karcher` has no base"]),
        (changed("ties", &|c| c.base = false), &["`ties` needs a base"]),
        (changed("slerp", &|c| c.base = false), &["`slerp` needs a base"]),
    ];
    for (case, words) in refused {
        let plan = scene.plan(std::slice::from_ref(&case), 1).to_string();
        let message = Plan::from_json(&plan).expect_err(&format!("{case:?}")).to_string();
        assert!(message.contains("tensor `0.w`"), "{message}");
        for word in words {
            assert!(message.contains(word), "expected {word:?} in {message:?}");
        }
    }
}

#[test]
fn weights_that_sum_to_zero_are_refused_where_they_would_divide() {
    let each = |weights: &[f64]| -> Vec<Map<String, Value>> {
        weights.iter().map(|w| Map::from_iter([("weight".to_owned(), json!(w))])).collect()
    };
    let made = |method: &str, shared: Value, weights: &[f64]| {
        build(method, shared.as_object().unwrap(), &each(weights), false, "w", &[4])
    };
    for (method, switch) in [("linear", "normalize"), ("multislerp", "normalize_weights")] {
        let message = made(method, json!({}), &[0.5, 0.25, -0.75]).unwrap_err();
        assert!(message.contains(&format!("set {switch} to false")), "{message}");
        made(method, json!({switch: false}), &[0.5, 0.25, -0.75]).unwrap();
    }
    for weight in [1e300, -1e39] {
        let message = made("linear", json!({}), &[weight]).unwrap_err();
        assert!(message.contains("too large for f32"), "{message}");
    }
}

#[test]
fn rows_that_cannot_be_held_are_refused_with_a_way_out() {
    let longest = 1 << 22;
    for (method, shared) in [
        ("della", json!({})),
        ("nuslerp", json!({"nuslerp_flatten": false})),
        ("model_stock", json!({"filter_wise": true})),
    ] {
        let case = find(method);
        let each = vec![case.each.as_object().unwrap().clone(); case.operands.max(2)];
        let made =
            |columns| build(method, shared.as_object().unwrap(), &each, true, "w", &[2, columns]);
        made(longest).unwrap();
        let message = made(longest + 1).unwrap_err();
        assert!(message.contains("4194305") && message.contains("whole tensors"), "{message}");
    }
    let shared = json!({"nuslerp_flatten": false, "nuslerp_row_wise": true});
    let each = vec![json!({"weight": 1}).as_object().unwrap().clone(); 2];
    let columns =
        |count| build("nuslerp", shared.as_object().unwrap(), &each, false, "w", &[2, count]);
    columns(1 << 19).unwrap();
    let message = columns((1 << 19) + 1).unwrap_err();
    assert!(message.contains("524289") && message.contains("524288"), "{message}");
}

/// Models of which the first holds this value at one element.
fn spoilt(value: f32) -> Scene {
    Scene::with(LAYOUT, move |model, _, mut values| {
        if model == 0 {
            values[20] = value;
        }
        values
    })
}

/// What becomes of a case by itself.
fn outcome(scene: &Scene, case: &Case, allow_nonfinite: bool) -> Result<Vec<f32>, Error> {
    let plan = scene.plan(std::slice::from_ref(case), 1);
    let plan = Plan::from_json(&plan.to_string()).unwrap();
    let options = Options { allow_nonfinite, ..Options::default() };
    let files = scene.run(&plan, &options)?;
    let data = &files[0][plan.shards()[0].layout.range(0)];
    Ok(data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
}

/// Methods that sum over whole tensors, or rows, spread one bad value over all of them.
fn sums(case: &Case) -> bool {
    ["slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce"].contains(&case.method)
        || case.shared["rescale"] == "l1"
}

#[test]
fn bad_values_of_an_input_never_pass_unnoticed() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let scene = spoilt(value);
        for case in cases() {
            let error = outcome(&scene, &case, false).expect_err(&format!("{value} in {case:?}"));
            let message = error.to_string();
            assert!(message.contains("`w`") || message.contains("`0.w`"), "{message}");
            assert!(message.contains("NaN or infinity") && message.contains("repair"), "{message}");
            assert!(!scene.path("out").exists(), "{case:?} left something");
        }
    }
}

#[test]
fn bad_values_that_are_allowed_change_no_other_element() {
    let (clean, scene) = (Scene::new(LAYOUT), spoilt(f32::NAN));
    for case in cases() {
        let found = outcome(&scene, &case, true);
        if sums(&case) {
            // There is no telling what such a sum should be.
            let message = found.expect_err(&format!("{case:?}")).to_string();
            assert!(message.contains("NaN or infinity") && message.contains("repair"), "{message}");
            continue;
        }
        let found = found.unwrap();
        if case.each.get("density").is_some() {
            // The NaN counts as the largest element, so that ranks shift.
            assert!(found.iter().enumerate().all(|(n, v)| n == 20 || v.is_finite()), "{case:?}");
            continue;
        }
        let expected = outcome(&clean, &case, false).unwrap();
        for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(if place == 20 { found.is_nan() } else { found == expected }, "{case:?}");
        }
    }
}

#[test]
fn models_without_a_mean_direction_are_refused() {
    // Three vectors at 120 degrees: no weighted mean of their units has a direction.
    let scene = Scene::with(&[("w", Dtype::F64, &[2])], |model, _, _| match model {
        0 => vec![1.0, 0.0],
        1 => vec![-0.5, 0.866_025_4],
        2 => vec![-0.5, -0.866_025_4],
        _ => vec![0.0, 0.0],
    });
    let mut plan = scene.plan(
        &[Case {
            method: "multislerp",
            operands: MODELS,
            base: false,
            shared: json!({"eps": 1e-6}),
            each: json!({"weight": 1}),
        }],
        1,
    );
    for operand in plan["operations"][0]["merge"]["operands"].as_array_mut().unwrap() {
        operand["weight"] = json!(1.0);
    }
    let plan = Plan::from_json(&plan.to_string()).unwrap();
    let message = scene.run(&plan, &Options::default()).unwrap_err().to_string();
    assert!(message.contains("`0.w`") && message.contains("use other weights"), "{message}");
}
