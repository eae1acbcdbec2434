"""Formulas in float64, written down a second time, where mergekit says little: votes by hand, rows, columns, means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_merge import engine_merge
from numpy.typing import NDArray

Array = NDArray[np.float64]


def merge_rows(
    directory: Path, method: str, deltas: list[list[float]], weights: list[float], **shared: Any
) -> list[float]:
    """The merge of task vectors against a base of ones."""
    base = torch.ones(len(deltas[0]))
    models = [{"x": base + torch.tensor(delta)} for delta in deltas]
    each = [{"weight": weight} for weight in weights]
    merged = engine_merge(directory, method, models, {"x": base}, shared=shared, each=each)["x"]
    return [float(value) - 1.0 for value in merged]


def test_votes_by_hand(tmp_path: Path) -> None:
    # Sums of weighted updates by column: 4 + 1 - 2, 1 - 4 + 2, 2 - 2 (zero counts as positive), all negative, only one
    # that is not zero, none.
    deltas = [
        [4.0, 1.0, 2.0, -1.0, 0.0, 0.0],
        [2.0, -8.0, -4.0, -2.0, 6.0, 0.0],
        [-1.0, 1.0, 0.0, -4.0, -0.0, 0.0],
    ]
    weights = [1.0, 0.5, 2.0]
    sums = merge_rows(tmp_path, "ties", deltas, weights, normalize=False)
    assert sums == [5.0, -4.0, 2.0, -10.0, 3.0, 0.0]
    means = merge_rows(tmp_path, "ties", deltas, weights)
    # Divided by the weights of those that agree, never of those that abstain.
    assert means == pytest.approx([5.0 / 1.5, -8.0, 2.0, -10.0 / 3.5, 6.0, 0.0], rel=1e-6)
    assert merge_rows(tmp_path, "ties", deltas, weights, **{"lambda": 0.25}) == pytest.approx(
        [0.25 * mean for mean in means], rel=1e-6
    )
    linear = merge_rows(tmp_path, "task_arithmetic", deltas, weights)
    assert linear == [3.0, -1.0, 0.0, -10.0, 3.0, 0.0]


def test_votes_with_negative_weights_by_hand(tmp_path: Path) -> None:
    # A negative weight turns the vote around; the divisor is the signed sum, and one where that is zero.
    deltas = [[2.0, 2.0, 2.0], [-2.0, 2.0, -6.0]]
    assert merge_rows(tmp_path, "ties", deltas, [1.0, -1.0], normalize=False) == [4.0, 2.0, 8.0]
    assert merge_rows(tmp_path, "ties", deltas, [1.0, -1.0]) == [4.0, 2.0, 8.0]
    assert merge_rows(tmp_path, "ties", deltas, [1.0, -0.5]) == [6.0, 2.0, 10.0]


def draws(count: int, shape: tuple[int, ...], seed: int = 0) -> tuple[list[Array], Array]:
    """Fine-tunes of a base, as float32 holds them."""
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(shape).astype(np.float32)
    steps = generator.standard_normal((count, *shape)).astype(np.float32)
    models = [(base + np.float32(0.3) * (step + steps[0])).astype(np.float32) for step in steps]
    return [model.astype(np.float64) for model in models], base.astype(np.float64)


def run(
    directory: Path, method: str, models: list[Array], base: Array | None, *weights: float, **shared: Any
) -> Array:
    tensors = [{"x": torch.from_numpy(model.astype(np.float32))} for model in models]
    start = None if base is None else {"x": torch.from_numpy(base.astype(np.float32))}
    each = [{"weight": weight} for weight in weights] or None
    merged = engine_merge(directory, method, tensors, start, shared=shared, each=each)["x"]
    return merged.numpy().astype(np.float64)


def cosine(left: Array, right: Array) -> float:
    return float((left * right).sum() / np.sqrt((left * left).sum() * (right * right).sum()))


def slerp(left: Array, right: Array, t: float) -> Array:
    angle = np.arccos(cosine(left, right))
    return (np.sin((1 - t) * angle) * left + np.sin(t * angle) * right) / np.sin(angle)


@pytest.mark.parametrize("shape", [(40,), (9, 31), (4, 6, 11), (1, 7), (7, 1)])
@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("row_wise", [False, True])
def test_nuslerp_of_rows_and_columns(
    tmp_path: Path, shape: tuple[int, ...], has_base: bool, row_wise: bool
) -> None:
    models, base = draws(2, shape)
    start = base if has_base else np.zeros(shape)
    # Vectors along the first dimension, or the last, as rows of a matrix.
    axis = 0 if row_wise else -1
    left, right = (np.moveaxis(model - start, axis, -1) for model in models)
    expected = np.empty_like(left)
    for place in np.ndindex(left.shape[:-1]):
        if left.shape[-1] == 1:
            # Numbers are parallel or opposite: a straight line.
            expected[place] = 0.4 * left[place] + 0.6 * right[place]
        else:
            expected[place] = slerp(left[place], right[place], 0.6)
    expected = start + np.moveaxis(expected, -1, axis)
    options = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    merged = run(tmp_path, "nuslerp", models, base if has_base else None, 0.8, 1.2, **options)
    np.testing.assert_allclose(merged, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(31,), (9, 31), (3, 5, 17)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_of_rows(tmp_path: Path, shape: tuple[int, ...], count: int) -> None:
    models, base = draws(count, shape)
    deltas = [(model - base).reshape(-1, shape[-1]) for model in models]
    expected = np.empty((int(np.prod(shape[:-1])), shape[-1]))
    for row in range(expected.shape[0]):
        pairs = [cosine(deltas[i][row], deltas[j][row]) for i in range(count) for j in range(i)]
        mean = float(np.mean(pairs))
        t = count * mean / (1 + (count - 1) * mean)
        expected[row] = t * np.mean([delta[row] for delta in deltas], axis=0)
    merged = run(tmp_path, "model_stock", models, base, filter_wise=True)
    np.testing.assert_allclose(merged, base + expected.reshape(shape), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_karcher_s_mean_has_no_pull_left(tmp_path: Path, count: int) -> None:
    # What defines the mean: the directions to all models, each as long as its angle, cancel out.
    models, _ = draws(count, (60, 50), seed=3)
    merged = run(tmp_path, "karcher", models, None, max_iter=100, tol=1e-9)
    norms = [float(np.sqrt((model * model).sum())) for model in models]
    size = float(np.sqrt((merged * merged).sum()))
    assert size == pytest.approx(np.mean(norms), rel=1e-6)
    mean = merged / size
    pull = np.zeros_like(mean)
    for model, norm in zip(models, norms, strict=True):
        unit = model / norm
        angle = np.arccos(cosine(unit, mean))
        direction = unit - (unit * mean).sum() * mean
        pull += angle * direction / np.sqrt((direction * direction).sum())
    assert np.sqrt((pull * pull).sum()) < 1e-5
    if count == 2:
        # The middle of the arc.
        middle = slerp(models[0] / norms[0], models[1] / norms[1], 0.5)
        np.testing.assert_allclose(mean, middle, rtol=1e-5, atol=1e-7)


def test_one_iteration_of_karcher_is_one_step(tmp_path: Path) -> None:
    models, _ = draws(3, (12, 9), seed=4)
    norms = [float(np.sqrt((model * model).sum())) for model in models]
    units = [model / norm for model, norm in zip(models, norms, strict=True)]
    mean = np.mean(units, axis=0)
    mean /= np.sqrt((mean * mean).sum())
    angles = [float(np.arccos((unit * mean).sum())) for unit in units]
    step = np.mean(
        [a / np.sin(a) * (u - np.cos(a) * mean) for a, u in zip(angles, units, strict=True)], axis=0
    )
    length = float(np.sqrt((step * step).sum()))
    expected = np.mean(norms) * (np.cos(length) * mean + np.sin(length) * step / length)
    merged = run(tmp_path, "karcher", models, None, max_iter=1)
    np.testing.assert_allclose(merged, expected, rtol=2e-6, atol=2e-6)


def test_sce_by_hand(tmp_path: Path) -> None:
    # Updates of three models; by columns their variances are 2/3, 0, 8/3, 26/9, 0.
    deltas = [[1.0, 2.0, 4.0, 3.0, 0.0], [2.0, 2.0, 2.0, -1.0, 0.0], [3.0, 2.0, 0.0, 0.0, 0.0]]
    base = torch.full((5,), 10.0)
    models = [{"x": base + torch.tensor(delta)} for delta in deltas]
    # Of three elements that differ, two thirds are selected: the third and the fourth.
    merged = engine_merge(tmp_path, "sce", models, {"x": base}, shared={"select_topk": 0.7})["x"]
    energies = np.array([16.0 + 9.0, 4.0 + 1.0, 0.0])
    shares = energies / energies.sum()
    third = (4.0 * shares[0] + 2.0 * shares[1]) / (shares[0] + shares[1])
    fourth = 3.0
    expected = [10.0, 10.0, 10.0 + third, 10.0 + fourth, 10.0]
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6)


def test_breadcrumbs_by_hand(tmp_path: Path) -> None:
    # Of ten elements one is dropped as too large and five below it stay.
    delta = torch.tensor([0.5, -9.0, 8.0, -7.0, 1.0, -6.0, 5.0, 4.0, -3.0, 0.25])
    each = [{"weight": 1.0, "density": 0.5, "gamma": 0.1}]
    zeros = {"x": torch.zeros(10)}
    merged = engine_merge(tmp_path, "breadcrumbs", [{"x": delta}], zeros, each=each)["x"]
    assert merged.tolist() == [0.0, 0.0, 8.0, -7.0, 0.0, -6.0, 5.0, 4.0, 0.0, 0.0]


def test_nearswap_by_hand(tmp_path: Path) -> None:
    base = {"x": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    other = {"x": torch.tensor([1.0, 1.25, 0.75, 3.0])}
    merged = engine_merge(tmp_path, "nearswap", [other], base, shared={"t": 0.5})["x"]
    # Within 0.5 the other's value; beyond it, a step of 0.5 towards it.
    assert merged.tolist() == [1.0, 1.25, 0.75, 1.5]
