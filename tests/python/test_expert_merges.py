"""Whole merges of models with experts: ρ against float64, bits against an exact sum, one layout against another."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import linear, load, rho
from expert_models import make, matrices, save
from invoke import run
from rich.console import Console
from test_experts import ROLES, key_of
from torch import Tensor

import safemerge_fast
from safemerge_fast.recipes.verify import VerifySettings, verify_output
from safemerge_fast.report.report import Report

Key = tuple[str, int, str]
TAU, ALPHA = 0.75, 0.8


def version(family: str, seed: int) -> Any:
    """A model of the family; that of each seed is near that of the first, as fine-tunes are."""
    model, first = make(family, seed), make(family, 0)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs + 0.2 * (mine - theirs))
    return model


def quartet(tmp_path: Path, family: str, stacked: tuple[str, ...]) -> dict[str, Path]:
    return {
        role: save(version(family, seed), tmp_path / role, singly=role not in stacked)
        for seed, role in enumerate(ROLES)
    }


def merged(paths: dict[str, Path], output: Path, **settings: Any) -> Report:
    roles = {role: str(path) for role, path in paths.items()}
    return safemerge_fast.merge(
        **roles, output=str(output), threshold=TAU, alpha=ALPHA, device="cpu", **settings
    )


def expected(family: str) -> dict[Key, tuple[float, Tensor]]:
    """ρ of every expert's matrix, in float64, and what becomes of it."""
    base, aligned, finetuned, safe = (
        {key: matrix.detach() for key, matrix in matrices(version(family, seed))} for seed in range(4)
    )
    found = {}
    for key, matrix in finetuned.items():
        cosine = rho(base[key], aligned[key], matrix)
        below = cosine < TAU
        made = linear([(matrix, ALPHA), (safe[key], 1 - ALPHA)], torch.float32) if below else matrix
        found[key] = cosine, made
    return found


def written(report: Report, output: Path) -> dict[Key, Tensor]:
    """Every expert's matrix of the output, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    return {key: matrix.detach() for key, matrix in matrices(model)}


LAYOUTS = [
    ("qwen3_moe", ()),
    ("qwen3_moe", ROLES),
    ("qwen3_moe", ("finetuned",)),
    ("qwen3_moe", ("base", "safe")),
    ("mixtral", ("aligned", "finetuned")),
    ("gpt_oss", ()),
    ("llama4_text", ()),
    ("granitemoe", ("safe",)),
    ("jetmoe", ()),
    ("dbrx", ()),
]


@pytest.mark.parametrize(("family", "stacked"), LAYOUTS)
def test_every_expert_is_scored_decided_and_merged_by_itself(
    tmp_path: Path, family: str, stacked: tuple[str, ...]
) -> None:
    report = merged(quartet(tmp_path, family, stacked), tmp_path / "out")
    modules = {
        key: module
        for tensor in report.tensors
        if tensor.analysed
        for module in tensor.module_reports()
        if (key := key_of(module.name)) is not None
    }
    wanted = expected(family)
    assert modules.keys() == wanted.keys()
    assert {module.merged for module in modules.values()} == {True, False}, "the threshold divides them"
    found = written(report, tmp_path / "out")
    for key, (cosine, matrix) in wanted.items():
        assert modules[key].rho == pytest.approx(cosine, abs=1e-6)
        assert modules[key].merged == (cosine < TAU)
        assert torch.equal(found[key], matrix), key
    verify_output(VerifySettings(output=str(tmp_path / "out")))


def test_the_report_is_read_back_and_counts_experts(tmp_path: Path) -> None:
    report = merged(quartet(tmp_path, "qwen3_moe", ROLES), tmp_path / "out")
    document = json.loads(report.to_json())
    stacked = [tensor for tensor in document["tensors"] if "modules" in tensor]
    assert {tensor["name"].rpartition(".")[2] for tensor in stacked} == {"gate_up_proj", "down_proj"}
    columns = stacked[0]["modules"]
    assert len(columns["rho"]) == len(columns["merged"]) == 3 * len(columns["parts"])
    again = Report.from_json(report.to_json(), lambda *_: report.configuration)
    assert list(again.tensors) == list(report.tensors)
    counts = {count.module_type: count for count in report.counts}
    assert [counts[f"experts.{part}_proj"].analysed for part in ("gate", "up", "down")] == [6, 6, 6]
    wanted = expected("qwen3_moe")
    for part in ("gate", "up", "down"):
        below = sum(cosine < TAU for (_, _, kind), (cosine, _) in wanted.items() if kind == part)
        assert (counts[f"experts.{part}_proj"].merged, counts[f"experts.{part}_proj"].kept) == (
            below,
            6 - below,
        )


@pytest.mark.parametrize("stacked", [(), ROLES])
def test_tables_have_a_line_for_the_experts_of_each_layer(tmp_path: Path, stacked: tuple[str, ...]) -> None:
    paths = quartet(tmp_path, "qwen3_moe", stacked)
    report = merged(paths, tmp_path / "out")
    wanted = expected("qwen3_moe")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    card = (tmp_path / "out" / "README.md").read_text()
    roles = {role: paths[role] for role in ("base", "aligned", "finetuned")}
    measured = run("analyze", *(f"--{role}={path}" for role, path in roles.items()), f"--threshold={TAU}")
    assert measured.exit_code == 0, measured.output
    layers = sorted({layer for layer, _, _ in wanted})
    assert len(layers) == 2
    for layer in layers:
        rhos = [cosine for (own, _, _), (cosine, _) in wanted.items() if own == layer]
        below = sum(cosine < TAU for cosine in rhos)
        name, median = f"experts, layers.{layer.removesuffix('.mlp')}", f"{statistics.median(rhos):.3f}"
        (line,) = [line.split() for line in console.export_text(clear=False).splitlines() if name in line]
        assert line[2:6] == [f"({len(rhos)})", f"({below})", f"({len(rhos) - below})", median]
        assert f"| {name} | {len(rhos)} | {below} | {len(rhos) - below} | {median} |" in card
        (line,) = [line.split() for line in measured.output.splitlines() if name in line]
        assert line[2:6] == [f"({len(rhos)})", f"({below})", f"{min(rhos):.3f}", median]


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_the_layout_changes_no_bit(tmp_path: Path, method: str) -> None:
    """What is merged expert by expert is the same whether experts are stacked or not, whatever the method looks at."""
    found = []
    for stacked in ((), ROLES):
        directory = tmp_path / ("stacked" if stacked else "single")
        report = merged(quartet(directory, "qwen3_moe", stacked), directory / "out", method=method)
        found.append(written(report, directory / "out"))
    assert found[0].keys() == found[1].keys()
    for key, matrix in found[0].items():
        assert torch.equal(matrix, found[1][key]), key


def test_rounding_is_that_of_what_is_stored(tmp_path: Path) -> None:
    """A part of a stacked tensor is read as float32, but its V was rounded to bfloat16."""
    found = []
    for stacked in ((), ROLES):
        directory = tmp_path / ("stacked" if stacked else "single")
        paths = {
            role: save(version("qwen3_moe", seed).bfloat16(), directory / role, singly=role not in stacked)
            for seed, role in enumerate(ROLES)
        }
        report = merged(paths, directory / "out")
        found.append(
            {
                module.name: (module.rho, module.v_rounding)
                for tensor in report.tensors
                if tensor.analysed
                for module in tensor.module_reports()
            }
        )
    assert found[0].keys() == found[1].keys()
    for name, (rho_single, rounding) in found[0].items():
        assert found[1][name] == (pytest.approx(rho_single, abs=1e-6), pytest.approx(rounding, rel=1e-4))
        assert rounding is not None
        assert rounding > 1e-4


def test_a_layer_is_decided_with_its_experts(tmp_path: Path) -> None:
    report = merged(
        quartet(tmp_path, "qwen3_moe", ("finetuned",)),
        tmp_path / "out",
        granularity="layer",
        select="lowest:1",
    )
    layers: dict[str | None, list[Any]] = {}
    for tensor in report.tensors:
        if tensor.analysed:
            layers.setdefault(tensor.layer, []).extend(tensor.module_reports())
    means = {layer: sum(module.rho for module in its) / len(its) for layer, its in layers.items()}
    assert {len(its) for its in layers.values()} == {9 + 4}
    lowest = min(means, key=lambda layer: means[layer])
    for layer, its in layers.items():
        assert {module.merged for module in its} == {layer == lowest}


def test_a_repair_without_decisions_takes_experts_from_any_layout(tmp_path: Path) -> None:
    """RESTA, F + γ (A - B), with the base stacked and the others not."""
    paths = quartet(tmp_path, "qwen3_moe", ("base",))
    safemerge_fast.resta(
        str(paths["base"]),
        str(paths["aligned"]),
        str(paths["finetuned"]),
        output=str(tmp_path / "out"),
        gamma=0.5,
    )
    base, aligned, finetuned = (dict(matrices(version("qwen3_moe", seed))) for seed in range(3))
    tensors = load(tmp_path / "out")
    checked = 0
    for name, tensor in tensors.items():
        if (key := key_of(name)) is not None and name.endswith("_proj.weight") and ".experts." in name:
            exact = finetuned[key].double() + 0.5 * (aligned[key].double() - base[key].double())
            assert torch.allclose(tensor.double(), exact, atol=1e-6)
            checked += 1
    assert checked == 18
