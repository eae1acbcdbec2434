"""Configurations in mergekit's format: what of them reaches the plan, for every method of the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from configurations import merged, write_llama

from safemerge_fast import _engine
from safemerge_fast.plan.methods import known_methods

NAME = "model.layers.1.self_attn.q_proj.weight"

# Parameters as configurations have them, of the whole and of the models; then the same as the plan must have them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "linear": ({"normalize": 0}, {"weight": [0, 1]}, {"normalize": False}, {"weight": 1.0}),
    "task_arithmetic": (
        {"lambda": "1e-1", "normalize": True},
        {"weight": 0.5},
        {"lambda": 0.1, "normalize": True},
        {"weight": 0.5},
    ),
    "ties": (
        {"int8_mask": True, "rescale": True, "seed": 3},
        {"weight": 0.5, "density": [0.1, 0.7]},
        {"lambda": 1.0, "normalize": True, "rescale": "l1", "seed": 3},
        {"weight": 0.5, "density": 0.7},
    ),
    "dare_linear": (
        {"rescale": False},
        {"weight": 0.5, "density": 0.3},
        {"lambda": 1.0, "normalize": False, "rescale": "none", "seed": 0},
        {"weight": 0.5, "density": 0.3},
    ),
    "dare_ties": (
        {"rescale": True, "int8_mask": 1},
        {"weight": 0.5, "density": 0.3},
        {"lambda": 1.0, "normalize": False, "rescale": "probability", "seed": 0},
        {"weight": 0.5, "density": 0.3},
    ),
    "breadcrumbs": (
        {},
        {"weight": 0.5, "density": 0.9, "gamma": 0.02},
        {"lambda": 1.0, "normalize": False, "rescale": "none", "seed": 0},
        {"weight": 0.5, "density": 0.9, "gamma": 0.02},
    ),
    "breadcrumbs_ties": (
        {"density": 0.9},
        {"weight": 0.5},
        {"lambda": 1.0, "normalize": False, "rescale": "none", "seed": 0},
        {"weight": 0.5, "density": 0.9, "gamma": 0.01},
    ),
    "della": (
        {"rescale": "l1"},
        {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
        {"lambda": 1.0, "normalize": True, "rescale": "l1", "seed": 0},
        {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    ),
    "della_linear": (
        {"weight": 0.5, "density": 0.5},
        {},
        {"lambda": 1.0, "normalize": False, "rescale": "probability", "seed": 0},
        {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    ),
    "sce": ({"select_topk": 0.5}, {}, {"select_topk": 0.5, "seed": 0}, {}),
    "slerp": ({"t": [{"filter": "mlp", "value": 0}, {"value": [0, 0.4]}]}, {}, {"t": 0.4}, {}),
    "nuslerp": (
        {"nuslerp_row_wise": True, "nuslerp_flatten": False},
        {"weight": 2},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        {"weight": 2.0},
    ),
    "multislerp": ({}, {"weight": 2}, {"normalize_weights": True, "eps": 1e-8}, {"weight": 2.0}),
    "karcher": ({"max_iter": 5.0, "tol": "1e-4"}, {}, {"max_iter": 5, "tol": 1e-4}, {}),
    "model_stock": ({"filter_wise": True}, {}, {"filter_wise": True}, {}),
    "nearswap": ({"t": 0.1}, {}, {"t": 0.1}, {}),
    "passthrough": ({}, {"scale": 0.5}, {}, {"scale": 0.5}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    return {name: write_llama(path / name, seed=seed, layers=2) for seed, name in enumerate("abc")}


def test_there_is_a_case_for_every_method() -> None:
    assert CASES.keys() == known_methods().keys() == {method.name for method in _engine.methods()}


@pytest.mark.parametrize("name", CASES)
def test_what_reaches_the_plan(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    shared, own, planned_shared, planned_own = CASES[name]
    method = known_methods()[name]
    count = min(2, method.most_operands or 2)
    bases = {"none": [False], "optional": [False, True], "required": [True]}[method.base]
    for has_base in bases:
        operands = list("bc")[:count]
        document: dict[str, Any] = {
            "merge_method": name,
            "models": [{"model": models[operand], "parameters": own} for operand in operands],
            "parameters": shared,
        }
        if has_base:
            document["base_model"] = models["a"]
        _, report = merged(tmp_path, **document)
        plan = json.loads((Path(report.output) / "safemerge_plan.json").read_text())
        (shard,) = plan["shards"]
        number = next(tensor["operation"] for tensor in shard["tensors"] if tensor["name"] == NAME)
        merge = plan["operations"][number]["merge"]
        expected: dict[str, Any] = {"method": name, "parameters": planned_shared}
        if has_base:
            expected["base"] = {"source": "a"}
        expected["operands"] = []
        for operand in operands:
            parameters = dict(planned_own)
            entry: dict[str, Any] = {"operand": {"source": operand}}
            if "weight" in parameters:
                entry["weight"] = parameters.pop("weight")
            if parameters:
                entry["parameters"] = parameters
            expected["operands"].append(entry)
        assert merge == expected
        assert report.notes == ()
