"""Models that are not what their roles say are refused before anything is written; right ones never are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_safetensors
from dense import assert_same_bits, is_projection, load
from invoke import assert_one_sentence, merge_words, run
from lora import write_lora
from torch import Tensor

from safemerge_fast import RoleError, analyze, merge, preview, resta, wise_ft
from safemerge_fast.analysis.roles import judge_roles
from safemerge_fast.analysis.score import Score
from safemerge_fast.analysis.scores import Scores
from safemerge_fast.checkpoint.adapter import open_source
from safemerge_fast.checkpoint.identical import same_weights
from safemerge_fast.recipes.safemerge.settings import SafemergeSettings

Quartet = dict[str, Path]
Make = Callable[..., Quartet]


def overlap(quartet: Quartet, base: str, aligned: str, finetuned: str) -> float:
    """cos(V, Δ) over all projections, in float64."""
    models = [load(quartet[role]) for role in (base, aligned, finetuned)]
    names = [name for name in models[2] if is_projection(name)]
    b, a, f = (torch.cat([model[name].double().flatten() for name in names]) for model in models)
    return float((a - b) @ (f - a) / ((a - b).norm() * (f - a).norm()))


def left(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if not path.name.startswith(".")]


def test_swapped_base_and_aligned(quartet: Quartet, tmp_path: Path) -> None:
    swapped = {**quartet, "base": quartet["aligned"], "aligned": quartet["base"]}
    found = overlap(quartet, "aligned", "base", "finetuned")
    assert found < -0.8
    result = run(*merge_words(swapped, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, f"cos(V, Δ) is {found:.2f}", "swapped", "--force")
    assert left(tmp_path) == []
    # What was measured is kept.
    lines = (tmp_path / ".out.safemerge" / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 1 + sum(is_projection(name) for name in load(quartet["finetuned"]))

    result = run(*merge_words(swapped, tmp_path / "out", "--force", "--resume"))
    assert result.exit_code == 0, result.stderr
    assert "warning: cos(V, Δ) is" in result.stderr
    report = json.loads((tmp_path / "out" / "safemerge_report.json").read_text())
    (warning,) = (warning for warning in report["warnings"] if warning["tensor"] is None)
    assert "swapped" in warning["message"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Warning:**" in card
    assert "swapped" in card
    assert "--force" in card
    measured = {tensor["name"]: tensor for tensor in report["tensors"] if tensor["analysed"]}
    base, aligned, finetuned = (load(quartet[role]) for role in ("aligned", "base", "finetuned"))
    for name, tensor in measured.items():
        v, delta = (
            aligned[name].double() - base[name].double(),
            finetuned[name].double() - aligned[name].double(),
        )
        assert tensor["cos_v_delta"] == pytest.approx(
            float((v * delta).sum() / v.norm() / delta.norm()), abs=1e-6
        )


def test_analyze_refuses_swapped_roles_and_keeps_what_it_measured(quartet: Quartet, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    words = ["--base", quartet["aligned"], "--aligned", quartet["base"], "--finetuned", quartet["finetuned"]]
    result = run("analyze", *words, "-o", file)
    assert result.exit_code == 3
    assert_one_sentence(result, "swapped", "--force")
    swapped = {**quartet, "base": quartet["aligned"], "aligned": quartet["base"]}
    for more in ([], ["--dry-run"]):
        result = run(*merge_words(swapped, tmp_path / "out", "--scores", file, *more))
        assert result.exit_code == 3
        assert_one_sentence(result, "swapped")
    assert left(tmp_path) == ["scores.json"]
    result = run("analyze", *words, "--force")
    assert result.exit_code == 0
    assert "warning: cos(V, Δ)" in result.stderr
    with pytest.raises(RoleError, match="swapped"):
        analyze(quartet["aligned"], quartet["base"], quartet["finetuned"])
    analyze(quartet["aligned"], quartet["base"], quartet["finetuned"], force=True)


@pytest.mark.parametrize("reference", ["aligned", "base"])
def test_right_roles_pass_and_swapped_ones_do_not(quartet: Quartet, reference: str) -> None:
    assert abs(overlap(quartet, "base", "aligned", "finetuned")) < 0.1
    analyze(quartet["base"], quartet["aligned"], quartet["finetuned"], delta_reference=reference)
    with pytest.raises(RoleError, match=r"cos\(V, Δ\) is -0\.[89]\d, .*swapped"):
        analyze(quartet["aligned"], quartet["base"], quartet["finetuned"], delta_reference=reference)


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ({"base": "aligned"}, "base and aligned are the same model"),
        ({"finetuned": "aligned"}, "aligned and finetuned are the same model"),
        ({"finetuned": "base"}, "base and finetuned are the same model"),
        ({"safe": "finetuned"}, "finetuned and safe are the same model"),
        ({"safe": "base"}, "base and safe are the same model"),
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_one_model_in_two_roles(
    quartet: Quartet, tmp_path: Path, roles: dict[str, str], said: str, copied: bool
) -> None:
    given = dict(quartet)
    for role, other in roles.items():
        given[role] = quartet[other]
        if copied:
            # Other inodes, and all tensors in one file.
            given[role] = tmp_path / "copy"
            given[role].mkdir()
            write_safetensors(given[role] / "model.safetensors", load(quartet[other]))
            shutil.copy(quartet[other] / "config.json", given[role])
    result = run(*merge_words(given, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, said, "--force")
    assert [path.name for path in tmp_path.iterdir()] == (["copy"] if copied else [])


def test_the_aligned_model_may_be_the_safe_one(quartet: Quartet, tmp_path: Path) -> None:
    report = merge(**{**quartet, "safe": quartet["aligned"]}, output=tmp_path / "one")
    assert any("the safe model is the aligned one" in note for note in report.notes)
    merge(**{**quartet, "safe": None}, output=tmp_path / "two")
    assert_same_bits(load(tmp_path / "one"), load(tmp_path / "two"))


def test_equal_numbers_of_another_dtype(make_quartet: Make, tmp_path: Path) -> None:
    """Bytes differ, V is zero: what the measuring finds."""
    quartet = make_quartet(tmp_path / "in", dtype="bfloat16")
    wide = tmp_path / "wide"
    wide.mkdir()
    write_safetensors(
        wide / "model.safetensors",
        {name: tensor.float() for name, tensor in load(quartet["aligned"]).items()},
    )
    with pytest.raises(
        RoleError, match=r"base and aligned hold the same weights in all 21 modules \(V = 0\)"
    ):
        analyze(wide, quartet["aligned"], quartet["finetuned"])
    with pytest.raises(RoleError, match=r"finetuned and aligned hold the same weights .*\(Δ = 0\)"):
        analyze(quartet["base"], quartet["aligned"], wide)


@pytest.mark.parametrize("role", ["base", "aligned", "finetuned"])
def test_another_model(make_quartet: Make, quartet: Quartet, tmp_path: Path, role: str) -> None:
    other = make_quartet(tmp_path / "other", seed=9)
    roles = {**quartet, role: other[role]}
    with pytest.raises(RoleError, match=rf"{role} is another model .* is 1\.4\d times ‖W_aligned‖"):
        merge(**roles, output=tmp_path / "out")
    assert left(tmp_path) == ["other"]


@pytest.mark.parametrize(
    ("name", "task_scale", "learned"),
    [
        ("one step", 0.05, 1e-6),
        ("a large rate", 0.05, 0.9),
        ("little alignment", 0.002, 0.5),
        ("much", 0.5, 0.1),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_fine_tunes_of_all_sizes_pass(
    make_quartet: Make, tmp_path: Path, name: str, task_scale: float, learned: float, dtype: str
) -> None:
    """‖Δ‖ from a millionth to nine tenths of ‖W‖; in bfloat16 most of a small one is rounding."""

    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "finetuned":
            generator = torch.Generator().manual_seed(3)
            for key, tensor in tensors.items():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                size = learned * tensor.double().norm() / math.sqrt(tensor.numel())
                tensors[key] = (tensor.double() + size * noise).to(tensor.dtype)

    quartet = make_quartet(tmp_path, dtype=dtype, task_scale=task_scale, edit=edit)
    for reference in ("aligned", "base"):
        analyze(quartet["base"], quartet["aligned"], quartet["finetuned"], delta_reference=reference)


@pytest.mark.parametrize("size", [0.003, 0.03, 0.3, 3.0])
def test_rounding_alone_does_not_look_swapped(size: float) -> None:
    """V and Δ far below a step of bfloat16: what is seen of them is shared rounding, with cos(V, Δ) down to -0.5."""
    generator = torch.Generator().manual_seed(1)
    base = 1.0 + torch.rand(400, 400, generator=generator, dtype=torch.float64)
    step = 2.0**-7

    def moved(weight: Tensor, by: float) -> Tensor:
        return weight + by * step * torch.randn(400, 400, generator=generator, dtype=torch.float64)

    for ratio in (0.3, 1.0, 10.0):
        aligned = moved(base, size)
        finetuned = moved(aligned, size * ratio)
        b, a, f = (weight.bfloat16().double() for weight in (base, aligned, finetuned))
        v, delta = a - b, f - a
        cosine = float((v * delta).sum() / v.norm() / delta.norm())
        score = Score(
            0.5, 0.5, float(v.norm()), float(delta.norm()), float(a.norm()), 0.1, None, cos_v_delta=cosine
        )
        assert judge_roles({"w": score}, delta_reference="aligned", adapter=False).wrong == ()


def test_half_of_the_alignment_may_be_taken_back(make_quartet: Make, tmp_path: Path) -> None:
    kept: dict[str, Tensor] = {}

    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            kept[f"{role} {name}"] = tensor
            if role == "finetuned":
                tensors[name] = (
                    tensor.double() - 0.5 * (kept[f"aligned {name}"].double() - kept[f"base {name}"].double())
                ).to(tensor.dtype)

    quartet = make_quartet(tmp_path, dtype="float32", edit=edit)
    assert overlap(quartet, "base", "aligned", "finetuned") < -0.5
    analyze(quartet["base"], quartet["aligned"], quartet["finetuned"])


def test_scores_of_early_versions_are_judged_as_far_as_they_go(quartet: Quartet, tmp_path: Path) -> None:
    scores = analyze(quartet["base"], quartet["aligned"], quartet["finetuned"])
    document = json.loads(scores.to_json())
    for module in document["modules"].values():
        del module["cos_v_delta"]
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(document))
    assert Scores.from_json(file.read_text()).modules.keys() == scores.modules.keys()
    report = merge(**quartet, output=tmp_path / "out", scores=file)
    assert any(warning.tensor is None and "earlier version" in warning.message for warning in report.warnings)
    for module in document["modules"].values():
        module |= {"v_norm": 0.0, "rho": None, "undefined": "V is zero"}
    file.write_text(json.dumps(document))
    with pytest.raises(RoleError, match="V = 0"):
        merge(**quartet, output=tmp_path / "again", scores=file)


# --- adapters ---------------------------------------------------------------------------------------


MODULES = {f"model.layers.{layer}.self_attn.q_proj": (72, 72) for layer in range(3)}


def test_adapters_that_are_one(quartet: Quartet, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "f", MODULES, rank=4, seed=1)
    shutil.copytree(adapter, tmp_path / "copy")
    other = write_lora(tmp_path / "other", MODULES, rank=4, seed=2)
    roles = {**quartet, "finetuned": adapter}
    with pytest.raises(RoleError, match="finetuned and safe are the same model"):
        merge(**{**roles, "safe": tmp_path / "copy"}, output=tmp_path / "out")
    report = merge(**{**roles, "safe": other}, output=tmp_path / "out")
    sizes = {
        name: tensor.numel()
        for name, tensor in load(quartet["aligned"]).items()
        if tensor.is_floating_point()
    }
    coverage = report.coverage
    assert coverage is not None
    assert coverage.analysed_parameters == coverage.adapted_parameters == 3 * 72 * 72
    assert coverage.parameters == sum(sizes.values())
    share = math.floor(1000 * 3 * 72 * 72 / sum(sizes.values())) / 10
    said = f"nalysed {share:g} % of the parameters (all that the adapter changes)"
    assert said in (tmp_path / "out" / "README.md").read_text()

    # The same factors with another alpha are another adapter.
    file = tmp_path / "copy" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "lora_alpha": 2 * settings["lora_alpha"]}))
    one, two = open_source("finetuned", adapter), open_source("safe", tmp_path / "copy")
    assert same_weights(one, one)
    assert not same_weights(one, two)


def test_a_difference_in_the_last_bytes_is_seen(quartet: Quartet, tmp_path: Path) -> None:
    tensors = load(quartet["finetuned"])
    tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1.0
    tmp_path.joinpath("model").mkdir()
    write_safetensors(tmp_path / "model" / "model.safetensors", tensors)
    one = open_source("finetuned", quartet["finetuned"])
    assert not same_weights(one, open_source("safe", tmp_path / "model"))


# --- other recipes ----------------------------------------------------------------------------------


def test_recipes_that_measure_nothing_see_one_model_in_two_roles(quartet: Quartet, tmp_path: Path) -> None:
    with pytest.raises(RoleError, match="base and aligned are the same model"):
        resta(quartet["aligned"], quartet["aligned"], quartet["finetuned"], output=tmp_path / "out")
    with pytest.raises(RoleError, match="aligned and finetuned are the same model"):
        wise_ft(quartet["aligned"], quartet["aligned"], output=tmp_path / "out")
    report = wise_ft(quartet["aligned"], quartet["aligned"], output=tmp_path / "out", force=True)
    assert [warning.tensor for warning in report.warnings] == [None]
    assert "**Warning:**" in (tmp_path / "out" / "README.md").read_text()


# --- how much is analysed ---------------------------------------------------------------------------


def test_a_fine_tune_that_holds_only_some_tensors(quartet: Quartet, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load(quartet["finetuned"]).items() if "q_proj" in name}
    (tmp_path / "part").mkdir()
    write_safetensors(tmp_path / "part" / "model.safetensors", tensors)
    share = sum(tensor.numel() for tensor in tensors.values()) / sum(
        tensor.numel() for tensor in load(quartet["aligned"]).values()
    )
    result = run(*merge_words({**quartet, "finetuned": tmp_path / "part"}, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, "finetuned lacks", "--allow-missing")
    words = merge_words({**quartet, "finetuned": tmp_path / "part"}, tmp_path / "out", "--allow-missing")
    result = run(*words)
    assert result.exit_code == 3
    assert_one_sentence(
        result, f"has only {math.floor(1000 * share) / 10:g} % of the aligned model's parameters"
    )


def test_nothing_analysed_is_an_error(quartet: Quartet, tmp_path: Path) -> None:
    result = run(*merge_words(quartet, tmp_path / "out", "--exclude", "."))
    assert result.exit_code == 3
    assert_one_sentence(result, "none of the 30 tensors is analysed", "--include")
    assert left(tmp_path) == []
    words = ["--base", quartet["base"], "--aligned", quartet["aligned"], "--finetuned", quartet["finetuned"]]
    assert run("analyze", *words, "--exclude", ".").exit_code == 3
    result = run(*merge_words(quartet, tmp_path / "out", "--exclude", ".", "--others", "merge", "--force"))
    assert result.exit_code == 0
    assert "analysed 0 % of the parameters" in result.stderr


def test_every_summary_says_how_much_was_analysed(quartet: Quartet, tmp_path: Path) -> None:
    sizes = {
        name: tensor.numel()
        for name, tensor in load(quartet["finetuned"]).items()
        if tensor.is_floating_point()
    }
    analysed = sum(size for name, size in sizes.items() if is_projection(name))
    share = f"{math.floor(1000 * analysed / sum(sizes.values())) / 10:g} %"
    said = f"analysed {share} of the parameters"
    words = ["--base", quartet["base"], "--aligned", quartet["aligned"], "--finetuned", quartet["finetuned"]]
    assert said in run("analyze", *words).stderr
    assert said in run(*merge_words(quartet, tmp_path / "out", "--dry-run")).stdout
    outlook = preview(
        SafemergeSettings(**{role: str(path) for role, path in quartet.items()}, output=str(tmp_path))
    )
    assert outlook.coverage is not None
    assert said in run(*merge_words(quartet, tmp_path / "out")).stderr
    report = json.loads((tmp_path / "out" / "safemerge_report.json").read_text())
    assert report["coverage"] == {
        "analysed_parameters": analysed,
        "parameters": sum(sizes.values()),
        "adapted_parameters": None,
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert said[1:] in card
    assert "Not evaluated" in card
    assert "repaired" not in card
