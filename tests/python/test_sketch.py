"""Modules measured from random columns: moments, intervals and decisions against dense float64."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace as with_fields
from sketches import moments_of
from test_low_rank import WEIGHT, gauss, model, row

from safemerge_fast import _engine
from safemerge_fast.analysis import analyze_rows
from safemerge_fast.analysis.opened import OpenedModule
from safemerge_fast.analysis.precision import Precision
from safemerge_fast.analysis.schedule import LOOKS
from safemerge_fast.analysis.score import Score
from safemerge_fast.checkpoint.model import Model
from safemerge_fast.decision import Rule
from safemerge_fast.pairing.module import whole
from safemerge_fast.pairing.operand import LowRank, Operand, Term
from safemerge_fast.pairing.row import Row
from safemerge_fast.pairing.view import View

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
PLAIN = (Term(Operand("finetuned", WEIGHT)),)


def power_law(shape: tuple[int, int], decay: float, seed: int) -> torch.Tensor:
    """A matrix whose singular values fall as i^-decay; its norm is that of numbers of size 1."""
    rank = min(shape)
    u, v = (torch.linalg.qr(gauss(side, rank, seed=seed + n))[0] for n, side in enumerate(shape))
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    matrix = (u * values) @ v.T
    return matrix * math.sqrt(shape[0] * shape[1]) / matrix.norm()


def triple(shape: tuple[int, int], v: torch.Tensor, delta: torch.Tensor) -> Triple:
    base = 0.02 * gauss(*shape, seed=99)
    return base, base + 0.002 * v, base + 0.002 * v + 0.001 * delta


def models_of(
    path: Path, matrices: Triple, dtype: torch.dtype, *, transposed: bool = False
) -> dict[str, Model]:
    named = zip(("base", "aligned", "finetuned"), matrices, strict=True)
    return {
        role: model(path, role, {WEIGHT: (matrix.T if transposed else matrix).to(dtype).contiguous()})
        for role, matrix in named
    }


def as_read(models: Mapping[str, Model], *, transposed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """V and Δ of what the files hold, in float64."""
    read = {}
    for role, opened in models.items():
        info = opened.headers.tensor(WEIGHT)
        kind = {"BF16": torch.bfloat16, "F32": torch.float32}[info.dtype]
        data = np.array(opened.headers.rows(WEIGHT, 0, info.shape[0]))
        matrix = torch.from_numpy(data.reshape(-1)).view(kind).view(*info.shape).double().numpy()
        read[role] = matrix.T if transposed else matrix
    return read["aligned"] - read["base"], read["finetuned"] - read["aligned"]


def rho_of(v: np.ndarray, delta: np.ndarray) -> float:
    moved = v @ (v.T @ delta)
    return float(np.vdot(moved, delta) / (np.linalg.norm(moved) * np.linalg.norm(delta)))


def same_gram(found: np.ndarray, expected: np.ndarray) -> None:
    lengths = np.sqrt(np.diag(expected))
    assert np.abs((found - expected) / np.outer(lengths, lengths)).max() < 5e-6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["bf16", "f32", "adapter", "view"])
def test_moments_of_all_that_a_module_can_be_made_of(tmp_path: Path, form: str, transposed: bool) -> None:
    shape = (70, 230)
    dtype = torch.float32 if form == "f32" else torch.bfloat16
    whole_shape = (150, 230) if form == "view" and not transposed else (70, 460) if form == "view" else shape
    matrices = triple(whole_shape, gauss(*whole_shape, seed=1), gauss(*whole_shape, seed=2))
    models = models_of(tmp_path, matrices, dtype, transposed=transposed)
    v, delta = as_read(models, transposed=transposed)
    one = row(shape, PLAIN, transposed=transposed)
    if form == "adapter":
        a, b = 0.01 * gauss(4, shape[1], seed=5), 0.01 * gauss(shape[0], 4, seed=6)
        models["lora"] = model(tmp_path, "lora", {"a": a.float(), "b": b.float()})
        operand = Operand("finetuned", WEIGHT, low_rank=(LowRank("lora", "a", "b", 1.5, 4, transposed),))
        one = row(shape, (Term(operand),), transposed=transposed)
        delta = delta + 1.5 * (b.float().double() @ a.float().double()).numpy()
    module = whole(one)
    opened = OpenedModule.of(models, module, "aligned")
    if form == "view":
        # The last rows of what is stored: one expert of several.
        rows, columns = module.stored
        start = (whole_shape[1] if transposed else whole_shape[0]) - rows
        view = View(start * columns, (rows, columns), (columns, 1))
        roles = {
            role: _engine.Matrix(
                WEIGHT,
                sources={role: models[role].headers},
                terms=[{"operand": Operand(role, WEIGHT, view=view).to_plan(), "weight": 1.0}],
            )
            for role in opened.roles
        }
        opened = replace(opened, roles=roles)
        v, delta = (part[:, -rows:] if transposed else part[-rows:] for part in (v, delta))
    columns = _engine.Columns(11)
    found = columns.measure(
        opened.roles["base"], opened.roles["aligned"], opened.roles["finetuned"], look=2, columns=6, tests=4,
        transposed=transposed,
    )  # fmt: skip
    drawn = np.frombuffer(columns.draw(shape[1], 2, 10), "<f4").reshape(shape[1], 10).astype(np.float64)
    expected = moments_of(v, delta, drawn[:, :6], drawn[:, 6:])
    grams = np.frombuffer(found.grams).reshape(3, 10, 10)
    gram = np.block([[grams[0], grams[1]], [grams[1], grams[2]]])
    same_gram(grams[0], expected.gram[0, :10, :10])
    same_gram(grams[2], expected.gram[0, 10:, 10:])
    lengths = np.sqrt(np.diag(expected.gram[0]))
    assert np.abs((gram - expected.gram[0]) / np.outer(lengths, lengths)).max() < 5e-6
    same_gram(np.frombuffer(found.image).reshape(4, 4), expected.image[0])
    cross = np.frombuffer(found.cross).reshape(4, 6)
    assert np.abs((cross - expected.gram[0, 16:, :6]) / np.outer(lengths[16:], lengths[:6])).max() < 5e-6
    assert found.v_squares == pytest.approx(expected.v_squares[0], rel=1e-6)
    assert found.delta_squares == pytest.approx(expected.delta_squares[0], rel=1e-6)
    assert found.inner == pytest.approx(
        expected.inner[0], abs=1e-6 * math.sqrt(found.v_squares * found.delta_squares)
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("reference", ["aligned", "base"])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_accelerator_gives_the_same_moments(
    tmp_path: Path, device: str, reference: str, transposed: bool
) -> None:
    from safemerge_fast.analysis.sketch_torch import measure

    shape = (130, 270)
    models = models_of(
        tmp_path,
        triple(shape, gauss(*shape, seed=1), gauss(*shape, seed=2)),
        torch.bfloat16,
        transposed=transposed,
    )
    module = whole(row(shape, PLAIN, transposed=transposed))
    opened = OpenedModule.of(models, module, reference)
    columns = _engine.Columns(3)
    expected = columns.measure(
        *(opened.roles[role] for role in ("base", "aligned", "finetuned")),
        look=1, columns=32, tests=16, against_base=reference == "base", transposed=transposed,
    )  # fmt: skip
    found = measure(
        models, module, columns, look=1, columns=32, tests=16, delta_reference=reference, device=device
    )
    for part, rows in (("grams", 48), ("cross", 16), ("image", 16)):
        shape_of = (3, rows, rows) if part == "grams" else (1, rows, -1)
        left, right = (np.frombuffer(getattr(one, part)).reshape(shape_of) for one in (found, expected))
        for one, other in zip(left, right, strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    for sums in ("v_squares", "delta_squares", "weight_squares"):
        assert getattr(found, sums) == pytest.approx(getattr(expected, sums), rel=1e-6)
    size = math.sqrt(found.v_squares * found.delta_squares)
    assert found.inner == pytest.approx(expected.inner, abs=1e-6 * size)


def test_scores_from_an_accelerator(spectra: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with torch's CPU in the place of one."""
    monkeypatch.setattr(
        "safemerge_fast.analysis.device_name", lambda spec: "meta-free" if spec == "mps" else "cpu"
    )
    real = torch.device
    monkeypatch.setattr("safemerge_fast.analysis.sketch_torch.torch.device", lambda name: real("cpu"))
    models, rows, truth = spectra
    for name, score in analyze_rows(models, rows, device="mps"):
        assert score.columns == LOOKS[0][0]
        assert (score.rho_low or 1) <= truth[name] <= (score.rho_high or 0)


@CUDA
def test_scores_from_cuda(spectra: Any) -> None:
    models, rows, truth = spectra
    for name, score in analyze_rows(models, rows, device="cuda"):
        assert (score.rho_low or 1) <= truth[name] <= (score.rho_high or 0)


SHAPE = (240, 300)
SPECTRA = {
    "flat": (gauss(*SHAPE, seed=1), gauss(*SHAPE, seed=2)),
    "power law": (power_law(SHAPE, 0.8, 3), power_law(SHAPE, 0.6, 5) + gauss(*SHAPE, seed=7)),
    "steep": (power_law(SHAPE, 1.5, 8), gauss(*SHAPE, seed=9)),
    "low rank": (gauss(SHAPE[0], 4, seed=10) @ gauss(4, SHAPE[1], seed=11), gauss(*SHAPE, seed=12)),
    "within": (power_law(SHAPE, 1.0, 13), power_law(SHAPE, 1.0, 13) + 0.1 * gauss(*SHAPE, seed=15)),
}


@pytest.fixture(scope="module")
def spectra(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Model], list[Row], dict[str, float]]:
    """One model of several modules, and what their ρ are."""
    path = tmp_path_factory.mktemp("spectra")
    parts: dict[str, dict[str, torch.Tensor]] = {"base": {}, "aligned": {}, "finetuned": {}}
    for name, (v, delta) in SPECTRA.items():
        for role, matrix in zip(parts, triple(SHAPE, v, delta), strict=True):
            parts[role][name] = matrix.float()
    models = {role: model(path, role, tensors) for role, tensors in parts.items()}
    rows, truth = [], {}
    for name in SPECTRA:
        base, aligned, finetuned = (parts[role][name].double().numpy() for role in parts)
        truth[name] = rho_of(aligned - base, finetuned - aligned)
        terms = (Term(Operand("finetuned", name)),)
        rows.append(with_fields(row(SHAPE, terms), name=name, names={"base": name, "aligned": name}))
    return models, rows, truth


def measured(spectra: Any, question: Rule | None, **precision: Any) -> dict[str, Score]:
    models, rows, _ = spectra
    return dict(analyze_rows(models, rows, device="cpu", precision=Precision(**precision), question=question))


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_one_look_gives_intervals_that_hold_rho(spectra: Any, seed: int) -> None:
    for name, score in measured(spectra, None, seed=seed).items():
        assert score.columns == LOOKS[0][0]
        assert score.rho_low is not None
        assert score.rho_high is not None
        assert score.rho_low <= spectra[2][name] <= score.rho_high
        assert score.rho_high < 1.6 * score.rho_low, "the interval says something"
        assert score.undefined is None
        assert score.rho_null is not None
        assert score.null_sd is not None


def test_seeds_differ_and_repeat(spectra: Any) -> None:
    first, again, other = (measured(spectra, None, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert all(first[name].rho != other[name].rho for name in first)


@pytest.mark.parametrize("factor", [0.5, 0.9, 0.99, 1.0 - 1e-6, 1.0 + 1e-6, 1.01, 1.1, 2.0])
def test_a_threshold_near_rho_is_decided_as_by_rho_itself(spectra: Any, factor: float) -> None:
    for name, rho in spectra[2].items():
        threshold = min(factor * rho, 1.0)
        score = measured(spectra, Rule(threshold=threshold))[name]
        assert score.rho_low is not None
        assert score.rho_high is not None
        assert (score.rho_high < threshold) == (rho < threshold)
        assert (score.rho_low >= threshold) == (rho >= threshold)
        if abs(factor - 1.0) < 1e-5:
            assert score.columns == 0, "only the exact one tells"
            assert score.rho == pytest.approx(rho, abs=1e-7)


@pytest.mark.parametrize("count", range(6))
def test_ranks_are_those_of_rho_itself(spectra: Any, count: int) -> None:
    rule = Rule(select=f"lowest:{count}")
    scores = measured(spectra, rule)
    modules = [whole(one) for one in spectra[1]]
    assert not rule.open_modules(modules, scores)
    chosen = sorted(scores, key=lambda name: scores[name].rho or 0.0)[:count]
    assert set(chosen) == set(sorted(spectra[2], key=lambda name: spectra[2][name])[:count])


def test_the_sketch_alone_leaves_open_what_it_cannot_tell(spectra: Any) -> None:
    threshold = spectra[2]["flat"]
    alone = measured(spectra, Rule(threshold=threshold), estimator="sketch")["flat"]
    assert alone.columns > 0
    assert (alone.rho_low or 0) < threshold <= (alone.rho_high or 1)
    exact = measured(spectra, Rule(threshold=threshold), estimator="exact")["flat"]
    assert (exact.columns, exact.rho) == (0, pytest.approx(threshold, abs=1e-7))


def test_a_resolution_ends_the_looks(spectra: Any) -> None:
    rule = Rule(threshold=spectra[2]["flat"])
    score = measured(spectra, rule, resolution=0.2)["flat"]
    assert score.columns == LOOKS[0][0]
    assert measured(spectra, rule, resolution=1e-6)["flat"].columns == 0


def test_what_is_known_is_not_measured_again(spectra: Any) -> None:
    models, rows, truth = spectra
    known = measured(spectra, None)
    wide = Rule(threshold=0.001)
    assert list(analyze_rows(models, rows, known=known, device="cpu", question=wide)) == []
    near = Rule(threshold=truth["flat"])
    again = list(analyze_rows(models, rows, known=known, device="cpu", question=near))
    assert {name for name, _ in again} == {
        name
        for name, score in known.items()
        if (score.rho_low or 0) < near.threshold <= (score.rho_high or 1)
    }
    assert LOOKS[0][0] not in {score.columns for _, score in again}
    part = {name: score for name, score in known.items() if name != "steep"}
    ranked = dict(analyze_rows(models, rows, known=part, device="cpu", question=Rule(select="lowest:2")))
    assert "steep" in ranked


def test_smaller_failures_give_wider_intervals(spectra: Any) -> None:
    usual, careful = (measured(spectra, None, failure=failure) for failure in (1e-2, 1e-9))
    for name in usual:
        assert (careful[name].rho_high or 0) > (usual[name].rho_high or 1)
        assert careful[name].rho == pytest.approx(usual[name].rho, rel=1e-12)


SMALL = [(60, 145), (145, 60), (1, 70), (70, 1), (1, 1), (213, 900)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SMALL)
def test_small_modules_are_exact(tmp_path: Path, shape: tuple[int, int], transposed: bool) -> None:
    matrices = triple(shape, gauss(*shape, seed=1), gauss(*shape, seed=2) + gauss(*shape, seed=1))
    models = models_of(tmp_path, matrices, torch.float32, transposed=transposed)
    v, delta = as_read(models, transposed=transposed)
    ((_, score),) = analyze_rows(models, [row(shape, PLAIN, transposed=transposed)], device="cpu")
    k = v @ v.T
    assert score.columns == 0
    assert not score.rho_null_estimated
    assert score.rho == pytest.approx(rho_of(v, delta), abs=1e-7)
    assert score.rho_null == pytest.approx(np.trace(k) / (math.sqrt(shape[0]) * np.linalg.norm(k)), rel=1e-7)
    assert score.v_norm == pytest.approx(np.linalg.norm(v), rel=1e-7)
    assert score.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-7)
    size = np.linalg.norm(v) * np.linalg.norm(delta)
    assert score.cos_v_delta == pytest.approx(np.vdot(v, delta) / size, abs=1e-7)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_spread_of_chance_is_that_of_rotations(tmp_path: Path, shape: tuple[int, int]) -> None:
    matrices = triple(shape, power_law(shape, 0.5, 1), power_law(shape, 0.3, 3))
    models = models_of(tmp_path, matrices, torch.float32)
    v, delta = as_read(models)
    ((_, score),) = analyze_rows(models, [row(shape, PLAIN)], device="cpu")
    rng = np.random.default_rng(0)
    logs = []
    for _ in range(3000):
        q, r = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))
        logs.append(math.log(rho_of(v, (q * np.sign(np.diag(r))) @ delta)))
    assert score.null_sd == pytest.approx(np.std(logs), rel=0.15)
    assert np.mean(logs) == pytest.approx(math.log(score.rho_null or 0), abs=0.5 * np.std(logs))


@pytest.mark.parametrize("shape", [(20, 30), (230, 250)])
@pytest.mark.parametrize("case", ["v", "delta", "nan", "inf", "tiny"])
def test_what_has_no_rho_says_why(tmp_path: Path, shape: tuple[int, int], case: str) -> None:
    base, aligned, finetuned = triple(shape, gauss(*shape, seed=1), gauss(*shape, seed=2))
    if case == "v":
        aligned = base.clone()
    elif case == "delta":
        finetuned = aligned.clone()
    elif case == "nan":
        finetuned[3, 4] = math.nan
    elif case == "inf":
        base[0, 0] = math.inf
    else:
        # Numbers whose squares vanish in float32.
        base, aligned, finetuned = (1e-25 * matrix for matrix in (base, aligned, finetuned))
    models = models_of(tmp_path, (base, aligned, finetuned), torch.float32)
    ((_, score),) = analyze_rows(models, [row(shape, PLAIN)], device="cpu")
    expected = {
        "v": "V is zero",
        "delta": "Δ is zero",
        "nan": f"non-finite values in finetuned tensor {WEIGHT}",
        "inf": f"non-finite values in base tensor {WEIGHT}",
    }
    if case == "tiny":
        assert score.undefined is None or "zero" not in score.undefined
    else:
        assert (score.rho, score.undefined) == (None, expected[case])
        assert score.nonfinite == (case in ("nan", "inf"))


def test_an_update_outside_the_subspace_is_measured_exactly(tmp_path: Path) -> None:
    """V VᵀΔ is nothing but rounding: no column says how large ρ is."""
    shape = (230, 260)
    v = gauss(shape[0], 30, seed=1) @ gauss(30, shape[1], seed=2)
    q = torch.linalg.qr(v[:, :30])[0]
    delta = gauss(*shape, seed=3)
    models = models_of(tmp_path, triple(shape, v, delta - q @ (q.T @ delta)), torch.float32)
    ((_, score),) = tuple(analyze_rows(models, [row(shape, PLAIN)], device="cpu"))[-1:]
    truth = rho_of(*as_read(models))
    assert (score.rho_low or 0) - 1e-4 <= truth <= (score.rho_high or 0) + 1e-4


def test_intervals_cover_over_many_seeds(tmp_path: Path) -> None:
    """At 5 % of failure for each module, two sides and half of it at the first look; 400 seeds."""
    models = models_of(tmp_path, triple(SHAPE, *SPECTRA["power law"]), torch.float32)
    truth = rho_of(*as_read(models))
    one = [row(SHAPE, PLAIN)]
    misses = 0
    for seed in range(400):
        ((_, score),) = analyze_rows(models, one, device="cpu", precision=Precision(failure=0.05, seed=seed))
        misses += not (score.rho_low or 0) <= truth <= (score.rho_high or 1)
    assert misses <= 20


def test_torch_is_not_loaded(tmp_path: Path, quartet: dict[str, Path]) -> None:
    code = (
        "import sys, safemerge_fast\n"
        f"safemerge_fast.merge(base={str(quartet['base'])!r}, aligned={str(quartet['aligned'])!r}, "
        f"finetuned={str(quartet['finetuned'])!r}, output={str(tmp_path / 'out')!r}, device='cpu')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_scores_say_how_they_were_measured(spectra: Any, quartet: dict[str, Path]) -> None:
    from safemerge_fast import analyze

    scores = analyze(
        base=str(quartet["base"]), aligned=str(quartet["aligned"]), finetuned=str(quartet["finetuned"])
    )
    document = json.loads(scores.to_json())
    assert document["version"] == 2
    assert document["estimator"] == "auto"
