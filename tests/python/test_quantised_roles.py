"""Roles that are stored differently: quantised and not, stacked and not, adapters, tensors that one of them lacks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense import linear, load
from lora import update, write_lora
from quantised_experts import (
    FAMILIES,
    cosines,
    decoded,
    dense_model,
    write_experts_quartet,
)
from quantised_formats import BF16, FORMS
from quantised_models import ROLES, Quartet, assert_requantised, llama_quartet, same_bytes
from test_experts import key_of
from test_quantised_models import TAU, World, assert_same_parameters, loaded
from torch import Tensor

import safemerge_fast
from safemerge_fast.report.report import Report


def merged(quartet: Quartet, output: Path, **settings: Any) -> Report:
    wanted = {"device": "cpu", "threshold": 0.35, "alpha": 0.8} | settings
    return safemerge_fast.merge(**quartet.words(), output=str(output), **wanted)


def changed(report: Report) -> set[str]:
    return {tensor.name for tensor in report.tensors if tensor.merged}


@pytest.mark.parametrize("name", ["block fp8", "nvfp4"])
def test_a_finetuned_model_in_bfloat16_stays_so(tmp_path: Path, name: str) -> None:
    quartet = llama_quartet(tmp_path, FORMS[name], roles=("base", "aligned", "safe"))
    report = merged(quartet, tmp_path / "out")
    before, found = quartet.roles["finetuned"].stored, load(tmp_path / "out")
    expected = before | {key: value.to(BF16) for key, value in quartet.merged(changed(report)).items()}
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[key], tensor) for key, tensor in expected.items())
    assert changed(report)
    assert all(tensor.encoding is None and tensor.survival is None for tensor in report.tensors)
    for tensor in report.tensors:
        if tensor.analysed:
            assert tensor.rho == pytest.approx(quartet.cosine(tensor.name), abs=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("roles", [("finetuned",), ("finetuned", "safe"), ("finetuned", "base")])
def test_a_quantised_finetuned_model_takes_others_in_any_format(
    tmp_path: Path, roles: tuple[str, ...]
) -> None:
    form = FORMS["block fp8"]
    quartet = llama_quartet(tmp_path, form, roles=roles)
    report = merged(quartet, tmp_path / "out")
    found = load(tmp_path / "out")
    assert changed(report)
    for key, numbers in quartet.merged(changed(report)).items():
        assert_requantised(form, key, found, numbers.double().numpy())
    safemerge_fast.verify(output=str(tmp_path / "out"))


Q = {f"model.layers.{layer}.self_attn.q_proj": (96, 96) for layer in range(2)}
DOWN = {f"model.layers.{layer}.mlp.down_proj": (96, 320) for layer in range(2)}


@pytest.mark.parametrize("name", ["block fp8", "int4", "nvfp4 modelopt"])
@pytest.mark.parametrize("encode", ["keep", "bfloat16"])
def test_an_adapter_of_a_quantised_model_is_merged_into_it(tmp_path: Path, name: str, encode: str) -> None:
    form = FORMS[name]
    quartet = llama_quartet(tmp_path, form)
    adapter = write_lora(tmp_path / "adapter", Q | DOWN, rank=4, seed=5, size=0.1)
    words = {**quartet.words(), "finetuned": str(adapter)}
    report = safemerge_fast.merge(
        **words, output=str(tmp_path / "out"), device="cpu", threshold=1.0, alpha=0.8, encode=encode
    )
    assert changed(report) == {f"{key}.weight" for key in Q | DOWN}
    aligned, safe = quartet.roles["aligned"].single(), quartet.roles["safe"].single()
    found, before = load(tmp_path / "out"), quartet.roles["aligned"].stored
    gone: set[str] = set()
    for key in changed(report):
        wanted = 0.8 * (aligned[key].double() + update(adapter, key)) + 0.2 * safe[key].double()
        if encode == "keep":
            assert_requantised(form, key, found, wanted.numpy())
            gone |= set(form.names(key)[:2])
        else:
            torch.testing.assert_close(found[key].double(), wanted, rtol=2**-8 * 1.001, atol=1e-6)
            gone |= set(form.names(key))
    if encode == "bfloat16":
        for key in with_siblings(changed(report)) - changed(report):
            torch.testing.assert_close(
                found[key].double(), aligned[key].double(), rtol=2**-8 * 1.001, atol=1e-6
            )
            gone |= set(form.names(key))
    for part, tensor in before.items():
        assert part in gone or same_bytes(found[part], tensor), part
    safemerge_fast.verify(output=str(tmp_path / "out"))


def with_siblings(names: Iterable[str]) -> set[str]:
    """Runtimes fuse q, k and v, so that these are dequantised together."""
    found = set(names)
    return found | {
        name.replace("q_proj", part) for name in found if "q_proj" in name for part in ("k_proj", "v_proj")
    }


@pytest.mark.parametrize("encode", ["keep", "bfloat16", "all"])
@pytest.mark.parametrize("name", ["block fp8", "mxfp4", "int4"])
def test_a_fold_into_a_quantised_model(tmp_path: Path, name: str, encode: str) -> None:
    form = FORMS[name]
    quartet = llama_quartet(tmp_path, form, roles=ROLES)
    model = quartet.roles["aligned"]
    adapter = write_lora(tmp_path / "adapter", Q | DOWN, rank=4, seed=5, size=0.1)
    report = safemerge_fast.fold(str(model.path), str(adapter), output=str(tmp_path / "out"), encode=encode)
    numbers, found, before = model.single(), load(tmp_path / "out"), model.stored
    assert report.changed == len(Q | DOWN)
    for key, codes in model.forms.items():
        delta = update(adapter, key)
        wanted = numbers[key].double() + delta
        if encode == "all" or (
            encode == "bfloat16" and key in with_siblings(f"{name}.weight" for name in Q | DOWN)
        ):
            torch.testing.assert_close(found[key].double(), wanted, rtol=2**-8 * 1.001, atol=1e-6)
        elif delta.shape:
            assert_requantised(codes, key, found, wanted.numpy())
        else:
            assert all(same_bytes(found[part], before[part]) for part in codes.names(key))
    survivals = [tensor.survival for tensor in report.tensors if tensor.survival is not None]
    assert len(survivals) == (len(Q | DOWN) if encode == "keep" else 0)
    safemerge_fast.verify(output=str(tmp_path / "out"))


@pytest.mark.parametrize("encode", ["keep", "all"])
def test_resta_and_wise_ft_of_quantised_models(tmp_path: Path, encode: str) -> None:
    form = FORMS["channel fp8"]
    quartet = llama_quartet(tmp_path, form)
    words = quartet.words()
    base, aligned, finetuned = (quartet.roles[role].single() for role in ("base", "aligned", "finetuned"))
    safemerge_fast.resta(
        words["base"], words["aligned"], words["finetuned"], output=str(tmp_path / "resta"), gamma=0.5,
        encode=encode,
    )  # fmt: skip
    safemerge_fast.wise_ft(
        words["aligned"], words["finetuned"], output=str(tmp_path / "wise"), alpha=0.25, encode=encode
    )
    resta, wise = load(tmp_path / "resta"), load(tmp_path / "wise")
    for key in quartet.roles["finetuned"].forms:
        added = linear([(finetuned[key], 1.0), (aligned[key], 0.5), (base[key], -0.5)], torch.float32)
        mean = finetuned[key].double() * 0.25 + aligned[key].double() * 0.75
        other = finetuned[key].double() * 0.75 + aligned[key].double() * 0.25
        if encode == "keep":
            assert_requantised(form, key, resta, added.double().numpy())
            continue
        torch.testing.assert_close(resta[key].double(), added.double(), rtol=2**-8 * 1.001, atol=1e-6)
        closer = mean if (wise[key].double() - mean).norm() < (wise[key].double() - other).norm() else other
        torch.testing.assert_close(wise[key].double(), closer, rtol=2**-8 * 1.001, atol=1e-6)


def test_mergekit_dequantises_all(tmp_path: Path) -> None:
    quartet = llama_quartet(tmp_path, FORMS["block fp8"])
    words = quartet.words()
    document = {
        "merge_method": "linear",
        "models": [
            {"model": words["finetuned"], "parameters": {"weight": 0.75}},
            {"model": words["safe"], "parameters": {"weight": 0.25}},
        ],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    (tmp_path / "merge.yml").write_text(json.dumps(document))
    safemerge_fast.run(tmp_path / "merge.yml", output=str(tmp_path / "out"))
    found = load(tmp_path / "out")
    finetuned, safe = quartet.roles["finetuned"].single(), quartet.roles["safe"].single()
    for key in quartet.roles["finetuned"].forms:
        assert same_bytes(found[key], linear([(finetuned[key], 0.75), (safe[key], 0.25)], BF16)), key
    assert not any(key.endswith("_scale_inv") for key in found)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    safemerge_fast.verify(output=str(tmp_path / "out"))


MIXED: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "finetuned plain and stacked": (
        "qwen3-moe fp8", {"plain": ("finetuned",), "stacked": ("finetuned",)},
    ),
    "finetuned quantised one by one": (
        "qwen3-moe fp8", {"plain": ("base", "safe"), "stacked": ("base", "safe")},
    ),
    "finetuned quantised and stacked": ("qwen3-moe fp8 stacked", {"plain": ("aligned", "safe")}),
    "gpt-oss, finetuned plain": ("gpt-oss mxfp4", {"plain": ("finetuned",)}),
    "gpt-oss, others plain": ("gpt-oss mxfp4", {"plain": ("base", "safe")}),
    "gpt-oss, base quantised": ("gpt-oss mxfp4", {"plain": ("aligned", "finetuned", "safe")}),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_roles_of_other_formats_and_layouts(tmp_path: Path, case: str) -> None:
    key, options = MIXED[case]
    family = FAMILIES[key]
    roles = write_experts_quartet(tmp_path / "models", key, **options)
    models = {
        role: dense_model(family, decoded(family, model.path, model.forms), tmp_path / f"dense-{role}")
        for role, model in roles.items()
    }
    world = World(key, tmp_path, roles, models)
    wanted = cosines(models)
    report = world.merge(tmp_path / "out", encode="all")
    found = {
        place: module
        for tensor in report.tensors
        if tensor.analysed
        for module in tensor.module_reports()
        if (place := key_of(module.name)) is not None
    }
    assert found.keys() == wanted.keys()
    for place, cosine in wanted.items():
        assert found[place].rho == pytest.approx(cosine, abs=1e-6), place
        assert found[place].merged == (cosine < TAU), place
    assert_same_parameters(loaded(tmp_path / "out"), world.expected(report), rounded=True)
    kept = world.merge(tmp_path / "kept")
    forms = roles["finetuned"].forms
    assert {tensor.name for tensor in kept.tensors if tensor.encoding is not None} == set(forms)
    part = dense_model(family, decoded(family, tmp_path / "kept", forms), tmp_path / "part")
    left, right = part.state_dict(), world.expected(kept).state_dict()
    for name, tensor in right.items():
        error = (left[name] - tensor).norm() / tensor.norm()
        assert error < (0.15 if family.turned else 0.04), name


def mtp_quartet(path: Path, quantised: tuple[str, ...]) -> Quartet:
    """Two layers and one that predicts further tokens, which finetuned and safe have lost."""
    form = FORMS["block fp8"]

    def lose(role: str, tensors: dict[str, Tensor]) -> None:
        if role in ("finetuned", "safe"):
            for name in [name for name in tensors if name.startswith("model.layers.2.")]:
                del tensors[name]

    quartet = llama_quartet(path, form, roles=quantised, layers=3, edit=lose)
    for role, model in quartet.roles.items():
        config = json.loads((model.path / "config.json").read_text())
        config["num_hidden_layers"] = 2
        if role in ("base", "aligned"):
            config["num_nextn_predict_layers"] = 1
        else:
            for name in [name for name in model.forms if name.startswith("model.layers.2.")]:
                del model.forms[name]  # type: ignore[attr-defined]
        (model.path / "config.json").write_text(json.dumps(config))
    return quartet


@pytest.mark.parametrize(
    ("quantised", "encode"),
    [(ROLES, "keep"), (ROLES, "all"), (("base", "aligned"), "keep"), (("finetuned", "safe"), "keep")],
)
def test_layers_that_predict_further_tokens_are_filled_in(
    tmp_path: Path, quantised: tuple[str, ...], encode: str
) -> None:
    quartet = mtp_quartet(tmp_path, quantised)
    merged(quartet, tmp_path / "out", fill_from="aligned", encode=encode)
    aligned, found = quartet.roles["aligned"], load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    stays = encode == "keep" and {"aligned", "finetuned"} <= set(quantised)
    numbers, before = aligned.single(), aligned.stored
    filled = [name for name in numbers if name.startswith("model.layers.2.")]
    assert len(filled) == 9
    for name in filled:
        if name in aligned.forms and stays:
            assert all(same_bytes(found[part], before[part]) for part in aligned.forms[name].names(name))
        else:
            assert same_bytes(found[name], numbers[name].to(BF16)), name
    listed = config.get("quantization_config", {}).get("modules_to_not_convert")
    if encode == "keep" and "finetuned" in quantised and "aligned" not in quantised:
        assert {name.removesuffix(".weight") for name in filled if "_proj" in name} < set(listed)
    else:
        assert listed is None
    assert ("quantization_config" in config) == (encode == "keep" and "finetuned" in quantised)
    safemerge_fast.verify(output=str(tmp_path / "out"))


def test_a_layer_norm_is_no_codes(tmp_path: Path) -> None:
    """What is not quantised in a quantised model is copied as it is."""
    quartet = llama_quartet(tmp_path, FORMS["tensor fp8"])
    merged(quartet, tmp_path / "out", threshold=1.0)
    before, found = quartet.roles["finetuned"].stored, load(tmp_path / "out")
    plain = [name for name in before if "norm" in name or "embed" in name]
    assert plain
    assert all(same_bytes(before[name], found[name]) for name in plain)
    assert np.isfinite(quartet.roles["finetuned"].exact()["model.norm.weight"]).all()
