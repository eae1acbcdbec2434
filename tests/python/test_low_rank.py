"""ρ of adapters: thin and composed forms against the dense formula in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_safetensors
from msgspec.structs import replace as with_fields
from torch import Tensor

from safemerge_fast._engine import Checkpoint
from safemerge_fast.analysis import analyze_rows
from safemerge_fast.analysis.low_rank import score_low_rank
from safemerge_fast.analysis.score import Score
from safemerge_fast.analysis.scores import Scores
from safemerge_fast.checkpoint.model import Model
from safemerge_fast.pairing.module import whole
from safemerge_fast.pairing.operand import LowRank, Magnitude, Operand, Rows, Term
from safemerge_fast.pairing.rows import Row

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
SHAPES = [(96, 250), (250, 96), (130, 130), (1, 40), (40, 1)]


def gauss(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(path: Path, role: str, tensors: Mapping[str, Tensor], *, padded: bool = True) -> Model:
    directory = path / role
    directory.mkdir(parents=True)
    write_safetensors(directory / "model.safetensors", tensors, padded=padded)
    return Model(role, str(directory), directory, Checkpoint(directory), {})


def row(shape: tuple[int, int], finetuned: tuple[Term, ...], *, transposed: bool = False) -> Row:
    """The row of a weight (d_out, d_in) as it is stored."""
    return Row(
        name=WEIGHT,
        file="model.safetensors",
        dtype="F32",
        shape=shape[::-1] if transposed else shape,
        names={"base": WEIGHT, "aligned": WEIGHT},
        module_type="q_proj",
        layer="model.layers.0",
        analysed=True,
        transposed=transposed,
        reason="projection",
        adapted={"finetuned": finetuned},
    )


class Setting:
    """Base, aligned and an adapter of rank r for one weight; what they hold as float64, in (d_out, d_in)."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        ranks: tuple[int, ...] = (4,),
        *,
        weights: torch.dtype = torch.float32,
        factors: torch.dtype = torch.float32,
        transposed: bool = False,
        padded: bool = True,
        seed: int = 0,
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.shape, self.transposed = shape, transposed
        d_out, d_in = shape
        task = gauss(d_out, 3, seed=seed + 1) @ gauss(3, d_in, seed=seed + 2) + 0.3 * gauss(
            d_out, d_in, seed=seed + 3
        )
        base = (0.02 * gauss(*shape, seed=seed)).to(weights)
        aligned = (base.double() + 0.005 * task).to(weights)
        self.base, self.aligned = base.double(), aligned.double()
        self.products, tensors = [], dict(more or {})
        self.delta = torch.zeros(shape, dtype=torch.float64)
        for number, rank in enumerate(ranks):
            a = (0.1 * gauss(rank, d_in, seed=seed + 10 + number)).to(factors)
            b = (0.03 * gauss(d_out, rank, seed=seed + 20 + number)).to(factors)
            scale = 2.0 - 1.5 * number
            tensors |= {f"a{number}": a, f"b{number}": b}
            self.products.append(LowRank("finetuned", f"a{number}", f"b{number}", scale, rank, transposed))
            self.delta += scale * b.double() @ a.double()
        stored = {WEIGHT: aligned.T.contiguous() if transposed else aligned}
        self.models = {
            "base": model(path, "base", {WEIGHT: base.T.contiguous() if transposed else base}, padded=padded),
            "aligned": model(path, "aligned", stored, padded=padded),
            "finetuned": model(path, "finetuned", tensors, padded=padded),
        }

    def row(self, operand: Operand | None = None) -> Row:
        operand = operand or Operand("aligned", WEIGHT, low_rank=tuple(self.products))
        return row(self.shape, (Term(operand),), transposed=self.transposed)

    def score(self, operand: Operand | None = None, **options: str) -> Score:
        ((name, score),) = analyze_rows(self.models, [self.row(operand)], device="cpu", **options)
        assert name == WEIGHT
        return score


def assert_dense(score: Score, base: Tensor, aligned: Tensor, delta: Tensor, *, rho: float = 1e-6) -> None:
    """Compares a score with the dense formulas; all in float64, as (d_out, d_in)."""
    v = aligned - base
    moved = v @ v.T @ delta
    dense = float((moved * delta).sum() / (moved.norm() * delta.norm()))
    assert score.undefined is None
    assert score.rho == pytest.approx(dense, abs=rho)
    assert score.v_norm == pytest.approx(float(v.norm()), rel=1e-6)
    assert score.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert score.weight_norm == pytest.approx(float(aligned.norm()), rel=1e-6)
    assert score.cos_v_delta == pytest.approx(float((v * delta).sum() / (v.norm() * delta.norm())), abs=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_thin_form_is_the_dense_formula(tmp_path: Path, shape: tuple[int, int], transposed: bool) -> None:
    setting = Setting(tmp_path, shape, transposed=transposed)
    score = setting.score()
    assert_dense(score, setting.base, setting.aligned, setting.delta)
    assert score.rho_null_estimated


@pytest.mark.parametrize("ranks", [(1,), (4,), (64,), (300,), (3, 5), (2, 2, 2)])
def test_ranks_and_sums_of_products(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    setting = Setting(tmp_path, (96, 130), ranks)
    assert_dense(setting.score(), setting.base, setting.aligned, setting.delta)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("padded", [True, False])
def test_dtypes(tmp_path: Path, weights: torch.dtype, factors: torch.dtype, padded: bool) -> None:
    setting = Setting(tmp_path, (96, 130), weights=weights, factors=factors, padded=padded)
    assert_dense(setting.score(), setting.base, setting.aligned, setting.delta)


@pytest.mark.parametrize("transposed", [False, True])
def test_many_blocks(tmp_path: Path, transposed: bool) -> None:
    setting = Setting(tmp_path, (640, 520), (16,), transposed=transposed, weights=torch.bfloat16)
    score = score_low_rank(setting.models, whole(setting.row()), setting.products)
    assert_dense(score, setting.base, setting.aligned, setting.delta)


def test_a_product_for_the_other_orientation(tmp_path: Path) -> None:
    # An embedding is stored as (rows, features), and its product is for the transposed of that.
    setting = Setting(tmp_path, (250, 96))
    a, b = 0.1 * gauss(4, 250, seed=30).float(), 0.1 * gauss(96, 4, seed=31).float()
    models = {**setting.models, "finetuned": model(tmp_path / "turned", "finetuned", {"a": a, "b": b})}
    product = LowRank("finetuned", "a", "b", 0.5, 4, True)
    turned = row(setting.shape, (Term(Operand("aligned", WEIGHT, low_rank=(product,))),))
    ((_, score),) = analyze_rows(models, [turned], device="cpu")
    assert_dense(score, setting.base, setting.aligned, 0.5 * (b.double() @ a.double()).T)


@pytest.mark.parametrize("scale", [1e-12, 1e-18])
def test_small_weights_do_not_underflow(tmp_path: Path, scale: float) -> None:
    base, aligned = scale * gauss(60, 80, seed=1), scale * gauss(60, 80, seed=2)
    a, b = 1e-3 * gauss(4, 80, seed=3), 1e-15 * gauss(60, 4, seed=4)
    models = {
        "base": model(tmp_path, "base", {WEIGHT: base.float()}),
        "aligned": model(tmp_path, "aligned", {WEIGHT: aligned.float()}),
        "finetuned": model(tmp_path, "finetuned", {"a": a.float(), "b": b.float()}),
    }
    product = LowRank("finetuned", "a", "b", 2.0, 4, False)
    ((_, score),) = analyze_rows(
        models, [row((60, 80), (Term(Operand("aligned", WEIGHT, low_rank=(product,))),))], device="cpu"
    )
    v = aligned.float().double() - base.float().double()
    delta = 2.0 * b.float().double() @ a.float().double()
    moved = v @ v.T @ delta
    assert score.rho == pytest.approx(float((moved * delta).sum() / (moved.norm() * delta.norm())), abs=1e-6)
    assert score.cos_v_delta == pytest.approx(float((v * delta).sum() / (v.norm() * delta.norm())), abs=1e-6)


@pytest.mark.parametrize("wanted", [-1.0, 1.0, 0.0])
def test_the_cosine_of_updates_along_v(tmp_path: Path, wanted: float) -> None:
    """V of rank 3 itself, its opposite, and what is orthogonal to it, as the product of an adapter."""
    left, right = 0.1 * gauss(60, 3, seed=1), 0.1 * gauss(3, 80, seed=2)
    a = right
    if wanted == 0.0:
        a = gauss(3, 80, seed=3)
        a = a - a @ torch.linalg.pinv(right) @ right
    base = torch.zeros(60, 80)
    models = {
        "base": model(tmp_path, "base", {WEIGHT: base}),
        "aligned": model(tmp_path, "aligned", {WEIGHT: (left @ right).float()}),
        "finetuned": model(tmp_path, "finetuned", {"a": a.float(), "b": left.float()}),
    }
    product = LowRank("finetuned", "a", "b", wanted or 1.0, 3, False)
    ((_, score),) = analyze_rows(
        models, [row((60, 80), (Term(Operand("aligned", WEIGHT, low_rank=(product,))),))], device="cpu"
    )
    assert score.cos_v_delta == pytest.approx(wanted, abs=1e-6)


def test_products_of_very_different_sizes(tmp_path: Path) -> None:
    setting = Setting(tmp_path, (60, 80), (4, 4))
    # A of the first is tiny and its B large: their product weighs as much as the second's.
    a, b = gauss(4, 80, seed=1), gauss(60, 4, seed=2)
    tensors = {
        "a0": (1e-7 * a).float(),
        "b0": (1e6 * b).float(),
        "a1": a.float(),
        "b1": (0.1 * b.flip(0)).float(),
    }
    models = {**setting.models, "finetuned": model(tmp_path / "other", "finetuned", tensors)}
    products = tuple(LowRank("finetuned", f"a{i}", f"b{i}", 1.0, 4, False) for i in range(2))
    ((_, score),) = analyze_rows(
        models, [row((60, 80), (Term(Operand("aligned", WEIGHT, low_rank=products)),))], device="cpu"
    )
    delta = sum(tensors[f"b{i}"].double() @ tensors[f"a{i}"].double() for i in range(2))
    assert_dense(score, setting.base, setting.aligned, delta)


@pytest.mark.parametrize(("decay", "tolerance"), [(None, 0.03), (1.0, 0.03), (0.5, 0.12), ("low rank", 1e-3)])
@pytest.mark.parametrize("shape", [(200, 500), (500, 200)])
def test_the_estimate_of_rho_null(
    tmp_path: Path, shape: tuple[int, int], decay: float | str | None, tolerance: float
) -> None:
    setting = Setting(tmp_path, shape)
    size = min(shape)
    if decay is None:
        v = gauss(*shape, seed=5)
    elif decay == "low rank":
        v = gauss(shape[0], 6, seed=5) @ gauss(6, shape[1], seed=6)
    else:
        left, right = (torch.linalg.qr(gauss(side, size, seed=side))[0] for side in shape)
        v = (left * torch.arange(1, size + 1, dtype=torch.float64) ** -decay) @ right.T
    aligned = (setting.base + 0.01 * v).float()
    models = {**setting.models, "aligned": model(tmp_path / "other", "aligned", {WEIGHT: aligned})}
    ((_, score),) = analyze_rows(models, [setting.row()], device="cpu")
    v = aligned.double() - setting.base
    exact = float((v**2).sum()) / (math.sqrt(shape[0]) * float((v @ v.T).norm()))
    assert score.rho_null == pytest.approx(exact, rel=tolerance)
    ((_, again),) = analyze_rows(models, [setting.row()], device="cpu")
    assert again == score


def test_undefined(tmp_path: Path) -> None:
    setting = Setting(tmp_path, (60, 80))
    v_norm = float((setting.aligned - setting.base).norm())
    zero = model(tmp_path / "zero", "finetuned", {"a0": torch.randn(4, 80), "b0": torch.zeros(60, 4)})
    ((_, score),) = analyze_rows({**setting.models, "finetuned": zero}, [setting.row()], device="cpu")
    assert (score.rho, score.undefined, score.delta_norm) == (None, "Δ is zero", 0.0)
    assert score.v_norm == pytest.approx(v_norm, rel=1e-6)

    ((_, score),) = analyze_rows(
        {**setting.models, "base": replace(setting.models["aligned"], role="base")},
        [setting.row()],
        device="cpu",
    )
    assert (score.rho, score.undefined, score.v_norm) == (None, "V is zero", 0.0)

    broken = torch.randn(60, 4)
    broken[3, 1] = math.nan
    nan = model(tmp_path / "nan", "finetuned", {"a0": torch.randn(4, 80), "b0": broken})
    ((_, score),) = analyze_rows({**setting.models, "finetuned": nan}, [setting.row()], device="cpu")
    assert score.undefined == "non-finite values in finetuned tensor b0"

    weight = setting.base.float()
    weight[5, 6] = math.inf
    infinite = model(tmp_path / "infinite", "base", {WEIGHT: weight})
    ((_, score),) = analyze_rows({**setting.models, "base": infinite}, [setting.row()], device="cpu")
    assert score.undefined == f"non-finite values in base tensor {WEIGHT}"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_reference_base_is_composed(tmp_path: Path, shape: tuple[int, int], transposed: bool) -> None:
    setting = Setting(tmp_path, shape, transposed=transposed)
    score = setting.score(delta_reference="base")
    finetuned = setting.aligned + setting.delta
    assert_dense(score, setting.base, setting.aligned, finetuned - setting.base)
    assert not score.rho_null_estimated
    v = setting.aligned - setting.base
    null = float((v**2).sum()) / (math.sqrt(shape[0]) * float((v @ v.T).norm()))
    assert score.rho_null == pytest.approx(null, rel=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_dora_is_composed(tmp_path: Path, shape: tuple[int, int], transposed: bool) -> None:
    magnitude = (1.0 + 0.1 * gauss(shape[0], seed=40)).abs().float()
    setting = Setting(tmp_path, shape, transposed=transposed, more={"m": magnitude})
    operand = Operand(
        "aligned",
        WEIGHT,
        low_rank=tuple(setting.products),
        magnitude=Magnitude("finetuned", "m", transposed),
    )
    total = setting.aligned + setting.delta
    finetuned = magnitude.double()[:, None] * total / total.norm(dim=1, keepdim=True)
    assert_dense(setting.score(operand), setting.base, setting.aligned, finetuned - setting.aligned)


def test_replaced_rows_are_composed(tmp_path: Path) -> None:
    indices = (70, 3, 41)
    rows = 0.05 * gauss(3, 80, seed=50).float()
    setting = Setting(tmp_path, (96, 80), more={"rows": rows})
    finetuned = setting.aligned.clone()
    finetuned[list(indices)] = rows.double()
    operand = Operand("aligned", WEIGHT, rows=Rows("finetuned", "rows", indices))
    assert_dense(setting.score(operand), setting.base, setting.aligned, finetuned - setting.aligned)


def test_a_replaced_tensor_and_a_sum_of_terms(tmp_path: Path) -> None:
    other = 0.02 * gauss(96, 80, seed=60).float()
    setting = Setting(tmp_path, (96, 80), more={"other": other})
    assert_dense(
        setting.score(Operand("finetuned", "other")),
        setting.base,
        setting.aligned,
        other.double() - setting.aligned,
    )
    terms = (
        Term(Operand("aligned", WEIGHT), 0.25),
        Term(Operand("finetuned", "other", low_rank=(setting.products[0],)), 2.0),
    )
    ((_, score),) = analyze_rows(setting.models, [row(setting.shape, terms)], device="cpu")
    finetuned = 0.25 * setting.aligned + 2.0 * (other.double() + setting.delta)
    assert_dense(score, setting.base, setting.aligned, finetuned - setting.aligned)


def test_both_forms_in_one_analysis(tmp_path: Path) -> None:
    setting = Setting(tmp_path, (96, 80), more={"other": 0.02 * gauss(96, 80, seed=60).float()})
    thin, dense = setting.row(), setting.row(Operand("finetuned", "other"))
    rows = [with_fields(thin if number % 3 else dense, name=f"{number}") for number in range(20)]
    threads = torch.get_num_threads()
    found = dict(analyze_rows(setting.models, rows, device="cpu"))
    assert torch.get_num_threads() == threads
    assert sorted(found) == sorted(one.name for one in rows)
    assert all(score.rho_null_estimated == bool(int(name) % 3) for name, score in found.items())


def test_an_analysis_that_is_given_up_leaves_no_thread(tmp_path: Path) -> None:
    import threading

    setting = Setting(tmp_path, (96, 80))
    scores = analyze_rows(
        setting.models, [with_fields(setting.row(), name=str(n)) for n in range(50)], device="cpu"
    )
    next(scores)
    del scores
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("safemerge-analysis")]


def test_json_says_what_is_estimated_and_old_json_still_reads(tmp_path: Path) -> None:
    score = Setting(tmp_path, (96, 80)).score()
    scores = Scores({WEIGHT: score}, "aligned", {}, "cpu", 1.0)
    text = scores.to_json()
    assert Scores.from_json(text) == scores
    import json

    document = json.loads(text)
    del document["modules"][WEIGHT]["rho_null_estimated"]
    old = Scores.from_json(json.dumps(document)).modules[WEIGHT]
    assert old == replace(score, rho_null_estimated=False)


def test_agrees_with_the_dense_path_on_a_folded_weight(tmp_path: Path) -> None:
    setting = Setting(tmp_path, (96, 130))
    folded = (setting.aligned + setting.delta).float()
    models = {**setting.models, "finetuned": model(tmp_path / "folded", "finetuned", {WEIGHT: folded})}
    ((_, dense),) = analyze_rows(models, [setting.row(Operand("finetuned", WEIGHT))], device="cpu")
    thin = setting.score()
    assert thin.rho == pytest.approx(dense.rho, abs=1e-6)
    assert np.isclose(thin.delta_norm, dense.delta_norm, rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_spread_of_chance_is_that_of_rotations(tmp_path: Path, shape: tuple[int, int]) -> None:
    setting = Setting(tmp_path, shape)
    score = setting.score()
    v = (setting.aligned - setting.base).numpy()
    k = v @ v.T
    rng = np.random.default_rng(0)
    logs = []
    for _ in range(2000):
        q, r = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))
        turned = (q * np.sign(np.diag(r))) @ setting.delta.numpy()
        moved = k @ turned
        logs.append(math.log(np.vdot(moved, turned) / (np.linalg.norm(moved) * np.linalg.norm(turned))))
    assert score.null_sd == pytest.approx(np.std(logs), rel=0.4)
