"""Recipes that add SVD_k of a difference, and the control: against dense float64, resumed, verified and previewed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_quartet
from dense import is_projection
from expert_models import matrices, save
from invoke import run
from lora import load_checkpoint, update, write_lora
from test_expert_merges import version
from torch import Tensor

from safemerge_fast import (
    AnalysisError,
    PairingError,
    RoleError,
    VerificationError,
    lox,
    preview,
    safety_vector,
    shrink,
    verify,
)
from safemerge_fast.analysis import products, truncated_svd
from safemerge_fast.execution import derived
from safemerge_fast.recipes.base import CheckpointContents
from safemerge_fast.recipes.lox import LoxSettings
from safemerge_fast.recipes.safety_vector import SafetyVectorSettings

Q = {f"model.layers.{layer}.self_attn.q_proj": (72, 72) for layer in range(3)}
DOWN = {f"model.layers.{layer}.mlp.down_proj": (72, 200) for layer in range(3)}
NEAR = 1e-6
FACTORS = "safemerge_derived/derived.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quartet in float32, a LoRA adapter of its aligned model, and a DoRA adapter."""
    path = tmp_path_factory.mktemp("factors")
    paths = write_quartet(path, dtype="float32", shards=2)
    paths["adapter"] = write_lora(path / "adapter", Q | DOWN, rank=5, seed=1)
    norms = {
        f"{module}.lora_magnitude_vector.weight": torch.rand(72, generator=torch.Generator().manual_seed(7))
        + 0.5
        for module in Q
    }
    norms = {name.replace(".weight", ""): value for name, value in norms.items()}
    paths["dora"] = write_lora(path / "dora", Q, rank=3, seed=2, more=norms, use_dora=True)
    return paths


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """SVD_k by numpy in float64."""
    u, s, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vt[:rank])


def weights(models: Mapping[str, Path], role: str) -> dict[str, Tensor]:
    """Float64 weights of a role; those of an adapter are the aligned ones with its changes."""
    if role not in ("adapter", "dora"):
        return {name: tensor.double() for name, tensor in load_checkpoint(models[role]).items()}
    found = {}
    for name, tensor in load_checkpoint(models["aligned"]).items():
        matrix = tensor.double() + update(models[role], name)
        if role == "dora" and name.removesuffix(".weight") in Q:
            held = load_checkpoint(models["dora"])
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"
            matrix = matrix * (held[key].double() / matrix.norm(dim=1))[:, None]
        found[name] = matrix
    return found


def assert_is(
    output: Path, kept: Mapping[str, Tensor], changed: Callable[[str], bool], made: Callable[[str], Tensor]
) -> None:
    """Compares all tensors: those that are changed with float64, the others with the kept ones."""
    found = load_checkpoint(output)
    assert found.keys() == kept.keys()
    assert any(map(changed, kept))
    for name, tensor in kept.items():
        if not changed(name):
            assert torch.equal(found[name].double(), tensor), name
            continue
        wanted = made(name)
        error = float((found[name].double() - wanted).abs().max() / wanted.abs().max())
        assert error < NEAR, (name, error)


@pytest.mark.parametrize("dense", [192, 0], ids=["dense", "randomized"])
@pytest.mark.parametrize("held", [64 << 20, 0], ids=["held", "read again"])
def test_lox_is_its_formula(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: int, held: int
) -> None:
    monkeypatch.setattr(truncated_svd, "DENSE", dense)
    monkeypatch.setattr(products, "HELD", held)
    monkeypatch.setattr(truncated_svd, "OVERSAMPLING", 6)
    report = lox(models["base"], models["aligned"], output=tmp_path / "out", kappa=0.7, rank=4)
    base, aligned = weights(models, "base"), weights(models, "aligned")
    assert_is(
        tmp_path / "out",
        aligned,
        is_projection,
        lambda name: aligned[name] + 0.7 * truncated(aligned[name] - base[name], 4),
    )
    assert not report.warnings
    assert report.changed == 21
    assert verify(tmp_path / "out").bytes_checked > 0


@pytest.mark.parametrize("finetuned", ["finetuned", "adapter", "dora"])
def test_the_safety_vector_is_its_formula(models: dict[str, Path], tmp_path: Path, finetuned: str) -> None:
    out = tmp_path / "out"
    safety_vector(models["aligned"], models[finetuned], output=out, kappa=-0.3, rank=2)
    aligned, fine = weights(models, "aligned"), weights(models, finetuned)
    adapted = {"adapter": Q | DOWN, "dora": Q}.get(finetuned)
    assert_is(
        out,
        fine,
        lambda name: is_projection(name) if adapted is None else name.removesuffix(".weight") in adapted,
        lambda name: fine[name] - 0.3 * truncated(aligned[name] - fine[name], 2),
    )
    verify(out)


def test_a_rank_above_the_matrix_takes_all_of_it(models: dict[str, Path], tmp_path: Path) -> None:
    safety_vector(models["aligned"], models["finetuned"], output=tmp_path / "out", kappa=1.0, rank=1000)
    aligned, fine = weights(models, "aligned"), weights(models, "finetuned")
    found = load_checkpoint(tmp_path / "out")
    for name in filter(is_projection, fine):
        assert float((found[name].double() - aligned[name]).abs().max()) < 1e-6


@pytest.mark.parametrize("finetuned", ["finetuned", "adapter"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_shrink_is_its_formula_for_the_selected_matrices(
    models: dict[str, Path], tmp_path: Path, finetuned: str, alpha: float
) -> None:
    out = tmp_path / "out"
    report = shrink(models["aligned"], models[finetuned], output=out, alpha=alpha, exclude="layers.1.")
    aligned, fine = weights(models, "aligned"), weights(models, finetuned)

    def selected(name: str) -> bool:
        adapted = finetuned == "finetuned" or name.removesuffix(".weight") in Q | DOWN
        return is_projection(name) and ".layers.1." not in name and adapted

    def kept(name: str) -> Tensor:
        # What an adapter changes is made in float32 too.
        return fine[name]

    found = load_checkpoint(out)
    for name, tensor in found.items():
        wanted = aligned[name] + alpha * (fine[name] - aligned[name]) if selected(name) else kept(name)
        assert float((tensor.double() - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max()), name
    assert report.changed == sum(map(selected, fine)) + (
        len([name for name in fine if name.removesuffix(".weight") in Q | DOWN and not selected(name)])
        if finetuned == "adapter"
        else 0
    )
    assert f"in {sum(map(selected, fine))} matrices" in (out / "README.md").read_text()
    verify(out)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_stacked_experts_are_changed_one_by_one(tmp_path: Path, family: str) -> None:
    """Of both layouts: experts as rows of a stack, and turned with gate and up interleaved."""
    from transformers import AutoModelForCausalLM

    paths = {
        role: save(version(family, seed), tmp_path / role, singly=False)
        for seed, role in enumerate(("base", "aligned"))
    }
    lox(paths["base"], paths["aligned"], output=tmp_path / "out", kappa=1.0, rank=2)
    verify(tmp_path / "out")
    base, aligned = (dict(matrices(version(family, seed))) for seed in range(2))
    found = dict(matrices(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)))
    assert found.keys() == aligned.keys()
    for key, matrix in found.items():
        after, before = aligned[key].detach().double(), base[key].detach().double()
        wanted = after + truncated(after - before, 2)
        assert float((matrix.detach().double() - wanted).abs().max()) < 2e-6, key


def test_a_run_goes_on_behind_the_last_factor(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    roles = (models["base"], models["aligned"])
    lox(*roles, output=whole)
    calls: list[str] = []
    real = truncated_svd.truncate

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(truncated_svd, "truncate", stopping)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        lox(*roles, output=out)
    assert not out.exists()
    # A kill may leave a part of a tensor behind.
    with (tmp_path / ".out.safemerge" / "derived.safetensors").open("ab") as file:
        file.write(b"\1" * 100)
    lox(*roles, output=out, resume=True)
    assert len(calls) == 5 + 17, "four matrices were decomposed before"
    assert len(set(calls)) == 21
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", FACTORS):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    verify(out)
    again = lox(*roles, output=out, resume=True)
    assert again.changed == 21
    assert len(calls) == 22


def test_committed_files_are_not_made_again(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors that an earlier run computed are the same input to the one that goes on."""
    roles, out = (models["base"], models["aligned"]), tmp_path / "out"

    def failing(self: CheckpointContents) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointContents, "small_files", failing)
        with pytest.raises(KeyboardInterrupt):
            lox(*roles, output=out)
    report = lox(*roles, output=out, resume=True)
    assert [shard.resumed for shard in report.shards] == [True, True]
    verify(out)
    lox(*roles, output=out, rank=2, overwrite=True)
    verify(out)
    shrink(models["aligned"], models["finetuned"], output=out, overwrite=True)
    verify(out)
    assert not (out / FACTORS).parent.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_output_can_be_moved_and_still_be_verified(models: dict[str, Path], tmp_path: Path) -> None:
    lox(models["base"], models["aligned"], output=tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    verify(tmp_path / "moved")
    plan = json.loads((tmp_path / "moved" / "safemerge_plan.json").read_text())
    assert plan["sources"]["derived"]["path"] == "safemerge_derived"
    file = tmp_path / "moved" / FACTORS
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match=r"derived\.safetensors is not what was written"):
        verify(tmp_path / "moved")


def test_what_a_preview_says_comes_true(models: dict[str, Path], tmp_path: Path) -> None:
    roles = {role: str(models[role]) for role in ("aligned", "finetuned")}
    outlook = preview(SafetyVectorSettings(**roles, output=str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())
    report = safety_vector(**roles, output=tmp_path / "out")
    assert (outlook.merged, outlook.counts) == (report.merged, report.counts)
    assert outlook.bytes_read == report.bytes_read
    assert outlook.bytes_analysed > 0
    sizes = {file.name: file.bytes for file in report.files}
    assert 0 < sizes[FACTORS] - outlook.bytes_derived < 10_000, "all but the header"
    assert outlook.bytes_written == report.bytes_written


def test_files_name_it_and_the_card_names_its_source(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "lox.yml"
    file.write_text(f"recipe: lox\nbase: {models['base']}\naligned: {models['aligned']}\nrank: 3\n")
    result = run("run", file, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("lox: 21 of 30 tensors changed")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`aligned` plus 1 times the rank-3 part of what alignment changed from `base`" in card
    assert "arxiv.org/abs/2506.15606" in card
    assert run("verify", tmp_path / "out").exit_code == 0
    assert run("run", file, "-o", tmp_path / "dry", "--dry-run").exit_code == 0
    assert not (tmp_path / "dry").exists()


def test_singular_values_that_are_too_close_are_warned_about(tmp_path: Path) -> None:
    def flat(role: str, tensors: dict[str, Tensor]) -> None:
        """V is 0.01 times an orthogonal matrix, all of whose singular values are equal."""
        name = "model.layers.0.self_attn.q_proj.weight"
        generator = torch.Generator().manual_seed(3)
        turned = torch.linalg.qr(torch.randn(240, 240, generator=generator)).Q
        if role == "base":
            tensors[name] = torch.zeros(240, 240)
        elif role == "aligned":
            tensors[name] = 0.01 * turned

    models = write_quartet(tmp_path, hidden=240, layers=1, dtype="float32", shards=1, edit=flat)
    report = lox(models["base"], models["aligned"], output=tmp_path / "out", rank=4, iterations=3)
    warned = {warning.tensor for warning in report.warnings}
    assert "model.layers.0.self_attn.q_proj.weight" in warned
    message = next(w.message for w in report.warnings if w.tensor and "q_proj" in w.tensor)
    assert "too close for 3 iterations" in message
    assert "raise iterations" in message


def test_refusals(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RoleError, match="base and aligned are the same model"):
        lox(models["base"], models["base"], output=tmp_path / "out")
    with pytest.raises(PairingError, match="nothing to change: none of the 30 tensors"):
        shrink(models["aligned"], models["finetuned"], output=tmp_path / "out", exclude=".")
    broken = tmp_path / "broken"

    def spoil(role: str, tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    write_quartet(broken, roles=("aligned",), dtype="float32", shards=1, edit=spoil)
    with pytest.raises(AnalysisError, match=r"non-finite values in aligned tensor model\.layers\.1\.mlp\.up"):
        lox(models["base"], broken / "aligned", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_planning_needs_no_torch(models: dict[str, Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from safemerge_fast import preview\n"
        "from safemerge_fast.recipes.lox import LoxSettings\n"
        f"preview(LoxSettings(base={str(models['base'])!r}, aligned={str(models['aligned'])!r}, "
        f"output={str(tmp_path / 'out')!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert LoxSettings.recipe == "lox"
    assert derived.DERIVED_FILE == FACTORS
