"""Scores that are written and reused, and what is said of them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense import cosines, dense_merge, load, weight_files
from torch import Tensor

from safemerge_fast import AnalysisError, analyze, merge


@pytest.fixture(scope="module")
def done(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One merge with the default settings, for tests that only look at it."""
    output = tmp_path_factory.mktemp("merge") / "out"
    return output, merge(**quartet, output=output)


def test_reused_scores_give_the_same_bytes_without_torch(
    quartet: dict[str, Path], tmp_path: Path, done
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(analyze(quartet["base"], quartet["aligned"], quartet["finetuned"]).to_json())
    script = (
        "import sys\n"
        "from safemerge_fast.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    roles = [word for role, path in quartet.items() for word in (f"--{role}", str(path))]
    command = [sys.executable, "-c", script, "merge", *roles, "-o", str(tmp_path / "out"), "-q", "--scores"]
    finished = subprocess.run([*command, str(scores)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "False False\n"
    assert weight_files(tmp_path / "out") == weight_files(done[0])


def test_scores_of_other_models_are_refused(
    make_quartet: Callable[..., dict[str, Path]], quartet: dict[str, Path], tmp_path: Path
) -> None:
    other = make_quartet(tmp_path / "other", seed=1)
    scores = tmp_path / "scores.json"
    scores.write_text(analyze(other["base"], other["aligned"], other["finetuned"]).to_json())
    with pytest.raises(AnalysisError, match="not of these models"):
        merge(**quartet, output=tmp_path / "out", scores=scores)
    assert not (tmp_path / "out").exists()


def test_scores_against_another_reference_are_refused(quartet: dict[str, Path], tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    found = analyze(quartet["base"], quartet["aligned"], quartet["finetuned"], delta_reference="base")
    scores.write_text(found.to_json())
    with pytest.raises(AnalysisError, match="--delta-reference base"):
        merge(**quartet, output=tmp_path / "out", scores=scores)
    merge(**quartet, output=tmp_path / "out", scores=scores, delta_reference="base")


def test_scores_that_lack_a_module_are_refused(quartet: dict[str, Path], tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(
        analyze(quartet["base"], quartet["aligned"], quartet["finetuned"], exclude="down_proj").to_json()
    )
    with pytest.raises(AnalysisError, match=r"no score for model\.layers\.0\.mlp\.down_proj"):
        merge(**quartet, output=tmp_path / "out", scores=scores)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused_by_name(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def spoil(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "finetuned":
            tensors[name][3, 5] = math.nan

    quartet = make_quartet(tmp_path, edit=spoil)
    with pytest.raises(AnalysisError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight cannot be scored"):
        merge(**quartet, output=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    report = merge(**quartet, output=tmp_path / "out", allow_nonfinite=True, overwrite=True)
    assert [warning.tensor for warning in report.warnings if "NaN" in warning.message] == [name]
    merged = {tensor.name for tensor in report.tensors if tensor.merged}
    assert name in merged
    found, expected = load(tmp_path / "out"), dense_merge(quartet, merged)
    assert torch.equal(found[name].isnan(), expected[name].isnan())
    assert torch.equal(found[name].nan_to_num(), expected[name].nan_to_num())
    scores = tmp_path / "scores.json"
    scores.write_text(
        analyze(quartet["base"], quartet["aligned"], quartet["finetuned"], allow_nonfinite=True).to_json()
    )
    with pytest.raises(AnalysisError, match=r"q_proj\.weight cannot be scored"):
        merge(**quartet, output=tmp_path / "again", scores=scores)


def test_near_the_resolution_of_the_dtype_there_is_a_warning(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    """At ‖V‖/‖W‖ = 0.2 % bfloat16's rounding is as large as V itself; in float32 nothing is wrong."""
    coarse = make_quartet(tmp_path / "bf16", task_scale=0.002)
    report = merge(**coarse, output=tmp_path / "coarse")
    assert {warning.tensor for warning in report.warnings} == set(cosines(coarse))
    fine = make_quartet(tmp_path / "f32", task_scale=0.002, dtype="float32")
    assert merge(**fine, output=tmp_path / "fine").warnings == ()
