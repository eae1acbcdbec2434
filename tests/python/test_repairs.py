"""RESTA and WiSE-FT, against their formulas in float64, and DARE's mask by its statistics."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_quartet
from dense import assert_same_bits
from invoke import assert_one_sentence, run
from lora import load_checkpoint, update, write_lora
from torch import Tensor

import safemerge_fast
from safemerge_fast import PairingError, Report, SettingError, preview, resta, verify, wise_ft
from safemerge_fast.recipes.resta import RestaSettings
from safemerge_fast.recipes.wise_ft import WiseFtSettings

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]

Q = {f"model.layers.{layer}.self_attn.q_proj": (72, 72) for layer in range(3)}
DOWN = {f"model.layers.{layer}.mlp.down_proj": (72, 200) for layer in range(3)}
DEVIATIONS = 5.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quartet in float32, and an adapter of its aligned model that also replaces a norm."""
    path = tmp_path_factory.mktemp("repairs")
    paths = write_quartet(path, dtype="float32", shards=2)
    more = {"model.norm.weight": torch.rand(72, generator=torch.Generator().manual_seed(3)) + 0.5}
    paths["adapter"] = write_lora(path / "adapter", Q | DOWN, rank=5, seed=1, more=more)
    return paths


def finetuned_weights(models: Mapping[str, Path], finetuned: str) -> dict[str, Tensor]:
    """The fine-tuned weights in float64; those of an adapter are the aligned ones with its changes."""
    if finetuned != "adapter":
        return {name: tensor.double() for name, tensor in load_checkpoint(models[finetuned]).items()}
    weights = {
        name: tensor.double() + update(models["adapter"], name)
        for name, tensor in load_checkpoint(models["aligned"]).items()
    }
    more = load_checkpoint(models["adapter"])
    weights["model.norm.weight"] = more["base_model.model.model.norm.weight"].double()
    return weights


def check(models: Mapping[str, Path], finetuned: str, output: Path, report: Report, formula: Formula) -> None:
    """Compares all tensors with a formula of base, aligned and fine-tuned weights."""
    base, aligned = (load_checkpoint(models[role]) for role in ("base", "aligned"))
    expected, found = finetuned_weights(models, finetuned), load_checkpoint(output)
    assert found.keys() == expected.keys() == aligned.keys()
    for name, tensor in expected.items():
        if not aligned[name].is_floating_point():
            assert torch.equal(found[name], aligned[name])
            continue
        wanted = formula(base[name].double(), aligned[name].double(), tensor)
        assert found[name].dtype == torch.float32
        # Relative to the tensor: a value may be the small difference of large ones.
        error = float((found[name].double() - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-6, (name, error)
    tensors = {tensor.name: tensor for tensor in report.tensors}
    assert {name for name, tensor in tensors.items() if not tensor.merged} == {"model.position_ids"}
    assert tensors["model.position_ids"].reason == "I64 cannot be averaged: kept"
    assert tensors["model.position_ids"].operation.startswith("copy: ")
    assert report.merged == len(expected) - 1
    assert verify(output).bytes_checked == report.bytes_written


@pytest.mark.parametrize("finetuned", ["finetuned", "adapter"])
@pytest.mark.parametrize("gamma", [None, 1.5, -0.75, 0.0])
def test_resta_adds_the_safety_vector(
    models: dict[str, Path], tmp_path: Path, finetuned: str, gamma: float | None
) -> None:
    given = {} if gamma is None else {"gamma": gamma}
    output = tmp_path / "out"
    report = resta(models["base"], models["aligned"], models[finetuned], output=output, **given)
    used = 0.5 if gamma is None else gamma
    check(models, finetuned, output, report, lambda b, a, f: f + used * (a - b))
    assert report.recipe == "resta"
    assert report.configuration == RestaSettings(
        base=str(models["base"]),
        aligned=str(models["aligned"]),
        finetuned=str(models[finetuned]),
        output=str(output),
        gamma=used,
    )


@pytest.mark.parametrize("finetuned", ["finetuned", "adapter"])
@pytest.mark.parametrize("alpha", [None, 0.2, 0.0, 1.0])
def test_wise_ft_averages_with_the_aligned_model(
    models: dict[str, Path], tmp_path: Path, finetuned: str, alpha: float | None
) -> None:
    given = {} if alpha is None else {"alpha": alpha}
    output = tmp_path / "out"
    report = wise_ft(models["aligned"], models[finetuned], output=output, **given)
    used = 0.5 if alpha is None else alpha
    check(models, finetuned, output, report, lambda _, a, f: (1 - used) * f + used * a)
    assert set(report.inputs) == {"aligned", "finetuned"}


def test_an_adapter_s_matrix_is_read_once(models: dict[str, Path], tmp_path: Path) -> None:
    """W + s·B·A averaged with W is one read of W and a scaled product."""
    report = wise_ft(models["aligned"], models["adapter"], output=tmp_path / "w", alpha=0.25)
    operations = {tensor.name: tensor.operation for tensor in report.tensors}
    assert operations["model.layers.1.self_attn.q_proj.weight"] == "linear: aligned + 1.5·B·A(finetuned)"
    assert operations["model.layers.1.mlp.up_proj.weight"] == "copy: aligned"
    assert operations["model.norm.weight"] == "linear: 0.75 finetuned + 0.25 aligned"


# --- DARE -----------------------------------------------------------------------------------------


def kept_by_dare(models: Mapping[str, Path], output: Path, gamma: float, density: float) -> dict[str, Tensor]:
    """Which elements of the safety vector were added, by tensor; and whether those were scaled up."""
    base, aligned, finetuned = (load_checkpoint(models[role]) for role in ("base", "aligned", "finetuned"))
    found, masks = load_checkpoint(output), {}
    for name, tensor in found.items():
        vector = aligned[name].double() - base[name].double()
        if not tensor.is_floating_point():
            continue
        # Of tiny elements rounding hides whether they were added.
        clear = vector.abs() > 1e-4
        share = ((tensor.double() - finetuned[name].double()) / (gamma * vector))[clear]
        kept = share.abs() > 0.5 / density
        assert float((share[kept] - 1.0 / density).abs().max()) < 0.02 / density, name
        assert float(share[~kept].abs().max()) < 0.02 / density, name
        masks[name] = kept
    return masks


def assert_share(kept: int, count: int, share: float) -> None:
    deviation = math.sqrt(count * share * (1.0 - share))
    assert abs(kept - count * share) <= DEVIATIONS * deviation, f"{kept} of {count}, not {share}"


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_dare_keeps_a_share_of_the_safety_vector_and_scales_it_up(
    models: dict[str, Path], tmp_path: Path, density: float
) -> None:
    roles = [models[role] for role in ("base", "aligned", "finetuned")]
    masks = {}
    for seed, name in ((0, "zero"), (0, "again"), (9, "nine")):
        report = resta(*roles, output=tmp_path / name, gamma=0.7, density=density, seed=seed)
        assert report.merged == len(report.tensors) - 1
        masks[name] = kept_by_dare(models, tmp_path / name, 0.7, density)
        assert verify(tmp_path / name).bytes_checked == report.bytes_written
    assert_same_bits(load_checkpoint(tmp_path / "zero"), load_checkpoint(tmp_path / "again"))
    first, other = (
        torch.cat([mask.reshape(-1) for mask in masks[name].values()]) for name in ("zero", "nine")
    )
    for mask in masks["zero"].values():
        assert_share(int(mask.sum()), mask.numel(), density)
    assert_share(int(first.sum()), first.numel(), density)
    # Masks of other seeds agree by chance only, and so do those of other tensors.
    assert_share(int((first & other).sum()), first.numel(), density**2)
    left, right = (masks["zero"][f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    shared = min(left.numel(), right.numel())
    assert_share(int((left[:shared] & right[:shared]).sum()), shared, density**2)


def test_dare_of_everything_is_the_plain_sum(models: dict[str, Path], tmp_path: Path) -> None:
    roles = [models[role] for role in ("base", "aligned", "finetuned")]
    resta(*roles, output=tmp_path / "plain")
    resta(*roles, output=tmp_path / "all", density=1.0, seed=3)
    assert_same_bits(load_checkpoint(tmp_path / "all"), load_checkpoint(tmp_path / "plain"))


def test_dare_of_an_adapter_s_model(models: dict[str, Path], tmp_path: Path) -> None:
    """Whatever is dropped, each value is the fine-tuned one, or that plus γ/density of the safety vector."""
    output, gamma, density = tmp_path / "out", 0.5, 0.5
    resta(models["base"], models["aligned"], models["adapter"], output=output, gamma=gamma, density=density)
    base, aligned = (load_checkpoint(models[role]) for role in ("base", "aligned"))
    found = load_checkpoint(output)
    for name, tensor in finetuned_weights(models, "adapter").items():
        if aligned[name].is_floating_point():
            added = tensor + gamma / density * (aligned[name].double() - base[name].double())
            distance = torch.minimum(*((found[name].double() - value).abs() for value in (tensor, added)))
            assert float(distance.max()) < 1e-6, name


# --- tensors that a role lacks --------------------------------------------------------------------

LACKING = "model.layers.1.input_layernorm.weight"
GROWN = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of which base lacks two norms, and has a larger vocabulary."""

    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "base":
            del tensors[LACKING], tensors["model.norm.weight"]
            tensors[GROWN] = torch.ones(330, 72)

    return write_quartet(tmp_path_factory.mktemp("uneven"), dtype="float32", shards=1, edit=edit)


@pytest.mark.parametrize("options", [{}, {"density": 0.5}])
def test_tensors_that_a_role_lacks_are_kept_and_named(
    uneven: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    report = resta(uneven["base"], uneven["aligned"], uneven["finetuned"], output=tmp_path / "out", **options)
    kept = {LACKING, "model.norm.weight", GROWN}
    tensors = {tensor.name: tensor for tensor in report.tensors}
    found, finetuned = load_checkpoint(tmp_path / "out"), load_checkpoint(uneven["finetuned"])
    for name in kept:
        assert tensors[name].reason == "not in base with this shape: kept"
        assert tensors[name].operation == "copy: finetuned"
        assert torch.equal(found[name], finetuned[name])
        assert any(name in note for note in report.notes), report.notes
    assert {name for name, tensor in tensors.items() if not tensor.merged} == {*kept, "model.position_ids"}
    verify(tmp_path / "out")


def test_models_that_share_nothing_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    other = write_quartet(tmp_path / "other", hidden=36, intermediate=50, roles=("aligned",), shards=1)
    with pytest.raises(
        PairingError,
        match=r"is \(72, 72\) in finetuned but \(36, 36\) in aligned .*; give models of one architecture$",
    ):
        wise_ft(other["aligned"], models["finetuned"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the same by every way in ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "roles", "options"),
    [
        ("resta", ("base", "aligned", "finetuned"), {"gamma": 0.3, "density": 0.4, "seed": 5}),
        ("wise-ft", ("aligned", "finetuned"), {"alpha": 0.3, "dtype": "bfloat16", "max_shard_size": "100KB"}),
    ],
)
def test_file_command_and_function_make_the_same_weights(
    models: dict[str, Path], tmp_path: Path, recipe: str, roles: tuple[str, ...], options: dict[str, Any]
) -> None:
    given = {role: str(models[role]) for role in roles}
    function = {"resta": resta, "wise-ft": wise_ft}[recipe]
    report = function(**given, **options, output=tmp_path / "function")
    file = tmp_path / f"{recipe}.yml"
    file.write_text("".join(f"{k}: {v}\n" for k, v in {"recipe": recipe, **given, **options}.items()))
    safemerge_fast.run(file, output=tmp_path / "file")
    result = run("run", file, "-o", tmp_path / "command")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{recipe}: {report.merged} of {len(report.tensors)} tensors changed")
    expected = load_checkpoint(tmp_path / "function")
    for name in ("file", "command"):
        assert_same_bits(load_checkpoint(tmp_path / name), expected)
    assert run("verify", tmp_path / "command").exit_code == 0

    # The card says how to make it again, with the names that models have beside each other.
    card = (tmp_path / "function" / "README.md").read_text()
    command, document = (card.split(f"```{kind}\n")[1].split("\n```")[0] for kind in ("sh", "json"))
    where = tmp_path / "again"
    where.mkdir()
    for role in roles:
        (where / models[role].name).symlink_to(models[role])
    program, *words = shlex.split(command)
    assert (program, words[:2]) == ("safemerge-fast", ["run", f"{recipe}.yml"])
    assert json.loads(document)["recipe"] == recipe
    (where / words[1]).write_text(document)
    subprocess.run([sys.executable, "-m", "safemerge_fast", *words, "-q"], check=True, cwd=where)
    assert_same_bits(load_checkpoint(where / "function"), expected)


def test_the_card_names_models_and_paper(models: dict[str, Path], tmp_path: Path) -> None:
    resta(models["base"], models["aligned"], models["adapter"], output=tmp_path / "r", gamma=0.3)
    card = (tmp_path / "r" / "README.md").read_text()
    assert "`adapter` plus 0.3 times what alignment changed from `base` to `aligned`" in card
    assert "arxiv.org/abs/2402.11746" in card
    assert "| finetuned | `adapter` (LoRA adapter) |" in card
    wise_ft(models["aligned"], models["finetuned"], output=tmp_path / "w", alpha=0.3)
    card = (tmp_path / "w" / "README.md").read_text()
    assert "0.7 · `finetuned` + 0.3 · `aligned`" in card
    assert "arxiv.org/abs/2109.01903" in card


def test_previews_know_all_beforehand(models: dict[str, Path], tmp_path: Path) -> None:
    roles = {role: str(models[role]) for role in ("base", "aligned", "finetuned")}
    outlook = preview(RestaSettings(**roles, output=str(tmp_path / "out")))
    report = resta(**roles, output=tmp_path / "out")
    assert (outlook.merged, outlook.counts) == (report.merged, report.counts)
    assert (outlook.bytes_read, outlook.bytes_written) == (report.bytes_read, report.bytes_written)
    assert (outlook.analysed, outlook.bytes_analysed) == (0, 0)
    assert report.bytes_read == 3 * sum(
        tensor.nbytes if tensor.is_floating_point() else tensor.nbytes / 3
        for tensor in load_checkpoint(models["finetuned"]).values()
    )


def test_refusals(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"alpha should be a finite number from 0 to 1, not 1\.5"):
        WiseFtSettings(aligned="a", finetuned="f", output="o", alpha=1.5)
    file = tmp_path / "r.yml"
    file.write_text(f"recipe: wise-ft\naligned: {models['adapter']}\nfinetuned: {models['finetuned']}\n")
    result = run("run", file, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert_one_sentence(result, "aligned: ", "give a whole checkpoint")
    assert not (tmp_path / "out").exists()


def test_torch_is_not_imported(models: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from safemerge_fast import resta\n"
        f"resta({str(models['base'])!r}, {str(models['aligned'])!r}, {str(models['adapter'])!r}, "
        f"output={str(tmp_path / 'out')!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
