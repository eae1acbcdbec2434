"""Safe LoRA against its formula in float64: adapters, full fine-tunes, tall and wide, the rule, resumed, verified."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_quartet
from dense import is_projection, rho
from expert_models import matrices, save
from invoke import assert_one_sentence, run
from lora import load_checkpoint, update, write_lora
from test_expert_merges import version
from test_factors import DOWN, Q, weights
from torch import Tensor

from safemerge_fast import AdapterError, VerificationError, analyze, preview, safe_lora, verify
from safemerge_fast.analysis import blocks, products, projection
from safemerge_fast.recipes.safe_lora.settings import SafeLoraSettings

GATE = {f"model.layers.{layer}.mlp.gate_proj": (200, 72) for layer in range(3)}
NEAR = 1e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("safe-lora")
    paths = write_quartet(path, dtype="float32", shards=2)
    paths["adapter"] = write_lora(path / "adapter", Q | DOWN | GATE, rank=5, seed=1)
    norms = {
        f"{module}.lora_magnitude_vector": torch.rand(72, generator=torch.Generator().manual_seed(7)) + 0.5
        for module in Q
    }
    paths["dora"] = write_lora(path / "dora", Q, rank=3, seed=2, more=norms, use_dora=True)
    return paths


def projected(base: Tensor, aligned: Tensor, matrix: Tensor) -> Tensor:
    """C·X with the dense C = V·Vᵀ/‖V‖."""
    v = aligned.double() - base.double()
    return v @ v.T @ matrix.double() / v.norm()


def cosines(models: Mapping[str, Path], finetuned: str) -> dict[str, float]:
    base, aligned, fine = (weights(models, role) for role in ("base", "aligned", finetuned))
    return {
        name: rho(base[name], aligned[name], fine[name])
        for name in fine
        if is_projection(name) and not torch.equal(fine[name], aligned[name])
    }


def assert_projected(models: Mapping[str, Path], finetuned: str, output: Path, chosen: set[str]) -> None:
    base, aligned, fine = (weights(models, role) for role in ("base", "aligned", finetuned))
    found = load_checkpoint(output)
    assert found.keys() == fine.keys()
    for name, tensor in found.items():
        wanted = fine[name]
        if name in chosen:
            wanted = aligned[name] + projected(base[name], aligned[name], fine[name] - aligned[name])
        assert float((tensor.double() - wanted).abs().max()) <= NEAR * float(wanted.abs().max()), name


def test_the_threshold_is_not_strict(models: dict[str, Path], tmp_path: Path) -> None:
    """A ρ that equals τ is projected, as the authors' code has it, and a merge would keep it."""
    scores = analyze(models["base"], models["aligned"], models["finetuned"], device="cpu")
    rhos = {name: score.rho for name, score in scores.modules.items() if score.rho is not None}
    tau = sorted(rhos.values())[7]
    report = safe_lora(
        models["base"], models["aligned"], models["finetuned"], output=tmp_path / "out", threshold=tau
    )
    chosen = {tensor.name for tensor in report.tensors if tensor.merged}
    assert chosen == {name for name, value in rhos.items() if value <= tau}
    assert len(chosen) == 8
    assert_projected(models, "finetuned", tmp_path / "out", chosen)
    reasons = {tensor.name: tensor.reason for tensor in report.tensors}
    assert all("≤" in reasons[name] for name in chosen)
    assert all(">" in reasons[name] for name in rhos.keys() - chosen)
    verify(tmp_path / "out")


@pytest.mark.parametrize("block", [4 << 20, 2000], ids=["one block", "many blocks"])
@pytest.mark.parametrize("finetuned", ["finetuned", "adapter", "dora"])
def test_checkpoints_are_the_formula(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetuned: str, block: int
) -> None:
    if block < 4 << 20:
        small = lambda device: blocks.Workspace(  # noqa: E731
            torch.device("cpu"),
            block_elements=block,
            block_columns=8,
            chunk_elements=1024,
            operation_flops=1e5,
        )
        monkeypatch.setattr(projection, "open_workspace", small)
        monkeypatch.setattr(products, "HELD", 0)
    known = cosines(models, finetuned)
    count = len(known) - 1
    out = tmp_path / "out"
    report = safe_lora(
        models["base"],
        models["aligned"],
        models[finetuned],
        output=out,
        select=f"lowest:{count}",
        output_format="checkpoint",
    )
    chosen = set(sorted(known, key=lambda name: known[name])[:count])
    assert {tensor.name for tensor in report.tensors if tensor.merged} == chosen
    assert_projected(models, finetuned, out, chosen)
    verify(out)


def test_an_adapter_has_c_b_in_place_of_b(models: dict[str, Path], tmp_path: Path) -> None:
    known = cosines(models, "adapter")
    out = tmp_path / "out"
    report = safe_lora(models["base"], models["aligned"], models["adapter"], output=out, select="lowest:4")
    chosen = set(sorted(known, key=lambda name: known[name])[:4])
    assert {tensor.name for tensor in report.tensors if tensor.merged} == chosen
    base, aligned = weights(models, "base"), weights(models, "aligned")
    before, after = load_checkpoint(models["adapter"]), load_checkpoint(out)
    assert before.keys() == after.keys()
    changed = set()
    for key, tensor in before.items():
        name = key.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
        if ".lora_B." in key and name in chosen:
            wanted = projected(base[name], aligned[name], tensor)
            assert float((after[key].double() - wanted).abs().max()) <= NEAR * float(wanted.abs().max())
            changed.add(name)
        else:
            assert torch.equal(after[key], tensor), key
    assert changed == chosen
    assert (out / "adapter_config.json").read_bytes() == (
        models["adapter"] / "adapter_config.json"
    ).read_bytes()
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert report.adapter is not None
    verify(out)
    card = (out / "README.md").read_text()
    assert "B ← C·B" in card
    assert "in 4 of 9 matrices" in card
    assert "arxiv.org/abs/2405.16833" in card
    # Both forms of the output are one model.
    dense = tmp_path / "dense"
    safe_lora(
        models["base"],
        models["aligned"],
        models["adapter"],
        output=dense,
        select="lowest:4",
        output_format="checkpoint",
    )
    for name, tensor in load_checkpoint(dense).items():
        wanted = aligned[name] + update(out, name)
        assert float((tensor.double() - wanted).abs().max()) < 1e-6, name


def test_peft_loads_the_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    safe_lora(models["base"], models["aligned"], models["adapter"], output=out, select="fraction:1")
    loaded = AutoModelForCausalLM.from_pretrained(models["aligned"], dtype=torch.float32)
    merged = PeftModel.from_pretrained(loaded, out).merge_and_unload()  # type: ignore[attr-defined]
    base, aligned = weights(models, "base"), weights(models, "aligned")
    for name, tensor in merged.state_dict().items():
        if name.removesuffix(".weight") in Q | DOWN | GATE:
            wanted = aligned[name] + projected(base[name], aligned[name], update(models["adapter"], name))
            assert float((tensor.double() - wanted).abs().max()) < 1e-5, name


def test_a_file_may_be_changed_by_nobody(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    safe_lora(models["base"], models["aligned"], models["adapter"], output=out, select="lowest:2")
    file = out / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError):
        verify(out)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_stacked_experts_are_projected_one_by_one(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    paths = [
        save(version(family, seed), tmp_path / role, singly=False)
        for seed, role in enumerate(("base", "aligned", "finetuned"))
    ]
    safe_lora(*paths, output=tmp_path / "out", select="fraction:1", force=True)
    verify(tmp_path / "out")
    base, aligned, fine = (dict(matrices(version(family, seed))) for seed in range(3))
    found = dict(matrices(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)))
    for key, matrix in found.items():
        before, middle, after = (part[key].detach().double() for part in (base, aligned, fine))
        wanted = middle + projected(before, middle, after - middle)
        assert float((matrix.detach().double() - wanted).abs().max()) < 5e-6, key


@pytest.mark.parametrize("finetuned", ["finetuned", "adapter"])
def test_a_run_goes_on_with_scores_and_projections(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetuned: str
) -> None:
    roles = (models["base"], models["aligned"], models[finetuned])
    whole, out = tmp_path / "whole", tmp_path / "out"
    safe_lora(*roles, output=whole, select="fraction:1")
    name = "project_product" if finetuned == "adapter" else "project_update"
    real, calls = getattr(projection, name), []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(projection, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        safe_lora(*roles, output=out, select="fraction:1")
    with (tmp_path / ".out.safemerge" / "derived.safetensors").open("ab") as file:
        file.write(b"\1" * 100)
    safe_lora(*roles, output=out, select="fraction:1", resume=True)
    total = 9 if finetuned == "adapter" else 21
    assert len(calls) == total + 1
    for file in whole.rglob("*.safetensors"):
        assert (out / file.relative_to(whole)).read_bytes() == file.read_bytes()
    verify(out)


@pytest.mark.parametrize("finetuned", ["finetuned", "adapter"])
def test_previews_and_given_scores(models: dict[str, Path], tmp_path: Path, finetuned: str) -> None:
    roles = {role: str(models[role]) for role in ("base", "aligned")} | {"finetuned": str(models[finetuned])}
    file = tmp_path / "scores.json"
    file.write_text(analyze(**roles, device="cpu").to_json())
    unknown = preview(SafeLoraSettings(**roles, output=str(tmp_path / "out")))
    assert unknown.merged is None
    known = preview(SafeLoraSettings(**roles, output=str(tmp_path / "out"), scores=str(file)))
    report = safe_lora(**roles, output=tmp_path / "out", scores=file)
    assert known.merged == report.merged
    assert known.bytes_written == report.bytes_written
    assert unknown.bytes_read >= known.bytes_read == report.bytes_read


def test_a_module_without_rho_is_left_alone(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def still(role: str, tensors: dict[str, Tensor]) -> None:
        if role in ("base", "aligned"):
            tensors[name] = torch.ones_like(tensors[name])

    models = write_quartet(tmp_path, dtype="float32", shards=1, edit=still)
    report = safe_lora(
        models["base"], models["aligned"], models["finetuned"], output=tmp_path / "out", select="fraction:1"
    )
    tensor = next(tensor for tensor in report.tensors if tensor.name == name)
    assert not tensor.merged
    assert tensor.reason == "kept: ρ is undefined, V is zero"
    assert torch.equal(load_checkpoint(tmp_path / "out")[name], load_checkpoint(models["finetuned"])[name])


def test_refusals(models: dict[str, Path], tmp_path: Path) -> None:
    roles = (models["base"], models["aligned"])
    with pytest.raises(AdapterError, match="cannot be an adapter, since finetuned is a full checkpoint"):
        safe_lora(*roles, models["finetuned"], output=tmp_path / "out", output_format="adapter")
    with pytest.raises(AdapterError, match="more than one plain product"):
        safe_lora(*roles, models["dora"], output=tmp_path / "out", output_format="adapter")
    report = safe_lora(*roles, models["dora"], output=tmp_path / "dora")
    assert any("the output is a checkpoint, since" in note for note in report.notes)
    file = tmp_path / "r.yml"
    file.write_text(
        json.dumps(
            {
                "recipe": "safe-lora",
                **dict(zip(("base", "aligned"), map(str, roles), strict=True)),
                "finetuned": str(models["adapter"]),
                "untie": True,
            }
        )
    )
    result = run("run", file, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert_one_sentence(result, "untie is for checkpoints, but the output is an adapter")
    assert not (tmp_path / "out").exists()
