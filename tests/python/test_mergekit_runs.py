"""Whole configurations beside mergekit's own run of them: which tensor, which layer, which parameters, which names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from configurations import HIDDEN, INTERMEDIATE, merged, plain, tensors_of, write_llama
from lora import load_checkpoint, write_lora
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import save_file

BY_KIND = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("models")
    made = {"A": write_llama(path / "A", seed=1), "deep": write_llama(path / "deep", seed=2, layers=7)}
    for seed, name in enumerate(("B", "C"), start=3):
        made[name] = write_llama(path / name, seed=seed)
        near = {
            key: a + 0.3 * b
            for (key, a), b in zip(
                load_checkpoint(made["A"]).items(), load_checkpoint(made[name]).values(), strict=True
            )
        }
        save_file(near, made[name] / "model.safetensors", {"format": "pt"})
    modules = {f"model.layers.{layer}.self_attn.q_proj": (HIDDEN, HIDDEN) for layer in range(5)}
    modules |= {f"model.layers.{layer}.mlp.up_proj": (INTERMEDIATE, HIDDEN) for layer in range(5)}
    made["lora"] = write_lora(
        path / "lora",
        modules,
        rank=2,
        seed=5,
        size=0.4,
        base_model_name_or_path=str(made["A"]),
        task_type="CAUSAL_LM",
        bias="none",
    )
    return {name: str(directory) for name, directory in made.items()}


def source(model: str, start: int, end: int, **parameters: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model, "layer_range": [start, end]}
    return {**found, "parameters": parameters} if parameters else found


def listed(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "parameters": parameters} if parameters else {"model": model}


CASES: dict[str, dict[str, Any]] = {
    "gradients and filters": {
        "merge_method": "linear",
        "models": [listed("A", weight=[0.1, 0.9, 0.4]), listed("B", weight=0.3), listed("C")],
        "parameters": {"weight": [{"filter": "mlp", "value": [1, 2]}, {"value": 0.7}]},
    },
    "a base that joins": {
        "merge_method": "linear",
        "base_model": "A",
        "models": [listed("B"), listed("C", weight=2)],
        "parameters": {"weight": [1, 0.2]},
    },
    "slerp of all layers": {
        "merge_method": "slerp",
        "base_model": "A",
        "slices": [{"sources": [source("A", 0, 5), source("B", 0, 5)]}],
        "parameters": {"t": BY_KIND},
    },
    "slerp with the base last": {
        "merge_method": "slerp",
        "base_model": "B",
        "slices": [{"sources": [source("A", 0, 5), source("B", 0, 5)]}],
        "parameters": {"t": BY_KIND},
    },
    "slerp of stacked layers": {
        "merge_method": "slerp",
        "base_model": "A",
        "slices": [
            {"sources": [source("A", 0, 3), source("deep", 2, 5)], "parameters": {"t": [0, 1]}},
            {"sources": [source("deep", 4, 7), source("A", 2, 5)]},
        ],
        "parameters": {"t": BY_KIND},
    },
    "stacked layers": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("A", 0, 3)]},
            {
                "sources": [
                    source("deep", 3, 7, scale=[{"filter": "o_proj", "value": 0.0}, {"value": [1, 0.4]}])
                ]
            },
            {"sources": [source("B", 2, 5)]},
        ],
    },
    "filters on layers": {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    source("A", 3, 5, weight=[{"filter": "layers.3.", "value": 0.3}, {"value": 1}]),
                    source("deep", 1, 3, weight=[{"filter": "layers.1.", "value": 0.1}, {"value": 1}]),
                ]
            }
        ],
        "parameters": {"normalize": False},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "A",
        "models": [
            listed("A"),
            listed("B", density=[1, 0.7, 0.1], weight=1.0),
            listed("C", density=0.33, weight=[0, 0.3, 0.7, 1]),
        ],
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "an adapter in a sum": {
        "merge_method": "linear",
        "models": [listed("A+lora", weight=0.3), listed("B", weight=0.6)],
    },
    "an adapter as a task vector": {
        "merge_method": "task_arithmetic",
        "base_model": "A",
        "models": [listed("A+lora", weight=0.3), listed("B", weight=0.6)],
    },
    "an adapter as base": {
        "merge_method": "slerp",
        "base_model": "A+lora",
        "models": [listed("B")],
        "parameters": {"t": 0.3},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_run(models: dict[str, str], tmp_path: Path, name: str) -> None:
    document = placed(CASES[name], models) | {"dtype": "float32"}
    out = tmp_path / "mergekit"
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, lora_merge_cache=str(tmp_path / "lora"), quiet=True
    )
    run_merge(MergeConfiguration.model_validate(plain(document)), str(out), options)
    found, report = merged(tmp_path, **document)
    expected = tensors_of(out)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        difference = float((found[tensor] - value).abs().max())
        assert difference < 4e-6, (tensor, difference)
    assert report.notes == ()


def placed(value: Any, models: dict[str, str]) -> Any:
    """Puts the models' directories in place of their names."""
    if isinstance(value, dict):
        return {key: placed(item, models) for key, item in value.items()}
    if isinstance(value, list):
        return [placed(item, models) for item in value]
    if isinstance(value, str) and all(part in models for part in value.split("+")):
        return "+".join(models[part] for part in value.split("+"))
    return value
