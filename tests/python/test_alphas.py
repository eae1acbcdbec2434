"""α by module type and by file, and modules that are listed by name: the weights that come of them, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import load
from invoke import assert_one_sentence, merge_words, run
from lora import write_lora

from safemerge_fast import AnalysisError, PlanError, SettingError, merge, verify

LAYERS = "model.layers"


def expected_alpha(name: str) -> float:
    """By the file below: the first that fits."""
    if ".v_proj." in name:
        return 0.5
    return 0.25 if f"{LAYERS}.1." in name else 0.8


def assert_blended(
    output: Path, quartet: dict[str, Path], alpha: Callable[[str], float], names: set[str]
) -> None:
    """Every tensor is α·finetuned + (1-α)·safe in float64, to bfloat16's rounding, or the fine-tuned one."""
    made, finetuned, safe = load(output), load(quartet["finetuned"]), load(quartet["safe"])
    for name, tensor in made.items():
        if name not in names:
            assert torch.equal(tensor, finetuned[name]), name
            continue
        weight = alpha(name)
        expected = weight * finetuned[name].double() + (1.0 - weight) * safe[name].double()
        # Where the two cancel, float32 leaves an error of their own size.
        assert torch.allclose(tensor.double(), expected, rtol=2**-8, atol=1e-7), name
        other = 0.8 if weight != 0.8 else 0.5
        wrong = other * finetuned[name].double() + (1.0 - other) * safe[name].double()
        assert (tensor.double() - expected).norm() < 0.2 * (tensor.double() - wrong).norm(), name


def test_alpha_by_type_and_by_file(quartet: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "alphas.yml"
    file.write_text("v_proj: 0.5\nlayers\\.1\\.: 0.25\n")
    report = merge(**quartet, output=tmp_path / "out", threshold=1.0, alpha_file=file)
    merged = {tensor.name for tensor in report.tensors if tensor.merged}
    assert len(merged) == 21
    assert_blended(tmp_path / "out", quartet, expected_alpha, merged)
    verify(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "α · W_finetuned + (1 − α) · W_safe, with α = 0.8" in card
    assert str(tmp_path) not in card
    merge(**quartet, output=tmp_path / "text", threshold=1.0, alpha="0.8, v_proj=0.5")
    assert_blended(tmp_path / "text", quartet, lambda name: 0.5 if ".v_proj." in name else 0.8, merged)


def test_a_text_with_one_number_is_that_number(quartet: dict[str, Path], tmp_path: Path) -> None:
    one = merge(**quartet, output=tmp_path / "a", threshold=1.0, alpha=0.6)
    other = merge(**quartet, output=tmp_path / "b", threshold=1.0, alpha="0.6")
    assert one.identity == other.identity
    assert_blended(
        tmp_path / "b", quartet, lambda name: 0.6, {tensor.name for tensor in other.tensors if tensor.merged}
    )


def test_alpha_by_type_of_other_methods(quartet: dict[str, Path], tmp_path: Path) -> None:
    """slerp goes to the point α: with α = 1 it is the fine-tuned model."""
    merge(**quartet, output=tmp_path / "out", threshold=1.0, method="slerp", alpha="0,q_proj=1")
    made = load(tmp_path / "out")
    for role, kind in (("finetuned", "q_proj"), ("safe", "k_proj")):
        name = f"{LAYERS}.0.self_attn.{kind}.weight"
        assert torch.allclose(made[name].double(), load(quartet[role])[name].double(), rtol=2**-7), kind


def test_alpha_of_adapters(quartet: dict[str, Path], tmp_path: Path) -> None:
    shapes = {f"{LAYERS}.0.self_attn.{kind}": (72, 72) for kind in ("q_proj", "o_proj")}
    roles: dict[str, Any] = {
        "base": quartet["base"],
        "aligned": quartet["aligned"],
        "finetuned": write_lora(tmp_path / "f", shapes, rank=4, seed=1),
        "safe": write_lora(tmp_path / "s", shapes, rank=4, seed=2),
    }
    report = merge(**roles, output=tmp_path / "out", threshold=1.0, alpha="0.8,o_proj=0.25")
    operations = {tensor.module_type: tensor.operation for tensor in report.tensors if tensor.merged}
    assert report.adapter is not None
    found = load_adapter(tmp_path / "out")
    updates = {role: load_adapter(roles[role]) for role in ("finetuned", "safe")}
    for kind, alpha in (("q_proj", 0.8), ("o_proj", 0.25)):
        expected = alpha * updates["finetuned"][kind] + (1.0 - alpha) * updates["safe"][kind]
        assert torch.allclose(found[kind], expected, rtol=1e-5, atol=1e-7), kind
    assert operations["q_proj"] != operations["o_proj"]


def load_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """s·B·A by the module's own name."""
    from safetensors.torch import load_file

    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        key.split(".")[-3]: scale * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        for key in tensors
        if "lora_A" in key
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "should hold module types"),
        ("[0.5]", "should hold module types"),
        ("v_proj: 2", "α of v_proj should be a number from 0 to 1, not 2"),
        ("v_proj: half", "α of v_proj should be a number from 0 to 1, not 'half'"),
        ("v_proj: true", "α of v_proj should be a number from 0 to 1, not True"),
        ("1: 0.5", "1 is no text"),
        (
            "nothing_so_called: 0.5",
            "nothing_so_called is no module type and matches no name; analysed are down_proj",
        ),
        ("'(': 0.5", "not a regular expression"),
        ("{", "not YAML"),
    ],
)
def test_a_file_of_alphas_that_is_wrong_is_refused(
    quartet: dict[str, Path], tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "alphas.yml"
    file.write_text(text)
    with pytest.raises(PlanError, match=r"alpha_file .*alphas\.yml") as raised:
        merge(**quartet, output=tmp_path / "out", alpha_file=file)
    assert said in str(raised.value)
    assert raised.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_a_type_that_is_none_is_a_usage_error(quartet: dict[str, Path], tmp_path: Path) -> None:
    result = run(*merge_words(quartet, tmp_path / "out", "--alpha", "0.8,vproj=0.5"))
    assert result.exit_code == 2
    assert_one_sentence(result, "alpha: vproj is no module type")
    with pytest.raises(SettingError, match="vproj is no module type"):
        merge(**quartet, output=tmp_path / "out", alpha="0.8,vproj=0.5")


NAMES = [f"{LAYERS}.0.self_attn.q_proj.weight", f"{LAYERS}.2.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", f"# chosen in the report\n\n{NAMES[0]}\r\n  {NAMES[1]}\n"),
        ("list.json", json.dumps(NAMES)),
        ("list.yml", f"- {NAMES[1]}\n- {NAMES[0]}\n- {NAMES[0]}\n"),
    ],
)
def test_exactly_the_listed_modules_are_merged(
    quartet: dict[str, Path], tmp_path: Path, name: str, text: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    report = merge(**quartet, output=tmp_path / "out", modules=file)
    assert [tensor.name for tensor in report.tensors if tensor.merged] == sorted(NAMES, key=NAMES.index)
    assert {tensor.reason for tensor in report.tensors if tensor.merged} == {"listed"}
    assert all(tensor.rho is not None for tensor in report.tensors if tensor.analysed)
    assert_blended(tmp_path / "out", quartet, lambda _: 0.8, set(NAMES))
    assert "2 matrices that were listed by name are merged" in (tmp_path / "out" / "README.md").read_text()
    # What the list holds is what tells a job from another, not its name.
    (tmp_path / "again.txt").write_text("\n".join(reversed(NAMES)))
    again = merge(**quartet, output=tmp_path / "b", modules=tmp_path / "again.txt")
    assert again.identity == report.identity
    (tmp_path / "again.txt").write_text(NAMES[0])
    other = merge(**quartet, output=tmp_path / "c", modules=tmp_path / "again.txt")
    assert other.identity != report.identity


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.txt", "", "names no module"),
        ("l.txt", "# nothing\n", "names no module"),
        ("l.txt", "model.layers.9.q", "model.layers.9.q, which the fine-tuned model has no module of"),
        ("l.txt", "model.embed_tokens.weight", "which is not analysed (embedding); --include adds"),
        ("l.json", "{}", "should be a list of names"),
        ("l.json", "[1]", "should be a list of names"),
        ("l.yml", "- [", "not YAML"),
        ("l.txt", "\x1b[2Jx", "names \\x1b[2Jx, which"),
    ],
)
def test_a_list_that_is_wrong_is_refused(
    quartet: dict[str, Path], tmp_path: Path, name: str, text: str, said: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(AnalysisError) as raised:
        merge(**quartet, output=tmp_path / "out", modules=file)
    assert str(raised.value).startswith(f"the list of modules {file}")
    assert said in str(raised.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(AnalysisError, match="there is no such file"):
        merge(**quartet, output=tmp_path / "out", modules=tmp_path / "none.txt")


@pytest.mark.parametrize("family", ["qwen3_moe", "dbrx"])
def test_parts_of_an_expert_have_their_own_alpha_and_scores_are_found_in_the_report(
    tmp_path: Path, family: str
) -> None:
    """Experts that lie in one tensor, gate and up in its halves."""
    from expert_models import matrices
    from test_expert_merges import quartet as experts
    from test_expert_merges import version, written
    from test_experts import ROLES, key_of

    roles: dict[str, Any] = experts(tmp_path, family, ROLES)
    probe = merge(**roles, output=tmp_path / "probe", threshold=0.75)
    types = {
        key: module.module_type
        for tensor in probe.tensors
        if tensor.analysed
        for module in tensor.module_reports()
        if (key := key_of(module.name)) is not None
    }
    kind = sorted(set(types.values()))[-1]
    merge(
        **roles,
        output=tmp_path / "out",
        threshold=1.0,
        alpha=f"0.8,{kind}=0.25",
        scores=tmp_path / "probe",
    )
    verify(tmp_path / "out")
    finetuned, safe = (dict(matrices(version(family, seed))) for seed in (2, 3))
    found = written(probe, tmp_path / "out")
    assert found.keys() == types.keys()
    for key, module_type in types.items():
        alpha = 0.25 if module_type == kind else 0.8
        expected = alpha * finetuned[key].detach().double() + (1.0 - alpha) * safe[key].detach().double()
        assert torch.allclose(found[key].double(), expected, rtol=1e-5, atol=1e-7), key
