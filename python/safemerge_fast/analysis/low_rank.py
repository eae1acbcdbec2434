"""Computes ρ of a low-rank update from its factors, in two passes over V and without a square matrix.

With V = W_aligned - W_base (d_out, d_in) and Δ = Σ s·B·A, cosine.py's ρ = ‖VᵀΔ‖² / (‖V VᵀΔ‖ ‖Δ‖) needs Δ's
column space only. All factors stand side by side in one B (d_out, r) and one A (r, d_in). With A·Aᵀ = L·Lᵀ,
C = B·L has the products of Δ, C·Cᵀ = Δ·Δᵀ, and so

    G = VᵀC (d_in, r)      H = V·G (d_out, r)      ρ = ‖G‖² / (‖H‖ ‖C‖)

at 4·d_out·d_in·r operations. Where U has orthonormal rows and Δ = C·U, ⟨V, Δ⟩ = ⟨G, Uᵀ⟩. Products with V are
float32, fused with its reading in the engine; those of the factors and the last sums are float64. No torch.

ρ_null = ‖V‖² / (√d_out ‖M‖) with M = V Vᵀ is estimated from a few Gaussian columns z that pass through the same
products beside C: E ‖M z‖² = ‖M‖². V of an aligned model has a few large singular values, and these would
make the estimate coarse. They are taken out exactly: N = Y·(ZᵀY)⁺·Yᵀ with Y = M Z, Nyström's approximation of M
by all columns but z, gives ‖M‖² = ‖N‖² + E(‖M z‖² - ‖N z‖²), averaged over which z is left out (after Epperly,
Tropp and Webber, "XTrace", arXiv 2301.07825), and corrected by zᵀ(M - N)z, whose mean is known. It needs no more
than the Gram matrices of G and of H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import _engine
from ..pairing.operand import Operand, Term
from .chance import chance_spread
from .opened import open_terms, rounded_dtype, tensor_name
from .rounding import v_rounding
from .score import Score, Undefined, signed_cosine

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.module import Module
    from ..pairing.operand import LowRank
    from ..pairing.view import View

__all__ = ["PROBES", "score_low_rank"]

_Matrix = NDArray[np.float64]

PROBES = 16
"""Gaussian columns that estimate ρ_null.

Root mean square errors were measured: 0.01 % where V has a rank below that, 0.5 % where V is Gaussian, 3 % where its
singular values fall as 1/√i.
"""

_SEED = 20250317
# Relative to the largest eigenvalue, what of a float32 Gram matrix of unit columns is noise.
_GRAM_NOISE = 1e-5


@dataclass(frozen=True, slots=True)
class _Update:
    """Δ = ‖Δ‖·C·U: C of norm 1, (d_out, r); U with orthonormal rows, or rows of zeros, (r, d_in); both in float64."""

    columns: _Matrix
    rows: _Matrix
    norm: float


_NO_UPDATE = _Update(np.empty((0, 0)), np.empty((0, 0)), math.nan)


def score_low_rank(models: Mapping[str, Model], module: Module, factors: Sequence[LowRank]) -> Score:
    """Scores one module whose update of the aligned weight is a sum of low-rank products.

    Args:
        models: base, aligned, and the sources of the factors, by role.
        module: A module of the pairing: 2-D, float, of one shape in base and aligned.
        factors: What Δ is the sum of.

    Returns:
        The score, as cosine.score_module would give it, but for an estimated ρ_null.
    """
    roles, dtypes = {}, {}
    for role in ("base", "aligned"):
        terms = module.terms[role]
        roles[role] = open_terms(models, module.name, terms)
        dtypes[role] = rounded_dtype(models, terms, roles[role])
    update, undefined = _update(models, module, factors)
    rank = update.columns.shape[1]
    columns = np.zeros((module.shape[0], 0), np.float32)
    if undefined is None:
        columns = np.hstack((update.columns.astype(np.float32), _probes(module.shape[0])))
    passed = _engine.thin_images(
        roles["base"],
        roles["aligned"],
        columns.tobytes(),
        columns.shape[1],
        transposed=module.transposed,
    )
    undefined = _why_undefined(passed, roles, module) or undefined
    for matrix in roles.values():
        matrix.release()
    v_norm, weight_norm = math.sqrt(passed.v_squares), math.sqrt(passed.weight_squares)
    rounding = v_rounding(dtypes["base"], dtypes["aligned"], weight_norm, v_norm)
    if undefined is not None:
        return Score(
            rho=None,
            rho_null=None,
            v_norm=v_norm,
            delta_norm=update.norm,
            weight_norm=weight_norm,
            v_rounding=rounding,
            undefined=undefined.reason,
            nonfinite=undefined.nonfinite,
            rho_null_estimated=True,
        )
    width = columns.shape[1]
    inner, outer = np.frombuffer(passed.grams, np.float64).reshape(2, width, width)
    overlap, squares = float(inner.diagonal()[:rank].sum()), float(outer.diagonal()[:rank].sum())
    rho = overlap / math.sqrt(squares) if squares > 0.0 else 0.0
    images = np.frombuffer(passed.images, np.float32).reshape(module.shape[1], width)[:, :rank]
    product = float(np.einsum("ij,ji->", images.astype(np.float64), update.rows)) / passed.scale
    d_out, d_in = module.shape
    chance = _chance(inner, outer, passed.v_squares, (d_out, d_in), update)
    return Score(
        rho=max(0.0, min(1.0, rho)),
        rho_null=None if chance is None else chance.rho_null,
        v_norm=v_norm,
        delta_norm=update.norm,
        weight_norm=weight_norm,
        v_rounding=rounding,
        undefined=None,
        rho_null_estimated=True,
        cos_v_delta=signed_cosine(product, v_norm, 1.0),
        null_sd=None if chance is None else chance.null_sd,
    )


def _update(
    models: Mapping[str, Model], module: Module, factors: Sequence[LowRank]
) -> tuple[_Update, Undefined | None]:
    """Puts the factors side by side and brings Δ = B·A to C = B·L.

    Returns:
        The update, and why there is no ρ, if its factors say that.
    """
    left, right = [], []
    for factor in factors:
        a, b = (
            _read(models, factor.source, name, view)
            for name, view in ((factor.a, factor.a_view), (factor.b, factor.b_view))
        )
        for name, values in ((factor.a, a), (factor.b, b)):
            if not np.isfinite(values).all():
                reason = f"non-finite values in {factor.source} tensor {name}"
                return _NO_UPDATE, Undefined(reason, nonfinite=True)
        if factor.transpose != module.transposed:
            a, b = b.T, a.T
        # Rows of unit length, so that the eigenvalues below lose nothing of a product whose A is small.
        lengths = np.sqrt(np.einsum("ij,ij->i", a, a))
        lengths[lengths == 0.0] = 1.0
        left.append(b * (factor.scale * lengths))
        right.append(a / lengths[:, None])
    b, a = np.hstack(left), np.vstack(right)
    eigenvalues, eigenvectors = np.linalg.eigh(a @ a.T)
    roots = np.sqrt(eigenvalues.clip(0.0))
    columns = b @ (eigenvectors * roots)
    rows = (eigenvectors * _reciprocal(roots)).T @ a
    norm = float(np.linalg.norm(columns))
    return _Update(columns / (norm or 1.0), rows, norm), None if norm > 0.0 else Undefined("Δ is zero")


def _read(models: Mapping[str, Model], source: str, name: str, view: View | None) -> _Matrix:
    """A factor, or the part of one that a view gives, as float32 reads it."""
    matrix = open_terms(models, name, (Term(Operand(source, name, view=view)),))
    rows, columns = matrix.shape
    block = _engine.Block(rows * columns)
    matrix.read(block, (0, rows), (0, columns))
    matrix.release()
    return np.asarray(block).reshape(rows, columns).astype(np.float64)


def _reciprocal(values: _Matrix) -> _Matrix:
    """1 / value, and zero of zero."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0.0)


@lru_cache(maxsize=4)  # models have few sizes, and the drawing takes longer than what is done with them
def _probes(size: int) -> NDArray[np.float32]:
    """The Gaussian columns that every module with this d_out shares; not to be written to."""
    return np.random.default_rng(_SEED).standard_normal((size, PROBES), np.float32)


@dataclass(frozen=True, slots=True)
class _Chance:
    """What a random update would give: ρ_null, and the standard deviation of log ρ."""

    rho_null: float
    null_sd: float | None


def _chance(
    inner: _Matrix, outer: _Matrix, v_squares: float, shape: tuple[int, int], update: _Update
) -> _Chance | None:
    """Estimates what chance gives.

    Args:
        inner: ZᵀM Z of all columns Z = [C, probes], with M = V Vᵀ.
        outer: ZᵀM²Z of them.
        v_squares: ‖V‖².
        shape: (d_out, d_in).
        update: Δ.

    Returns:
        The estimates; None where M vanishes.
    """
    lengths = np.sqrt(inner.diagonal().clip(0.0))
    shrink = _reciprocal(lengths)
    inner, outer = (gram * np.outer(shrink, shrink) for gram in (inner, outer))
    count, rank = len(inner), update.columns.shape[1]
    probes = np.arange(rank, count)
    # One row for each probe: all other columns.
    others = np.array([[c for c in range(count) if c != probe] for probe in probes])
    rows, columns = others[:, :, None], others[:, None, :]
    inverses = np.linalg.pinv(inner[rows, columns], rcond=_GRAM_NOISE, hermitian=True)
    known = outer[rows, columns]
    products = inverses @ known  # have N's trace, and their squares N²'s
    shared = inner[others, probes[:, None]]
    images = (inverses @ shared[:, :, None])[:, :, 0]
    known_squares = float(np.einsum("kij,kji->", products, products))
    expected_trace = PROBES * v_squares - float(np.einsum("kii->", products))
    sizes = lengths[probes] ** 2
    rest_squares = outer[probes, probes] - np.einsum("ki,kij,kj->k", images, known, images)
    rest_trace = inner[probes, probes] - np.einsum("ki,ki->k", shared, images)
    total = known_squares
    if (trace := float((rest_trace * sizes).sum())) > 0.0:
        # The trace of M - N is known, so that the probes' share of it says how much they overstate the rest.
        total += float((rest_squares * sizes).sum()) * max(expected_trace, 0.0) / trace
    # A Gram matrix of that trace and size has at least this norm.
    least = v_squares**2 / min(shape)
    gram_squares = max(total / PROBES, least)
    if not gram_squares > 0.0:
        return None
    rho_null = v_squares / math.sqrt(shape[0] * gram_squares)
    # What all columns together have of M's spectrum, and a flat rest.
    values, vectors = np.linalg.eigh(inner)
    kept = values > _GRAM_NOISE * values[-1]
    half = vectors[:, kept] / np.sqrt(values[kept])
    captured = np.linalg.eigvalsh(half.T @ outer @ half).clip(0.0)
    trace = max(v_squares - float(captured.sum()), 0.0)
    square = max(gram_squares - float((captured**2).sum()), 0.0)
    level = square / trace if trace > 0.0 else 0.0
    third = float((captured**3).sum()) + square * level
    fourth = float((captured**4).sum()) + square * level**2
    gram = update.columns.T @ update.columns
    spread = chance_spread((v_squares, gram_squares, third, fourth), shape[0], float((gram**2).sum()))
    return _Chance(rho_null, spread)


def _why_undefined(
    passed: _engine.ThinImages, roles: Mapping[str, _engine.Matrix], module: Module
) -> Undefined | None:
    """Says why V gives no ρ, or returns None."""
    if not (math.isfinite(passed.weight_squares) and math.isfinite(passed.v_squares)):
        for role in ("aligned", "base"):
            if not roles[role].is_finite():
                name = tensor_name(module.terms[role], module.name)
                return Undefined(f"non-finite values in {role} tensor {name}", nonfinite=True)
        name = tensor_name(module.terms["aligned"], module.name)
        return Undefined(f"non-finite values in float32 arithmetic on tensor {name}", nonfinite=True)
    return Undefined("V is zero") if passed.v_squares == 0.0 else None
