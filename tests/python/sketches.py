"""Moments of dense V and Δ in float64, and the dense values that estimates from them are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from safemerge_fast.analysis.moments import Floats, Moments

Pair = tuple[Floats, Floats]
"""V and Δ of one module."""


def columns_of(d_in: int, columns: int, tests: int, seed: int) -> tuple[Floats, Floats]:
    """Ω and G of a seed."""
    rng = np.random.default_rng([seed, d_in])
    return rng.standard_normal((d_in, columns)), rng.standard_normal((d_in, tests))


def moments_of(v: Floats, delta: Floats, omega: Floats, g: Floats, weight: Floats | None = None) -> Moments:
    """The moments of one module, straight from their definition."""
    v, delta = np.asarray(v, np.float64), np.asarray(delta, np.float64)
    y, p = delta @ omega, v @ g
    x, kp = v @ (v.T @ y), v @ (v.T @ p)
    f = np.concatenate([y, p, x, kp], axis=1)
    r = delta.T @ kp

    def squares(matrix: Floats) -> Floats:
        return np.array([np.sum(matrix * matrix)])

    return Moments(
        columns=omega.shape[1],
        tests=g.shape[1],
        gram=(f.T @ f)[None],
        image=(r.T @ r)[None],
        v_squares=squares(v),
        delta_squares=squares(delta),
        inner=np.array([np.sum(v * delta)]),
        weight_squares=squares(v if weight is None else weight),
        d_out=np.array([v.shape[0]]),
        d_in=np.array([v.shape[1]]),
    )


def stacked(parts: Sequence[Moments]) -> Moments:
    """One batch of several, which have as many columns and tests."""
    arrays = [field.name for field in fields(Moments) if field.name not in ("columns", "tests")]
    return replace(
        parts[0], **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    )


def batch(pairs: Sequence[Pair], columns: int, tests: int, seed: int = 0) -> Moments:
    """The moments of several modules of any shapes; those of one d_in share their columns."""
    return stacked([moments_of(v, d, *columns_of(v.shape[1], columns, tests, seed)) for v, d in pairs])


@dataclass(frozen=True)
class Dense:
    """What is true of V and Δ.

    Attributes:
        rho: cos(V VᵀΔ, Δ).
        rho_null: ‖V‖² / (√d_out ‖V Vᵀ‖).
    """

    rho: float
    rho_null: float


def dense(v: Floats, delta: Floats) -> Dense:
    """By the definition, in float64."""
    k = v @ v.T
    moved = k @ delta
    return Dense(
        rho=float(np.sum(moved * delta) / (np.linalg.norm(moved) * np.linalg.norm(delta))),
        rho_null=float(np.trace(k) / (np.sqrt(v.shape[0]) * np.linalg.norm(k))),
    )
