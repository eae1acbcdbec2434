//! The table of methods, and methods that are prepared once for many tensors.

use super::scene::cases;
use safemerge_fast::kernels::Kernels;
use safemerge_fast::methods::{
    Base, Default, Flag, METHODS, Method, Scope, Slice, build, check, find,
};
use serde_json::{Map, Value, json};

fn object(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

fn blend(method: &dyn Method, operands: &[&[f32]], base: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; base.len()];
    let slice = Slice { operands, base: Some(base), first: 0 };
    method.blend(&Kernels::detect(), &method.start(), &slice, &mut out).unwrap();
    out
}

#[test]
fn flags_say_what_holds_of_methods() {
    let with = |flag: Flag| -> Vec<&str> {
        METHODS.iter().filter(|m| m.has(flag)).map(|method| method.about.name).collect()
    };
    assert_eq!(with(Flag::Votes), ["ties", "dare_ties", "breadcrumbs_ties", "della"]);
    assert_eq!(with(Flag::Sole), ["slerp", "nuslerp"]);
    assert_eq!(with(Flag::Copies), ["passthrough"]);
    assert_eq!(with(Flag::Sums), ["linear"]);
    let not: Vec<_> = METHODS.iter().filter(|m| !m.weighs()).map(|m| m.about.name).collect();
    assert_eq!(not, ["passthrough", "sce", "karcher", "model_stock", "nearswap"]);
}

#[test]
fn what_interpolates_goes_from_the_base_to_the_one_model_by_a_parameter_that_it_has() {
    let mut found = 0;
    for method in METHODS {
        let Some(name) = method.about.interpolates else { continue };
        found += 1;
        assert_eq!((method.about.base, method.about.operands), (Base::Required, (1, Some(1))));
        let (scope, parameter) = method.parameters().find(|(_, p)| p.name == name).unwrap();
        assert_eq!((scope, parameter.default), (Scope::Shared, Default::Required));
    }
    assert_eq!(found, 1);
}

#[test]
fn parameters_are_checked_without_a_tensor() {
    for case in cases() {
        let each = vec![object(case.each.clone()); case.operands];
        let shared = object(case.shared.clone());
        check(case.method, &shared, &each, case.base).unwrap();
        let problem = check(case.method, &object(json!({"no": 1})), &each, case.base).unwrap_err();
        assert!(problem.contains("no parameter `no`"), "{problem}");
    }
    let check = |method: &str, shared: Value, each: Value, base: bool| {
        let operands = vec![object(each); 2];
        check(method, &object(shared), &operands, base).unwrap_err()
    };
    let zero = json!({"weight": 0});
    assert!(check("linear", json!({}), zero.clone(), false).contains("sum to zero"));
    assert!(check("multislerp", json!({}), zero, false).contains("sum to zero"));
    assert!(check("linear", json!({}), json!({"weight": 1e300}), false).contains("too large"));
    let far = json!({"weight": 1, "density": 0.9, "epsilon": 0.2});
    assert!(check("della", json!({}), far, true).contains("0.9 ± 0.2"));
    assert!(find("lineer").unwrap_err().contains("no merge method `lineer`; known are linear"));
}

#[test]
fn a_prepared_method_makes_for_each_tensor_what_would_be_made_for_it_alone() {
    let shared = object(json!({"seed": 5}));
    let operands = vec![object(json!({"weight": 1, "density": 0.5}))];
    let prepared = check("dare_linear", &shared, &operands, true).unwrap();
    let (model, base) = (vec![1.0_f32; 4096], vec![0.0; 4096]);
    let mut seen = Vec::new();
    for name in ["a", "b"] {
        let found = blend(&*prepared.method(name, &[4096]).unwrap(), &[&model], &base);
        let alone = build("dare_linear", &shared, &operands, true, name, &[4096]).unwrap();
        assert_eq!(found, blend(&*alone, &[&model], &base));
        assert!(!seen.contains(&found), "two tensors lose the same elements");
        seen.push(found);
    }
}

#[test]
fn facts_of_another_method_are_refused() {
    let none = Map::new();
    let weighted = vec![object(json!({"weight": 1}))];
    let ties = build("ties", &none, &weighted, true, "x", &[4]).unwrap();
    let linear = build("linear", &none, &weighted, false, "x", &[4]).unwrap();
    let values = [1.0; 4];
    let slice = Slice { operands: &[&values], base: Some(&values), first: 0 };
    let problem = ties.blend(&Kernels::detect(), &linear.start(), &slice, &mut [0.0; 4]);
    assert!(problem.unwrap_err().contains("another method"));
    assert!(ties.conclude(&linear.start(), &[], &[]).unwrap_err().contains("another method"));
}
