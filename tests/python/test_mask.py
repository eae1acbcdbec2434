"""Masks against kept + share·(merged - kept) in float64; what they may hold, and what they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_quartet, write_safetensors
from dense import assert_same_bits, is_projection, load
from expert_models import save
from invoke import assert_one_sentence, run
from lora import load_checkpoint
from test_expert_merges import version
from test_factors import DOWN, Q, weights
from torch import Tensor

from safemerge_fast import (
    PairingError,
    Report,
    SettingError,
    merge,
    preview,
    shrink,
    verify,
    wise_ft,
)
from safemerge_fast.errors import SafemergeError
from safemerge_fast.recipes.safemerge.settings import SafemergeSettings

NEAR = 2e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from lora import write_lora

    path = tmp_path_factory.mktemp("masks")
    paths = write_quartet(path, dtype="float32", shards=2)
    paths["adapter"] = write_lora(path / "adapter", Q | DOWN, rank=5, seed=1)
    return paths


def shares(model: Path, dtype: torch.dtype, seed: int = 5) -> dict[str, Tensor]:
    """A share for each element of each float tensor; about a third are 0, a third are 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in load_checkpoint(model).items():
        if tensor.is_floating_point():
            drawn = (3.0 * torch.rand(tensor.shape, generator=generator) - 1.0).clamp(0.0, 1.0)
            made[name] = (drawn if dtype.is_floating_point else drawn.round()).to(dtype)
    return made


def write_mask(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    write_safetensors(path, tensors)
    return path


def assert_masked(
    found: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    mask: Mapping[str, Tensor],
) -> None:
    """Compares with float64; where a share is 0 the kept element stays to the bit."""
    for name, tensor in found.items():
        if name not in merged:
            assert torch.equal(tensor.double(), kept[name]), name
            continue
        share = mask[name].double()
        wanted = kept[name] + share * (merged[name] - kept[name])
        assert float((tensor.double() - wanted).abs().max()) < NEAR, name
        assert torch.equal(tensor.double()[share == 0], kept[name].float().double()[share == 0]), name


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.uint8, torch.bool]
)
def test_wise_ft_under_a_mask(models: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    mask = shares(models["finetuned"], dtype)
    file = write_mask(tmp_path / "mask.safetensors", mask)
    report = wise_ft(models["aligned"], models["finetuned"], output=tmp_path / "out", alpha=0.7, mask=file)
    aligned, fine = weights(models, "aligned"), weights(models, "finetuned")
    merged = {name: 0.3 * fine[name] + 0.7 * aligned[name] for name in mask}
    assert_masked(load_checkpoint(tmp_path / "out"), fine, merged, mask)
    assert report.changed == len(mask)
    assert report.inputs["mask"]["path"] == str(file)
    operations = {tensor.operation for tensor in report.tensors if tensor.merged}
    assert operations == {"linear: 0.3 finetuned + 0.7 aligned; by mask, else finetuned"}
    verify(tmp_path / "out")
    assert "as far as `mask.safetensors` lets each element" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("finetuned", ["finetuned", "adapter"])
def test_elements_go_back_to_the_aligned_model(
    models: dict[str, Path], tmp_path: Path, finetuned: str
) -> None:
    """What Safe Delta or NLSR come to, once somebody has chosen the elements."""
    mask = shares(models["aligned"], torch.bool)
    file = write_mask(tmp_path / "mask.safetensors", mask)
    shrink(models["aligned"], models[finetuned], output=tmp_path / "out", alpha=0.0, mask=file)
    aligned, fine = weights(models, "aligned"), weights(models, finetuned)
    chosen = {name for name in fine if is_projection(name)}
    if finetuned == "adapter":
        chosen = {name for name in chosen if name.removesuffix(".weight") in Q | DOWN}
    found = load_checkpoint(tmp_path / "out")
    for name in chosen:
        assert torch.equal(found[name][mask[name]].double(), aligned[name][mask[name]]), name
        assert float((found[name].double() - fine[name])[~mask[name]].abs().max()) < 1e-6, name
    verify(tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_linear"])
def test_any_method_of_a_merge_under_a_mask(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    """The mask lies over what the method makes of whole tensors, passes and all."""
    roles = {role: models[role] for role in ("base", "aligned", "finetuned", "safe")}
    more: dict[str, Any] = {} if method in ("linear", "slerp") else {"density": 0.5}
    plain = merge(**roles, output=tmp_path / "plain", method=method, select="lowest:9", **more)
    mask = shares(models["finetuned"], torch.float32)
    file = write_mask(tmp_path / "mask.safetensors", mask)
    report = merge(**roles, output=tmp_path / "out", method=method, select="lowest:9", mask=file, **more)
    chosen = {tensor.name for tensor in plain.tensors if tensor.merged}
    assert {tensor.name for tensor in report.tensors if tensor.merged} == chosen
    assert len(chosen) == 9
    whole = {name: load(tmp_path / "plain")[name].double() for name in chosen}
    assert_masked(load(tmp_path / "out"), weights(models, "finetuned"), whole, mask)
    verify(tmp_path / "out")
    assert "element by element as far as the mask says" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_of_nothing_and_all_are_exact(models: dict[str, Path], tmp_path: Path, share: float) -> None:
    mask = {name: torch.full_like(t, share) for name, t in shares(models["safe"], torch.float32).items()}
    file = write_mask(tmp_path / "mask.safetensors", mask)
    roles = {role: models[role] for role in ("base", "aligned", "finetuned", "safe")}
    merge(**roles, output=tmp_path / "out", select="fraction:1", mask=file, others="merge")
    expected = load(models["finetuned"])
    if share:
        merge(**roles, output=tmp_path / "plain", select="fraction:1", others="merge")
        expected = load(tmp_path / "plain")
    assert_same_bits(load(tmp_path / "out"), expected)


def test_adapters_are_merged_into_a_checkpoint_under_a_mask(models: dict[str, Path], tmp_path: Path) -> None:
    mask = shares(models["aligned"], torch.float32)
    file = write_mask(tmp_path / "mask.safetensors", mask)
    roles = {"base": models["base"], "aligned": models["aligned"], "finetuned": models["adapter"]}
    merge(**roles, output=tmp_path / "out", select="fraction:1", alpha=0.25, mask=file)
    aligned, fine = weights(models, "aligned"), weights(models, "adapter")
    adapted = {name for name in fine if name.removesuffix(".weight") in Q | DOWN}
    merged = {name: 0.25 * fine[name] + 0.75 * aligned[name] for name in adapted}
    found = load_checkpoint(tmp_path / "out")
    for name in adapted:
        wanted = fine[name] + mask[name].double() * (merged[name] - fine[name])
        assert float((found[name].double() - wanted).abs().max()) < NEAR, name
    verify(tmp_path / "out")
    with pytest.raises(SettingError, match="an adapter holds products, which a mask"):
        merge(**roles, output=tmp_path / "no", mask=file, output_format="adapter")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_stacked_experts_have_stacked_shares(tmp_path: Path, family: str) -> None:
    paths = {
        role: save(version(family, seed), tmp_path / role, singly=False)
        for seed, role in enumerate(("base", "aligned", "finetuned", "safe"))
    }
    mask = shares(paths["finetuned"], torch.float32)
    file = write_mask(tmp_path / "mask.safetensors", mask)
    arguments: dict[str, Any] = {**paths, "select": "fraction:0.5", "force": True}
    report = merge(**arguments, output=tmp_path / "out", mask=file)
    plain = merge(**arguments, output=tmp_path / "plain")
    assert 0 < report.merged == plain.merged
    whole = {name: t.double() for name, t in load(tmp_path / "plain").items() if t.is_floating_point()}
    fine = {name: t.double() for name, t in load(paths["finetuned"]).items()}
    assert_masked(load(tmp_path / "out"), fine, whole, mask)
    verify(tmp_path / "out")


def reasons(report: Report) -> dict[str, str]:
    return {tensor.name: tensor.reason for tensor in report.tensors}


def test_what_the_mask_lacks_is_kept_and_named(models: dict[str, Path], tmp_path: Path) -> None:
    mask = {name: t for name, t in shares(models["safe"], torch.uint8).items() if "q_proj" in name}
    mask["model.layers.9.mlp.up_proj.weight"] = torch.ones(4, dtype=torch.uint8)
    file = write_mask(tmp_path / "mask.safetensors", mask)
    roles = {role: models[role] for role in ("base", "aligned", "finetuned", "safe")}
    report = merge(**roles, output=tmp_path / "out", select="fraction:1", mask=file)
    assert report.merged == 3
    assert reasons(report)["model.layers.0.mlp.up_proj.weight"].startswith("kept: not in the mask (")
    notes = " ".join(report.notes)
    assert "18 tensors that would be merged are kept, since the mask has no tensor of their names" in notes
    assert (
        "1 tensors of the mask are none of the output's floats and not used, such as model.layers.9" in notes
    )
    assert report.unused["mask"] == ("model.layers.9.mlp.up_proj.weight",)
    report = wise_ft(models["aligned"], models["finetuned"], output=tmp_path / "w", mask=file)
    assert report.changed == 3
    assert reasons(report)["model.norm.weight"] == "not in the mask: kept"
    assert any("26 tensors that would be merged are kept" in note for note in report.notes)


def test_previews_and_runs_that_go_on(models: dict[str, Path], tmp_path: Path) -> None:
    file = write_mask(tmp_path / "mask.safetensors", shares(models["safe"], torch.uint8))
    roles = {role: str(models[role]) for role in ("base", "aligned", "finetuned", "safe")}
    outlook = preview(SafemergeSettings(**roles, output=str(tmp_path / "out"), mask=str(file)))
    report = merge(**roles, output=tmp_path / "out", mask=file, threshold=1.0)
    assert outlook.bytes_read == report.bytes_read
    assert (
        merge(**roles, output=tmp_path / "out", mask=file, threshold=1.0, resume=True).merged == report.merged
    )
    other = write_mask(tmp_path / "other.safetensors", shares(models["safe"], torch.uint8, seed=9))
    with pytest.raises(SafemergeError, match="--overwrite"):
        merge(**roles, output=tmp_path / "out", mask=other, threshold=1.0, resume=True)
    result = run("merge", "--recipe", "shrink", "--mask", file, "--aligned", roles["aligned"],
                 "--finetuned", roles["finetuned"], "-o", tmp_path / "shrunken")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert run("verify", tmp_path / "shrunken").exit_code == 0


@pytest.mark.parametrize("share", [1.5, -0.25, float("nan"), float("inf")])
def test_shares_outside_of_their_range_are_refused(
    models: dict[str, Path], tmp_path: Path, share: float
) -> None:
    mask = shares(models["safe"], torch.float32)
    mask["model.layers.1.mlp.up_proj.weight"][3, 4] = share
    file = write_mask(tmp_path / "mask.safetensors", mask)
    with pytest.raises(SafemergeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*outside of 0 to 1"):
        wise_ft(models["aligned"], models["finetuned"], output=tmp_path / "out", mask=file)
    assert not (tmp_path / "out").exists()


def test_bytes_other_than_0_and_1_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    mask = {name: 255 * t for name, t in shares(models["safe"], torch.uint8).items()}
    file = write_mask(tmp_path / "mask.safetensors", mask)
    with pytest.raises(SafemergeError, match="outside of 0 to 1"):
        wise_ft(models["aligned"], models["finetuned"], output=tmp_path / "out", mask=file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"mask: .* has shape \(71, 72\), but the output's tensor has \(72, 72\)"),
        (lambda t: t.to(torch.int64), "has dtype I64; shares are floats, U8 or BOOL"),
    ],
)
def test_masks_that_do_not_fit(models: dict[str, Path], tmp_path: Path, change: Any, message: str) -> None:
    mask = shares(models["safe"], torch.uint8)
    name = "model.layers.0.self_attn.q_proj.weight"
    file = write_mask(tmp_path / "mask.safetensors", {**mask, name: change(mask[name])})
    with pytest.raises(PairingError, match=message):
        wise_ft(models["aligned"], models["finetuned"], output=tmp_path / "out", mask=file)


def test_masks_of_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    file = write_mask(tmp_path / "mask.safetensors", {"x": torch.ones(3)})
    words = [
        "merge",
        "--recipe",
        "wise-ft",
        "--aligned",
        models["aligned"],
        "--finetuned",
        models["finetuned"],
    ]
    result = run(*words, "--mask", file, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert_one_sentence(
        result, "mask: ", "has no tensor that is called like one of the output's", "such as x"
    )
    result = run(*words, "--mask", tmp_path / "none.safetensors", "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert_one_sentence(result, "mask: ", "does not exist")
    assert not (tmp_path / "out").exists()
