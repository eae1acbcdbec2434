"""ρ_null and the scatter of log ρ by chance, from a sketch: against dense values and random rotations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import sketches
from sketches import KINDS, Floats

from safemerge_fast.analysis.chance import chance_of
from safemerge_fast.analysis.interval import estimate_rho


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rotated(v: Floats, delta: Floats, count: int) -> Floats:
    """Log ρ of so many random rotations of Δ."""
    rng = np.random.default_rng(4)
    logs = []
    for _ in range(count):
        q, r = np.linalg.qr(rng.standard_normal((len(v), len(v))))
        logs.append(math.log(sketches.dense(v, (q * np.sign(np.diag(r))) @ delta).rho))
    return np.array(logs)


# Of 16 test columns and of 64, for matrices of 200 × 260: root mean square errors that were measured, and half as much.
SKEWED = ("1/i²", "spiky", "1/i", "in span", "V of rank 8", "lora 1", "cauchy")
ERRORS = {"1/sqrt(i)": (0.1, 0.01), "lora 1": (0.08, 0.005), "heavy": (0.08, 0.02)}


@pytest.mark.parametrize("kind", KINDS)
def test_rho_null_is_near_the_dense_one(kind: str) -> None:
    v, delta = sketches.pair(kind, 200, 260)
    truth = sketches.dense(v, delta).rho_null
    for tests, allowed in zip((16, 64), ERRORS.get(kind, (0.06, 0.007)), strict=True):
        found = chance_of(
            sketches.stacked([sketches.batch([(v, delta)], 32, tests, seed) for seed in range(10)])
        )
        assert np.sqrt(np.mean((found.rho_null / truth - 1) ** 2)) < allowed


@pytest.mark.parametrize("kind", KINDS)
def test_the_scatter_is_that_of_random_rotations(kind: str) -> None:
    v, delta = sketches.pair(kind, 64, 90)
    logs = rotated(v, delta, 400)
    found = chance_of(sketches.stacked([sketches.batch([(v, delta)], 32, 16, seed) for seed in range(20)]))
    # For Δ of few directions log ρ is far from normal, and its scatter from what the first order says.
    skewed = kind in SKEWED
    low, high = (0.6, 1.6) if skewed else (0.75, 1.45)
    assert low < np.median(found.deviation) / np.std(logs) < high
    assert abs(np.mean(logs) - np.log(np.median(found.rho_null))) < 0.02 + (1.0 if skewed else 0.3) * np.std(
        logs
    )


def test_z_says_what_is_due_to_chance() -> None:
    rng = np.random.default_rng(8)
    v, delta = sketches.pair("realistic", 64, 90)
    q = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    aligned = v + delta
    moments = sketches.batch([(v, q @ delta), (v, aligned)], 96, 48)
    z = chance_of(moments).z(estimate_rho(moments).log_rho)
    assert abs(z[0]) < 3
    assert z[1] > 5


def test_leaving_out_each_column_in_turn_by_the_definition() -> None:
    """The closed forms against a loop that computes every approximation of N."""
    rng = np.random.default_rng(0)
    v = rng.standard_normal((30, 40)) * np.arange(1.0, 41.0) ** -0.3
    g = rng.standard_normal((40, 6))
    moments = sketches.moments_of(v, v, rng.standard_normal((40, 32)), g)
    n = v.T @ v / np.sum(v * v)
    total = rest = found = expected = 0.0
    for column in range(6):
        others = np.delete(g, column, axis=1)
        reached = n @ others
        known = reached @ np.linalg.pinv(others.T @ reached) @ reached.T
        z = g[:, column]
        total += np.trace(known @ known)
        rest += z @ (n @ n - known @ known) @ z
        found += z @ (n - known) @ z
        expected += 1 - np.trace(known)
    second = (total + rest * expected / found) / 6
    assert chance_of(moments).rho_null[0] == pytest.approx(1 / math.sqrt(30 * second), rel=1e-4)


def test_v_of_low_rank_is_exact() -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((60, 9)) @ rng.standard_normal((9, 80))
    delta = rng.standard_normal((60, 80))
    found = chance_of(sketches.batch([(v, delta)], 32, 16))
    assert found.rho_null[0] == pytest.approx(sketches.dense(v, delta).rho_null, rel=1e-4)


@pytest.mark.parametrize("scales", [(1e-12, 1e-12), (1e6, 1e6), (1e-12, 1e6)])
def test_scales_do_not_matter(scales: tuple[float, float]) -> None:
    v, delta = sketches.pair("realistic", 60, 80)
    plain, scaled = (
        chance_of(sketches.batch([pair], 32, 16)) for pair in ((v, delta), (v * scales[0], delta * scales[1]))
    )
    np.testing.assert_allclose(scaled.rho_null, plain.rho_null, rtol=1e-9)
    np.testing.assert_allclose(scaled.deviation, plain.deviation, rtol=1e-6)


def test_what_cannot_be_told_is_nan() -> None:
    good = sketches.pair("realistic", 60, 80)
    zero = np.zeros((60, 80))
    moments = sketches.batch(
        [good, (zero, good[1]), (good[0], zero), (good[0] * np.nan, good[1]), good], 32, 16
    )
    found = chance_of(moments)
    assert np.isnan(found.rho_null).tolist() == [False, True, True, True, False]
    assert np.isnan(found.deviation).tolist() == [False, True, True, True, False]
    assert np.isnan(found.z(np.zeros(5))).tolist() == [False, True, True, True, False]
    assert np.isnan(chance_of(sketches.batch([good], 32, 0)).rho_null).all()
    assert np.isnan(chance_of(replace(moments, v_squares=moments.v_squares * np.nan)).rho_null).all()


def test_one_row_has_no_scatter() -> None:
    rng = np.random.default_rng(0)
    found = chance_of(sketches.batch([(rng.standard_normal((1, 80)), rng.standard_normal((1, 80)))], 32, 16))
    assert found.rho_null[0] == pytest.approx(1)
    assert math.isnan(found.deviation[0])
    assert math.isnan(found.z(np.array([0.0]))[0])
