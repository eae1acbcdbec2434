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


def moments_of(
    v: Floats,
    delta: Floats,
    omega: Floats,
    g: Floats,
    weight: Floats | None = None,
    *,
    dtype: type = np.float64,
) -> Moments:
    """The moments of one module, straight from their definition: products in a dtype, the rest in float64."""
    v, delta = (np.asarray(matrix, np.float64) for matrix in (v, delta))
    narrow_v, narrow_delta, omega, g = (matrix.astype(dtype) for matrix in (v, delta, omega, g))
    y, p = narrow_delta @ omega, narrow_v @ g
    x, kp = narrow_v @ (narrow_v.T @ y), narrow_v @ (narrow_v.T @ p)
    r = narrow_delta.astype(np.float64).T @ kp.astype(np.float64)
    f = np.concatenate([y, p, x, kp], axis=1).astype(np.float64)

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


KINDS = (
    "gauss",
    "realistic",
    "1/sqrt(i)",
    "1/i, gauss",
    "1/i",
    "1/i²",
    "spiky",
    "lora 1",
    "lora 8",
    "lora 64",
    "lora 16 in V",
    "orthogonal",
    "in span",
    "heavy",
    "cauchy",
    "sparse",
    "correlated",
    "two spikes",
    "V of rank 8",
)
"""What pair makes."""


def pair(kind: str, d_out: int, d_in: int, seed: int = 0) -> Pair:
    """V and Δ of a kind: spectra and tails that models may have, and some that are hard on purpose."""
    rng = np.random.default_rng([seed, d_out, d_in, KINDS.index(kind)])

    def gauss(*shape: int) -> Floats:
        return rng.standard_normal(shape)

    def noise(share: float) -> Floats:
        return share * _unit(gauss(d_out, d_in))

    def power(exponent: float) -> Floats:
        rank = min(d_out, d_in)
        left, right = np.linalg.qr(gauss(d_out, rank))[0], np.linalg.qr(gauss(d_in, rank))[0]
        return _unit((left * np.arange(1.0, rank + 1.0) ** -exponent) @ right.T)

    def low(rank: int) -> Floats:
        return _unit(gauss(d_out, rank) @ gauss(rank, d_in))

    def spiked() -> Floats:
        matrix = gauss(d_out, d_in)
        matrix[rng.integers(d_out, size=3)] *= 30.0
        matrix[:, rng.integers(d_in, size=3)] *= 30.0
        return matrix

    match kind:
        case "gauss":
            return gauss(d_out, d_in), gauss(d_out, d_in)
        case "realistic":
            return power(0.8) + noise(0.7), power(0.6) + noise(0.7)
        case "1/sqrt(i)":
            return power(0.5), power(0.5)
        case "1/i, gauss":
            return power(1.0), gauss(d_out, d_in)
        case "1/i":
            return power(1.0), power(1.0)
        case "1/i²":
            return power(2.0), power(2.0)
        case "spiky":
            return spiked(), spiked()
        case "lora 1" | "lora 8" | "lora 64":
            return power(0.8) + noise(0.7), low(int(kind.split()[1])) + noise(0.3)
        case "lora 16 in V":
            return low(16) + noise(0.01), gauss(d_out, d_in)
        case "orthogonal":
            basis = np.linalg.qr(gauss(d_out, d_out))[0]
            half = d_out // 2
            v = basis[:, :half] @ gauss(half, d_in)
            return v, basis[:, half:] @ gauss(d_out - half, d_in) + 0.05 * gauss(d_out, d_in)
        case "in span":
            v = power(1.0)
            return v, v @ gauss(d_in, d_in)
        case "heavy":
            return rng.standard_t(2, (d_out, d_in)), rng.standard_t(2, (d_out, d_in))
        case "cauchy":
            return gauss(d_out, d_in), rng.standard_cauchy((d_out, d_in))
        case "sparse":
            return gauss(d_out, d_in), gauss(d_out, d_in) * (rng.random((d_out, d_in)) < 0.003)
        case "correlated":
            v = power(0.8)
            return v, v + noise(1.0)
        case "two spikes":
            v = _unit(gauss(d_out, d_in)) + 2.0 * low(2)
            return v, _unit(gauss(d_out, d_in)) + 0.2 * v
        case "V of rank 8":
            return low(8), power(0.8)
    raise ValueError(kind)


def _unit(matrix: Floats) -> Floats:
    return matrix / np.linalg.norm(matrix)
