"""Scores as data, and the prediction of rounding: no torch needed to read, write or check them."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safemerge_fast.analysis.rounding import (
    ROUNDING_WARNING,
    relative_rounding,
    rounding_warning,
    v_rounding,
)
from safemerge_fast.analysis.score import Score
from safemerge_fast.analysis.scores import Scores, describe_source
from safemerge_fast.checkpoint.model import Model, open_model
from safemerge_fast.errors import AnalysisError

SCORES = Scores(
    modules={
        "a.weight": Score(
            0.25,
            0.7071,
            1.5,
            0.5,
            20.0,
            0.0289,
            None,
            cos_v_delta=-0.125,
            rho_low=0.24,
            rho_high=0.26,
            columns=32,
        ),
        "b.weight": Score(None, None, 0.0, 0.5, 20.0, math.nan, "V is zero"),
        "c.weight": Score(
            None, None, math.inf, 0.5, 20.0, math.nan, "non-finite values in base tensor c.weight"
        ),
    },
    delta_reference="aligned",
    sources={
        "base": {
            "path": "/models/base",
            "files": {"model.safetensors": {"size": 10, "mtime_ns": 20, "header_digest": "ab"}},
            "sample": "cd",
        }
    },
    device="cpu",
    seconds=1.5,
)


def test_json_brings_back_what_it_was_given() -> None:
    read = Scores.from_json(SCORES.to_json())
    assert read.modules["a.weight"] == SCORES.modules["a.weight"]
    assert list(read.modules) == list(SCORES.modules)
    assert read.modules["b.weight"].undefined == "V is zero"
    assert math.isnan(read.modules["b.weight"].v_rounding)
    assert math.isnan(read.modules["c.weight"].v_norm)
    assert (read.delta_reference, read.device, read.seconds, read.version) == ("aligned", "cpu", 1.5, 2)
    assert read.sources == SCORES.sources


def test_scores_of_early_versions_have_no_cosine() -> None:
    read = Scores.from_json(change(("modules", "a.weight", "cos_v_delta"), ...))
    assert read.modules["a.weight"].cos_v_delta is None
    assert read.modules["a.weight"].rho == 0.25


def test_scores_of_version_1_are_exact() -> None:
    document = json.loads(SCORES.to_json())
    document["version"] = 1
    for field in ("estimator", "failure", "seed"):
        del document[field]
    for score in document["modules"].values():
        for field in ("rho_low", "rho_high", "columns", "null_sd"):
            del score[field]
    read = Scores.from_json(json.dumps(document))
    score = read.modules["a.weight"]
    assert (score.rho_low, score.rho, score.rho_high, score.columns) == (0.25, 0.25, 0.25, 0)
    assert (read.estimator, read.failure, read.seed) == ("exact", None, None)


def test_json_is_strict() -> None:
    """No NaN or Infinity, which other languages refuse to read."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(SCORES.to_json(), parse_constant=refuse)
    assert document["version"] == 2
    assert document["modules"]["b.weight"]["v_rounding"] is None


def change(path: tuple[str, ...], value: Any) -> str:
    """The JSON with one value changed, or taken away if it is `...`."""
    document = json.loads(SCORES.to_json())
    part = document
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("version",), 3, r"version should be 1 or 2, not 3"),
        (("version",), ..., r"has no 'version'"),
        (("modules",), [], r"modules should be an object"),
        (("surprise",), 1, r"unknown 'surprise'"),
        (("delta_reference",), "safe", r"delta_reference should be aligned or base"),
        (("device",), 3, r"device should be a string"),
        (("seconds",), "1", r"seconds should be a finite number"),
        (("modules", "a.weight", "rho"), "0.2", r"rho of a\.weight should be a finite number"),
        (("modules", "a.weight", "rho"), True, r"rho of a\.weight should be a finite number"),
        (("modules", "a.weight", "rho"), None, r"a\.weight should have either rho or undefined"),
        (("modules", "a.weight", "v_norm"), ..., r"a\.weight has no 'v_norm'"),
        (("modules", "a.weight", "cos_v_delta"), 1.5, r"cos_v_delta of a\.weight should be from -1 to 1"),
        (("modules", "a.weight", "cos_v_delta"), "0", r"cos_v_delta of a\.weight should be a finite number"),
        (("modules", "a.weight", "rho_low"), 0.3, r"the interval of a\.weight should be around rho"),
        (("modules", "a.weight", "columns"), 1.5, r"columns of a\.weight should be a whole number"),
        (("estimator",), "guess", r"estimator should be auto, sketch, exact"),
        (("failure",), 1, r"failure should be between 0 and 1"),
        (("seed",), -1, r"seed should be a whole number"),
        (("modules", "a.weight", "extra"), 1, r"a\.weight has an unknown 'extra'"),
        (("modules", "b.weight", "undefined"), 0, r"undefined of b\.weight should be a string or null"),
        (("modules", "b.weight"), 0.3, r"b\.weight should be an object"),
        (("sources", "base", "path"), 1, r"path of source base should be a string"),
        (("sources", "base", "files"), [], r"files of source base should be an object"),
        (("sources", "base", "files", "model.safetensors", "size"), ..., r"has no 'size'"),
    ],
)
def test_refuses_scores_that_are_not_as_they_should_be(path: tuple[str, ...], value: Any, said: str) -> None:
    with pytest.raises(AnalysisError, match=said):
        Scores.from_json(change(path, value))


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "null"])
def test_refuses_what_is_no_json_object(text: str) -> None:
    with pytest.raises(AnalysisError, match="write them again with analyze"):
        Scores.from_json(text)


def test_csv_has_a_line_per_module() -> None:
    lines = list(csv.DictReader(io.StringIO(SCORES.to_csv())))
    assert [line["name"] for line in lines] == list(SCORES.modules)
    assert float(lines[0]["rho"]) == 0.25
    assert float(lines[0]["rho_null"]) == 0.7071
    assert [line["cos_v_delta"] for line in lines] == ["-0.125", "", ""]
    assert lines[1]["rho"] == ""
    assert lines[1]["undefined"] == "V is zero"


@pytest.fixture
def opened(tmp_path: Path, make_quartet: Callable[..., dict[str, Path]]) -> dict[str, Model]:
    quartet = make_quartet(tmp_path, layers=1, shards=2)
    return {role: open_model(role, quartet[role]) for role in ("base", "aligned", "finetuned")}


def scores_of(models: dict[str, Model]) -> Scores:
    sources = {role: describe_source(model) for role, model in models.items()}
    return Scores.from_json(Scores({}, "aligned", sources, "cpu", 0.0).to_json())


def test_scores_match_the_same_models_and_copies_of_them(opened: dict[str, Model], tmp_path: Path) -> None:
    scores = scores_of(opened)
    assert scores.matches(opened) is None
    copy = shutil.copytree(opened["base"].path, tmp_path / "copy", copy_function=shutil.copyfile)
    assert scores.matches({**opened, "base": open_model("base", copy)}) is None
    assert scores.matches({"finetuned": opened["finetuned"]}) is None


def test_scores_do_not_match_another_fine_tune_of_the_same_shapes(
    opened: dict[str, Model], tmp_path: Path, make_quartet: Callable[..., dict[str, Path]]
) -> None:
    """Headers and sizes are equal; one weight in the first row of one tensor is not."""

    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        if role == "finetuned":
            tensors["model.layers.0.mlp.up_proj.weight"][0, 3] += 1

    other = make_quartet(tmp_path / "other", layers=1, shards=2, edit=edit)
    models = {role: open_model(role, other[role]) for role in opened}
    assert models["finetuned"].headers.identity().keys() == opened["finetuned"].headers.identity().keys()
    reason = scores_of(opened).matches(models)
    assert reason is not None
    assert "other weights than the finetuned that was scored" in reason


def test_scores_do_not_match_other_shapes_or_files(
    opened: dict[str, Model], tmp_path: Path, make_quartet: Callable[..., dict[str, Path]]
) -> None:
    scores = scores_of(opened)
    wide = make_quartet(tmp_path / "wide", layers=1, shards=2, intermediate=208)
    reason = scores.matches({**opened, "base": open_model("base", wide["base"])})
    assert reason is not None
    assert "another size or header than the base" in reason
    one = make_quartet(tmp_path / "one", layers=1, shards=1)
    reason = scores.matches({**opened, "aligned": open_model("aligned", one["aligned"])})
    assert reason is not None
    assert reason.startswith("aligned was scored with")


def test_reading_scores_needs_no_torch() -> None:
    code = (
        "import sys; from safemerge_fast.analysis import scores, rounding; from safemerge_fast import decision; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)]
)
def test_rounding_error_is_what_rounding_makes(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)

    def measured(weights: torch.Tensor) -> float:
        return float((weights.to(dtype).double() - weights).norm() / weights.norm())

    # As derived: magnitudes spread evenly over the logarithm within a binade.
    even = torch.exp2(torch.rand(1000, 1000, generator=generator, dtype=torch.float64) - 4)
    assert relative_rounding(name) == pytest.approx(measured(even), rel=0.01)
    for scale in (0.02, 0.03):
        normal = scale * torch.randn(1000, 1000, generator=generator, dtype=torch.float64)
        assert relative_rounding(name) == pytest.approx(measured(normal), rel=0.15)


@pytest.mark.parametrize("aligned_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.003, 0.03, 0.3])
def test_predicted_error_of_v_is_the_measured_one(ratio: float, aligned_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    base = 0.02 * torch.randn(700, 900, generator=generator, dtype=torch.float64)
    v = ratio * 0.02 * torch.randn(700, 900, generator=generator, dtype=torch.float64)
    stored = (base + v).to(aligned_dtype).double() - base.bfloat16().double()
    measured = float((stored - v).norm() / v.norm())
    aligned_name = {torch.bfloat16: "BF16", torch.float16: "F16"}[aligned_dtype]
    predicted = v_rounding("BF16", aligned_name, float((base + v).norm()), float(v.norm()))
    assert predicted == pytest.approx(measured, rel=0.2)


def test_warns_only_near_the_resolution() -> None:
    def warning(error: float, undefined: str | None = None) -> str | None:
        rho = 0.3 if undefined is None else None
        return rounding_warning("q_proj", Score(rho, rho, 0.026, 1.0, 10.0, error, undefined))

    assert warning(ROUNDING_WARNING * 0.99) is None
    assert warning(0.83, "Δ is zero") is None
    assert warning(math.nan) is None
    said = warning(0.83)
    assert said is not None
    assert said.startswith("q_proj: ‖V‖ is only 0.26% of ‖W‖")
    assert "83%" in said
    assert math.isnan(v_rounding("BF16", "BF16", 1.0, 0.0))
