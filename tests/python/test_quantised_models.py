"""Quantised models with experts: merged, loaded by transformers, compared with dense merges of decoded models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense import load
from expert_models import matrices
from quantised_experts import (
    FAMILIES,
    Key,
    assert_loaded,
    cosines,
    decoded,
    dense_model,
    logits,
    merge_dense,
    write_experts_quartet,
)
from quantised_formats import BF16
from quantised_models import Role, same_bytes
from test_experts import key_of
from torch import Tensor

import safemerge_fast
from safemerge_fast.report.report import Report

ALPHA, TAU = 0.8, 0.45


@dataclass(frozen=True)
class World:
    """A quartet, decoded and loaded by transformers.

    Attributes:
        key: Of FAMILIES.
        path: Where it lies.
        roles: The models on disk.
        models: The models in memory, in float32.
    """

    key: str
    path: Path
    roles: dict[str, Role]
    models: dict[str, Any]

    def merge(self, output: Path, **settings: Any) -> Report:
        paths = {role: str(model.path) for role, model in self.roles.items()}
        wanted = {"threshold": TAU, "alpha": ALPHA, "device": "cpu"} | settings
        return safemerge_fast.merge(**paths, output=str(output), **wanted)

    def expected(self, report: Report) -> Any:
        """What the report says was merged, done by torch."""
        experts: set[Key] = set()
        parameters: set[str] = set()
        prefix = FAMILIES[self.key].prefix
        for tensor in report.tensors:
            for module in tensor.module_reports():
                if not module.merged:
                    continue
                if (key := key_of(module.name)) is None:
                    parameters.add(tensor.name.removeprefix(prefix))
                else:
                    experts.add(key)
        return merge_dense(self.models["finetuned"], self.models["safe"], experts, parameters, ALPHA)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Made when they are asked for; read them, never change them."""
    made: dict[str, World] = {}

    class Made(dict[str, World]):
        def __missing__(self, key: str) -> World:
            path = tmp_path_factory.mktemp("world")
            roles = write_experts_quartet(path, key)
            family = FAMILIES[key]
            models = {
                role: dense_model(family, decoded(family, model.path, model.forms), path / f"dense-{role}")
                for role, model in roles.items()
            }
            made[key] = World(key, path, roles, models)
            self[key] = made[key]
            return made[key]

    return Made()


def loaded(path: Path) -> Any:
    """As transformers loads an output by itself."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert_loaded(info)
    return model


def loaded_part(path: Path, key: str, forms: dict[str, Any], scratch: Path) -> Any:
    """As transformers loads what our decoder makes of an output."""
    family = FAMILIES[key]
    return dense_model(family, decoded(family, path, forms), scratch)


def assert_same_parameters(found: Any, expected: Any, *, rounded: bool = False) -> None:
    left, right = found.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        wanted = tensor.to(BF16).float() if rounded else tensor
        assert torch.equal(left[name], wanted), name


KEYS = list(FAMILIES)


@pytest.mark.parametrize("key", KEYS)
def test_each_module_is_scored_and_decided_by_decoded_weights(
    worlds: dict[str, World], tmp_path: Path, key: str
) -> None:
    world = worlds[key]
    report = world.merge(tmp_path / "out")
    expected = cosines(world.models)
    found = {}
    for tensor in report.tensors:
        if tensor.analysed:
            for module in tensor.module_reports():
                if (place := key_of(module.name)) is not None:
                    found[place] = module
    assert found.keys() == expected.keys()
    for place, cosine in expected.items():
        assert found[place].rho == pytest.approx(cosine, abs=1e-6), place
        assert found[place].merged == (cosine < TAU), place
    assert {module.merged for module in found.values()} == {True, False}, "the threshold divides them"


@pytest.mark.parametrize("key", KEYS)
def test_all_dequantised_equals_the_dense_merge(worlds: dict[str, World], tmp_path: Path, key: str) -> None:
    world = worlds[key]
    report = world.merge(tmp_path / "out", encode="all")
    expected = world.expected(report)
    if FAMILIES[key].prefix:
        found = loaded_part(tmp_path / "out", key, {}, tmp_path / "part")
    else:
        found = loaded(tmp_path / "out")
    assert_same_parameters(found, expected, rounded=True)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.to(BF16).float())
    assert np.array_equal(logits(found), logits(expected))
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert {tensor.dtype for tensor in load(tmp_path / "out").values()} <= {BF16, torch.float32, torch.int64}
    safemerge_fast.verify(output=str(tmp_path / "out"))


@pytest.mark.parametrize("key", KEYS)
def test_kept_formats_equal_the_dense_merge_within_their_rounding(
    worlds: dict[str, World], tmp_path: Path, key: str
) -> None:
    world, family = worlds[key], FAMILIES[key]
    report = world.merge(tmp_path / "out")
    finetuned = world.roles["finetuned"]
    expected = world.expected(report)
    found = loaded_part(tmp_path / "out", key, dict(finetuned.forms), tmp_path / "part")
    if family.loads:
        assert_same_parameters(loaded(tmp_path / "out"), found)
    # The dense merge, quantised by the second encoder where it was merged.
    plain = decoded(family, finetuned.path, finetuned.forms)
    dense = dense_tensors(expected, tmp_path / "dense", family)
    merged = {tensor.name for tensor in report.tensors if any(m.merged for m in tensor.module_reports())}
    now, before = load(tmp_path / "out"), finetuned.stored
    for name, form in finetuned.forms.items():
        if name not in merged:
            assert all(same_bytes(now[part], before[part]) for part in form.names(name)), name
            continue
        bare = name.removeprefix(family.prefix)
        wanted = dense[bare].transpose(-1, -2) if family.turned else dense[bare]
        numbers = wanted.double().numpy()
        coded = form.decode(name, form.encode(name, numbers, like=now))
        was = form.decode(name, before)
        # Rows that nothing changed keep what they are stored as, in fused tensors too.
        changed = (numbers != was.astype(np.float32)).any(axis=-1, keepdims=True)
        decode = form.decode(name, now)
        error, best = np.linalg.norm(decode - numbers), np.linalg.norm(coded - numbers)
        assert error <= best * 1.001 + 1e-9, name
        assert changed.any(), name
        plain[bare] = torch.from_numpy(coded).transpose(-1, -2) if family.turned else torch.from_numpy(coded)
    for name, tensor in dense.items():
        if family.prefix + name not in finetuned.forms:
            plain[name] = tensor.to(BF16).float()
    coded_model = dense_model(family, plain, tmp_path / "coded")
    exact, quantised, ours = logits(expected), logits(coded_model), logits(found)
    rounding = np.linalg.norm(quantised - exact)
    assert 0 < rounding < 0.5 * np.linalg.norm(exact)
    assert np.linalg.norm(ours - quantised) <= 0.1 * rounding
    assert np.linalg.norm(ours - exact) <= 1.1 * rounding
    safemerge_fast.verify(output=str(tmp_path / "out"))


def dense_tensors(model: Any, scratch: Path, family: Any) -> dict[str, Tensor]:
    """A model's tensors by the names and in the layout of its checkpoints."""
    model.save_pretrained(scratch, save_original_format=not family.stacked)
    return load(scratch)


@pytest.mark.parametrize("key", KEYS)
def test_changed_modules_dequantised_load_beside_quantised_ones(
    worlds: dict[str, World], tmp_path: Path, key: str
) -> None:
    """Of all layers but the first, so that something stays quantised."""
    world, family = worlds[key], FAMILIES[key]
    report = world.merge(tmp_path / "out", encode="bfloat16", threshold=1.0, exclude=r"layers\.0\.")
    still = {tensor.name for tensor in report.tensors if tensor.encoding is not None}
    finetuned = world.roles["finetuned"]
    forms = {name: form for name, form in finetuned.forms.items() if name in still}
    found = loaded_part(tmp_path / "out", key, forms, tmp_path / "part")
    expected = dense_tensors(world.expected(report), tmp_path / "dense", family)
    dense = dense_model(
        family,
        {
            name: tensor if family.prefix + name in still else tensor.to(BF16).float()
            for name, tensor in expected.items()
        },
        tmp_path / "rounded",
    )
    assert_same_parameters(found, dense)
    if family.loads:
        assert_same_parameters(loaded(tmp_path / "out"), dense)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.get("text_config", config).get("quantization_config")
    if not still:
        assert quantization is None
        return
    listed = quantization["ignore" if family.prefix else "modules_to_not_convert"]
    lost = {name.rpartition(".")[0] for name in finetuned.forms} - {name.rpartition(".")[0] for name in still}
    if family.kind == "deepseek_v3" and not family.prefix:
        assert "lm_head" in listed
    assert lost
    for name in lost:
        assert any(name == entry or name.startswith(f"{entry}.") for entry in listed), name
    assert not any(name.rpartition(".")[0].startswith(entry) for name in still for entry in listed)


@pytest.mark.parametrize("encode", ["keep", "bfloat16"])
@pytest.mark.parametrize("key", ["deepseek fp8", "qwen3-moe fp8", "qwen3-moe fp8 stacked", "mixtral fp8"])
def test_transformers_finds_each_module_as_its_configuration_says(
    worlds: dict[str, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, encode: str
) -> None:
    """As on a graphics card: codes and scales are loaded as they are, which needs no card as long as nothing runs."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    world = worlds[key]
    settings = {"threshold": 1.0, "exclude": r"layers\.0\."} if encode == "bfloat16" else {}
    report = world.merge(tmp_path / "out", encode=encode, **settings)
    assert any(tensor.merged for tensor in report.tensors)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16, output_loading_info=True)
    assert_loaded(info)
    found = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float8_e4m3fn}
    assert found
    assert any(name.startswith("model.layers.1.") for name in found) == (encode == "keep")
    stored = load(tmp_path / "out")
    for name in found & stored.keys():
        assert same_bytes(model.get_parameter(name).detach(), stored[name]), name


def test_matrices_of_a_world_are_related(worlds: dict[str, World]) -> None:
    """The fixtures: roles differ in each expert, and not by much."""
    world = worlds["deepseek fp8"]
    left, right = (dict(matrices(world.models[role])) for role in ("aligned", "finetuned"))
    for key, matrix in left.items():
        assert 0 < (matrix - right[key]).norm() < 0.3 * matrix.norm()
