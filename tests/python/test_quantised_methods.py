"""Every method, and adapters of experts, on quantised models: the same as on the decoded ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from dense import load
from quantised_experts import (
    FAMILIES,
    decoded,
    dense_model,
    write_experts_quartet,
    write_role,
)
from quantised_formats import BF16, FORMS
from quantised_models import Role, llama_quartet, same_bytes
from test_quantised_models import loaded
from torch import Tensor

import safemerge_fast
from safemerge_fast._engine import methods

METHODS = [method.name for method in methods() if method.weighs]
LLAMA, GPT_OSS = "llama", "gpt-oss mxfp4"


def plain(path: Path, role: Role, tensors: dict[str, Tensor]) -> Path:
    """A model with the same numbers in float32."""
    config = json.loads((role.path / "config.json").read_text())
    config.pop("quantization_config", None)
    numbers = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    return write_checkpoint(path, numbers, config, shards=2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Quartets that are quantised, and the same decoded."""
    path = tmp_path_factory.mktemp("pairs")
    llama = llama_quartet(path / "llama", FORMS["block fp8"]).roles
    gpt_oss = write_experts_quartet(path / "gpt-oss", GPT_OSS)
    found = {}
    for key, roles in ((LLAMA, llama), (GPT_OSS, gpt_oss)):
        numbers = {
            role: model.single() if key == LLAMA else decoded(FAMILIES[key], model.path, model.forms)
            for role, model in roles.items()
        }
        dense = {role: plain(path / key / role, model, numbers[role]) for role, model in roles.items()}
        found[key] = (
            {role: str(model.path) for role, model in roles.items()},
            {role: str(directory) for role, directory in dense.items()},
        )
    return found


@pytest.mark.parametrize("key", [LLAMA, GPT_OSS])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_makes_the_same_of_codes_as_of_numbers(
    pairs: dict[str, tuple[dict[str, str], dict[str, str]]], tmp_path: Path, method: str, key: str
) -> None:
    """gpt-oss' experts are also turned on the way."""
    for name, roles in zip(("codes", "numbers"), pairs[key], strict=True):
        report = safemerge_fast.merge(
            **roles, output=str(tmp_path / name), encode="all", dtype="bfloat16", method=method, threshold=0.5,
            device="cpu", force=True,
        )  # fmt: skip
        assert any(tensor.merged for tensor in report.tensors)
    codes, numbers = load(tmp_path / "codes"), load(tmp_path / "numbers")
    assert codes.keys() == numbers.keys()
    assert all(same_bytes(codes[name], numbers[name]) for name in codes)


def write_expert_adapter(path: Path, model: Any) -> Any:
    """An adapter of all experts, trained by nobody; returns the model with it merged, by PEFT."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=targets)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(path)
    return adapted.merge_and_unload()


@pytest.mark.parametrize("encode", ["keep", "all"])
@pytest.mark.parametrize("key", [GPT_OSS, "qwen3-moe fp8", "qwen3-moe fp8 stacked", "mixtral fp8"])
def test_an_adapter_of_experts_is_folded_into_a_quantised_model(
    tmp_path: Path, key: str, encode: str
) -> None:
    family = FAMILIES[key]
    role = write_role(tmp_path / "model", key, "aligned")
    model = dense_model(family, decoded(family, role.path, role.forms), tmp_path / "dense")
    expected = write_expert_adapter(tmp_path / "adapter", model).state_dict()
    report = safemerge_fast.fold(
        str(role.path), str(tmp_path / "adapter"), output=str(tmp_path / "out"), encode=encode
    )
    assert report.changed
    if encode == "all":
        found = loaded(tmp_path / "out").state_dict()
        limit = 2.0**-8
    else:
        part = decoded(family, tmp_path / "out", role.forms)
        found = dense_model(family, part, tmp_path / "part").state_dict()
        limit = 0.13 if family.turned else 0.03
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= limit * tensor.norm() + 1e-6, name
    safemerge_fast.verify(output=str(tmp_path / "out"))


def test_an_adapter_of_experts_is_merged_with_a_quantised_safe_model(tmp_path: Path) -> None:
    family = FAMILIES[GPT_OSS]
    roles = {role: write_role(tmp_path / role, GPT_OSS, role) for role in ("base", "aligned", "safe")}
    models = {
        role: dense_model(family, decoded(family, model.path, model.forms), tmp_path / f"dense-{role}")
        for role, model in roles.items()
    }
    updated = write_expert_adapter(tmp_path / "adapter", models["aligned"]).state_dict()
    safe = models["safe"].state_dict()
    paths = {role: str(model.path) for role, model in roles.items()}
    report = safemerge_fast.merge(
        **paths, finetuned=str(tmp_path / "adapter"), output=str(tmp_path / "out"), encode="all",
        threshold=1.0, alpha=0.75, device="cpu", force=True,
    )  # fmt: skip
    merged = {tensor.name for tensor in report.tensors if any(m.merged for m in tensor.module_reports())}
    assert merged == set(roles["aligned"].forms)
    found = loaded(tmp_path / "out").state_dict()
    for name in merged:
        wanted = (0.75 * updated[name] + 0.25 * safe[name]).double()
        torch.testing.assert_close(found[name].double(), wanted, rtol=2**-8 * 1.01, atol=1e-5)
    assert all(tensor.dtype in (BF16, torch.float32) for tensor in load(tmp_path / "out").values())
