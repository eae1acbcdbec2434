"""SafeMERGE with methods other than linear, beside mergekit's on the same three models in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import TAU, cosines, load
from test_mergekit import mergekit

from safemerge_fast import SafemergeError, merge, verify

ALPHA = 0.7


def one_for_each(value: float) -> list[float]:
    return [value, value]


CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, list[float]]]] = [
    ("task_arithmetic", {}, {}, {}),
    ("ties", {"density": 0.5}, {}, {"density": one_for_each(0.5)}),
    (
        "ties",
        {"density": 0.3, "parameters": "lambda=0.9,normalize=false"},
        {"lambda": 0.9, "normalize": False},
        {"density": one_for_each(0.3)},
    ),
    (
        "breadcrumbs",
        {"density": 0.6, "parameters": "gamma=0.1"},
        {},
        {"density": one_for_each(0.6), "gamma": one_for_each(0.1)},
    ),
    ("dare_linear", {"density": 1.0, "seed": 3}, {}, {"density": one_for_each(1.0)}),
    ("nuslerp", {}, {}, {}),
    ("multislerp", {}, {}, {}),
]


@pytest.mark.parametrize(
    ("method", "options", "shared", "each"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)]
)
def test_merged_modules_are_the_method_s_and_no_other_tensor_changes(
    quartet: dict[str, Path],
    tmp_path: Path,
    method: str,
    options: dict[str, Any],
    shared: dict[str, Any],
    each: dict[str, list[float]],
) -> None:
    report = merge(**quartet, output=tmp_path / "out", alpha=ALPHA, method=method, **options)
    merged = {tensor.name for tensor in report.tensors if tensor.merged}
    assert merged == {name for name, value in cosines(quartet).items() if value < TAU}
    models = {role: load(path) for role, path in quartet.items()}
    weights = {"weight": [ALPHA, 1.0 - ALPHA]}
    for name, found in load(tmp_path / "out").items():
        if name not in merged:
            assert torch.equal(found, models["finetuned"][name]), name
            continue
        inputs = [models[role][name] for role in ("finetuned", "safe")]
        expected = mergekit(method, inputs, models["aligned"][name], shared, {**weights, **each})
        error = (found.double() - expected.double()).abs()
        limit = expected.double().abs() * torch.finfo(found.dtype).eps + 1e-6
        excused = at_the_border(inputs, models["aligned"][name], options)
        assert bool(((error <= limit) | excused).all()), name
        assert float(excused.double().mean()) < 0.2, "bf16 updates have ties, but not that many"
    assert verify(tmp_path / "out").bytes_checked > 0


def at_the_border(inputs: list[torch.Tensor], aligned: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Elements with as large an update as the smallest (or largest) kept: which of these are kept is not defined."""
    excused = torch.zeros(aligned.shape, dtype=torch.bool)
    density = options.get("density", 1.0)
    if density >= 1.0:
        return excused
    dropped = int(0.1 * aligned.numel()) if "gamma" in options.get("parameters", "") else 0
    kept = int(density * aligned.numel())
    for tensor in inputs:
        sizes = (tensor.float() - aligned.float()).abs()
        largest = sizes.flatten().sort(descending=True).values
        for place in (dropped, dropped + kept):
            # The last on one side of the border and the first on the other are equal where there is a tie.
            if 0 < place < largest.numel() and largest[place - 1] == largest[place]:
                excused |= sizes == largest[place]
    return excused


def test_slerp_goes_from_the_safe_model_to_the_finetuned_one(
    quartet: dict[str, Path], tmp_path: Path
) -> None:
    report = merge(**quartet, output=tmp_path / "out", alpha=0.25, method="slerp")
    models = {role: load(path) for role, path in quartet.items()}
    merged = [tensor for tensor in report.tensors if tensor.merged]
    assert merged
    found = load(tmp_path / "out")
    for tensor in merged:
        safe, finetuned = (models[role][tensor.name].double() for role in ("safe", "finetuned"))
        angle = torch.acos((safe * finetuned).sum() / (safe.norm() * finetuned.norm()))
        if torch.cos(angle) > 0.9995:
            expected = 0.75 * safe + 0.25 * finetuned
        else:
            expected = (torch.sin(0.75 * angle) * safe + torch.sin(0.25 * angle) * finetuned) / torch.sin(
                angle
            )
        result = found[tensor.name]
        limit = expected.abs() * torch.finfo(result.dtype).eps + 1e-6
        assert bool(((result.double() - expected).abs() <= limit).all()), tensor.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties", "safe": None}, "without a safe model"),
        ({"method": "linear", "density": 0.5}, "linear has no parameter 'density'"),
        ({"method": "slerp", "density": 0.5}, "slerp has no parameter 'density'"),
        ({"method": "ties", "parameters": "lamda=1"}, "'lamda'"),
        ({"method": "ties", "parameters": "lambda=high"}, "lambda"),
        ({"method": "ties", "parameters": "lambda"}, "should read like"),
        ({"method": "ties", "parameters": "weight=0.5"}, "follows from alpha"),
        ({"method": "slerp", "parameters": "t=0.5"}, "follows from alpha"),
        ({"method": "ties", "parameters": "density=[0.1, 0.2]"}, "density"),
        ({"method": "della", "density": 0.05}, "epsilon"),
        ({"method": "ties", "output_format": "adapter"}, "an adapter holds sums"),
        ({"method": "ties", "read_backend": "telepathy"}, "read_backend should be"),
    ],
)
def test_refusals(quartet: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SafemergeError, match=message):
        merge(**{**quartet, **options}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing was measured or written before the refusal"


def test_positioned_reads_give_the_same_weights(quartet: dict[str, Path], tmp_path: Path) -> None:
    for backend in ("mmap", "pread"):
        merge(**quartet, output=tmp_path / backend, method="dare_ties", density=0.5, read_backend=backend)
    mapped, read = load(tmp_path / "mmap"), load(tmp_path / "pread")
    assert mapped.keys() == read.keys()
    assert all(torch.equal(mapped[name], read[name]) for name in mapped)
