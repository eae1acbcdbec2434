"""Computes ρ of a low-rank update from its factors, in two passes over V and without a square matrix.

With V = W_aligned - W_base (d_out, d_in) and Δ = Σ s·B·A, cosine.py's ρ = ‖VᵀΔ‖² / (‖V VᵀΔ‖ ‖Δ‖) needs Δ's
column space only. All factors stand side by side in one B (d_out, r) and one A (r, d_in). With A·Aᵀ = L·Lᵀ,
C = B·L has the products of Δ, C·Cᵀ = Δ·Δᵀ, and so

    G = VᵀC (d_in, r)      H = V·G (d_out, r)      ρ = ‖G‖² / (‖H‖ ‖C‖)

at 4·d_out·d_in·r operations. Where U has orthonormal rows and Δ = C·U, ⟨V, Δ⟩ = ⟨G, Uᵀ⟩. Products with V are
float32, those of the factors and the last sums float64.

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

import torch

from .blocks import Difference, Matrix, Workspace, open_matrix, read_tensor
from .chance import chance_spread
from .device import full_float32
from .rounding import v_rounding
from .score import Score, Undefined, signed_cosine

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.module import Module
    from ..pairing.operand import LowRank

__all__ = ["PROBES", "score_low_rank"]

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

    columns: torch.Tensor
    rows: torch.Tensor
    norm: float


def score_low_rank(
    models: Mapping[str, Model], module: Module, factors: Sequence[LowRank], *, workspace: Workspace
) -> Score:
    """Scores one module whose update of the aligned weight is a sum of low-rank products.

    Args:
        models: base, aligned, and the sources of the factors, by role.
        module: A module of the pairing: 2-D, float, of one shape in base and aligned.
        factors: What Δ is the sum of.
        workspace: Buffers and the device to compute on.

    Returns:
        The score, as cosine.score_module would give it, but for an estimated ρ_null.
    """
    terms = module.terms
    aligned, base = (open_matrix(models, role, module.name, terms[role]) for role in ("aligned", "base"))
    v = Difference(workspace, aligned, base, transposed=module.transposed, minuend_norm=True)
    update, undefined = _update(models, module, factors)
    rho: float | None = None
    chance: _Chance | None = None
    cosine: float | None = None
    with full_float32(workspace.device):
        if undefined is None:
            rho, chance, cosine = _measure(v, module, update, workspace)
        else:
            _norms_only(v, module, workspace)
    v.release()
    undefined = _why_undefined(v, (aligned, base), workspace) or undefined
    v_norm, weight_norm = math.sqrt(v.squares), math.sqrt(v.minuend_squares)
    return Score(
        rho=rho if undefined is None else None,
        rho_null=chance.rho_null if undefined is None and chance is not None else None,
        v_norm=v_norm,
        delta_norm=update.norm,
        weight_norm=weight_norm,
        v_rounding=v_rounding(base.dtype, aligned.dtype, weight_norm, v_norm),
        undefined=None if undefined is None else undefined.reason,
        nonfinite=undefined is not None and undefined.nonfinite,
        rho_null_estimated=True,
        cos_v_delta=cosine if undefined is None else None,
        null_sd=chance.null_sd if undefined is None and chance is not None else None,
    )


def _update(
    models: Mapping[str, Model], module: Module, factors: Sequence[LowRank]
) -> tuple[_Update, Undefined | None]:
    """Puts the factors side by side and brings Δ = B·A to C = B·L, in float64 on the CPU.

    Returns:
        The update, and why there is no ρ, if its factors say that.
    """
    left, right = [], []
    for factor in factors:
        a, b = (
            read_tensor(models[factor.source], name, view).double()
            for name, view in ((factor.a, factor.a_view), (factor.b, factor.b_view))
        )
        for name, values in ((factor.a, a), (factor.b, b)):
            # The sum is a fortieth of the work of a look at every value, and finite only if all of them are.
            if not math.isfinite(float(values.sum())) and not bool(torch.isfinite(values).all()):
                reason = f"non-finite values in {factor.source} tensor {name}"
                empty = torch.empty(0, 0, dtype=torch.float64)
                return _Update(empty, empty, math.nan), Undefined(reason, nonfinite=True)
        if factor.transpose != module.transposed:
            a, b = b.T, a.T
        # Rows of unit length, so that the eigenvalues below lose nothing of a product whose A is small.
        lengths = torch.linalg.vector_norm(a, dim=1)
        lengths[lengths == 0.0] = 1.0
        left.append(b * (factor.scale * lengths))
        right.append(a / lengths[:, None])
    b, a = torch.cat(left, dim=1), torch.cat(right)
    eigenvalues, eigenvectors = torch.linalg.eigh(a @ a.T)
    roots = eigenvalues.clamp_min(0.0).sqrt()
    columns = b @ (eigenvectors * roots)
    rows = (eigenvectors * torch.where(roots > 0.0, 1.0 / roots, torch.zeros_like(roots))).T @ a
    norm = float(torch.linalg.vector_norm(columns))
    return _Update(columns / (norm or 1.0), rows, norm), None if norm > 0.0 else Undefined("Δ is zero")


def _measure(
    v: Difference, module: Module, update: _Update, workspace: Workspace
) -> tuple[float, _Chance | None, float | None]:
    """Computes ρ, estimates what chance gives from Gram matrices of G and H, and computes cos(V, Δ)."""
    d_out, d_in = v.shape
    rank = update.columns.shape[1]
    width = rank + PROBES
    columns = workspace.buffer("columns", d_out, width)
    columns[:, :rank].copy_(update.columns.float())
    columns[:, rank:].copy_(_probes(d_out))
    images = workspace.buffer("images", d_in, width).zero_()  # G, later scaled
    returned = workspace.buffer("returned", d_out, width).zero_()  # H, scaled like G
    scale = _pass_over_columns if module.transposed else _pass_over_rows
    factor = scale(v, columns, images, returned, workspace)
    scale_squares = factor**2
    if not math.isfinite(v.squares) or v.squares == 0.0:
        return 0.0, None, None
    image = images[:, :rank].cpu().double()
    cosine = signed_cosine(float((image * update.rows.T).sum()) / factor, math.sqrt(v.squares), 1.0)
    inner, outer = _gram(images), _gram(returned)
    overlap, squares = float(inner.diagonal()[:rank].sum()), float(outer.diagonal()[:rank].sum())
    # G carries the scale once and H once: ‖G‖²/‖H‖ carries it once.
    rho = overlap / math.sqrt(squares * scale_squares) if squares > 0.0 else 0.0
    chance = _chance(inner / scale_squares, outer / scale_squares, rank, v, update)
    return max(0.0, min(1.0, rho)), chance, cosine


@lru_cache(maxsize=4)  # models have few sizes, and the drawing takes longer than what is done with them
def _probes(size: int) -> torch.Tensor:
    """The Gaussian columns that every module with this d_out shares; not to be written to."""
    return torch.randn(size, PROBES, generator=torch.Generator().manual_seed(_SEED))


def _pass_over_rows(
    v: Difference,
    columns: torch.Tensor,
    images: torch.Tensor,
    returned: torch.Tensor,
    workspace: Workspace,
) -> float:
    """Computes G and H by blocks of V's rows: a pass for each. Returns the power of two that both are scaled by."""
    d_out, d_in = v.shape
    every = slice(0, d_in)
    blocks = _slices(d_out, d_in, workspace)
    for rows in blocks:
        images.addmm_(v.block(rows, every, "block").T, columns[rows])
    # Against underflow of the products of small weights.
    scale = _power_of_two(float(torch.linalg.vector_norm(images)))
    images.mul_(scale)
    for rows in blocks:
        torch.mm(v.block(rows, every, "block", norms=False), images, out=returned[rows])
    return scale


def _pass_over_columns(
    v: Difference,
    columns: torch.Tensor,
    images: torch.Tensor,
    returned: torch.Tensor,
    workspace: Workspace,
) -> float:
    """Does the same for a module stored as (d_in, d_out): a block of V's columns gives its part of G and of H."""
    d_out, d_in = v.shape
    scale = 0.0
    for part in _slices(d_in, d_out, workspace):
        block = v.block(slice(0, d_out), part, "block")
        torch.mm(block.T, columns, out=images[part])
        scale = scale or _power_of_two(float(torch.linalg.vector_norm(images[part])))
        images[part].mul_(scale)
        returned.addmm_(block, images[part])
    return scale


def _norms_only(v: Difference, module: Module, workspace: Workspace) -> None:
    """Reads V for its norm and the aligned weight's."""
    d_out, d_in = v.shape
    if module.transposed:
        for part in _slices(d_in, d_out, workspace):
            v.block(slice(0, d_out), part, "block")
    else:
        for part in _slices(d_out, d_in, workspace):
            v.block(part, slice(0, d_in), "block")


def _slices(extent: int, across: int, workspace: Workspace) -> list[slice]:
    """Cuts an extent so that a block fits the cache, which is where it is used."""
    step = max(workspace.chunk_elements // across, 1)
    return [slice(start, min(start + step, extent)) for start in range(0, extent, step)]


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """matrixᵀ·matrix of a tall matrix, in float64 on the CPU, because MPS has no float64."""
    double = matrix.cpu().double()
    return double.T @ double


@dataclass(frozen=True, slots=True)
class _Chance:
    """What a random update would give: ρ_null, and the standard deviation of log ρ."""

    rho_null: float
    null_sd: float | None


def _chance(
    inner: torch.Tensor, outer: torch.Tensor, rank: int, v: Difference, update: _Update
) -> _Chance | None:
    """Estimates what chance gives.

    Args:
        inner: ZᵀM Z of all columns Z = [C, probes], with M = V Vᵀ; float64.
        outer: ZᵀM²Z of them; float64.
        rank: How many columns C has.
        v: V, read.
        update: Δ.

    Returns:
        The estimates; None where M vanishes.
    """
    lengths = inner.diagonal().clamp_min(0.0).sqrt()
    shrink = torch.where(lengths > 0.0, 1.0 / lengths, torch.zeros_like(lengths))
    inner, outer = inner * torch.outer(shrink, shrink), outer * torch.outer(shrink, shrink)
    count = inner.shape[0]
    # One row for each probe: all other columns.
    others = torch.tensor([[c for c in range(count) if c != probe] for probe in range(rank, count)])
    rows, columns = others[:, :, None], others[:, None, :]
    probes = torch.arange(rank, count)
    inverses = torch.linalg.pinv(inner[rows, columns], rtol=_GRAM_NOISE, hermitian=True)
    known = outer[rows, columns]
    products = inverses @ known  # have N's trace, and their squares N²'s
    shared = inner[others, probes[:, None]]
    images = (inverses @ shared[:, :, None]).squeeze(2)
    known_squares = (products * products.mT).sum()
    expected_trace = PROBES * v.squares - products.diagonal(dim1=1, dim2=2).sum()
    sizes = lengths[probes].square()
    rest_squares = outer[probes, probes] - (images * (known @ images[:, :, None]).squeeze(2)).sum(dim=1)
    rest_trace = inner[probes, probes] - (shared * images).sum(dim=1)
    total = float(known_squares)
    if (trace := float((rest_trace * sizes).sum())) > 0.0:
        # The trace of M - N is known, so that the probes' share of it says how much they overstate the rest.
        total += float((rest_squares * sizes).sum()) * max(float(expected_trace), 0.0) / trace
    # A Gram matrix of that trace and size has at least this norm.
    least = v.squares**2 / min(v.shape)
    gram_squares = max(total / PROBES, least)
    if not gram_squares > 0.0:
        return None
    rho_null = v.squares / math.sqrt(v.shape[0] * gram_squares)
    # What all columns together have of M's spectrum, and a flat rest.
    values, vectors = torch.linalg.eigh(inner)
    kept = values > _GRAM_NOISE * values[-1]
    half = vectors[:, kept] / values[kept].sqrt()
    captured = torch.linalg.eigvalsh(half.T @ outer @ half).clamp_min(0.0)
    trace = max(v.squares - float(captured.sum()), 0.0)
    square = max(gram_squares - float(captured.square().sum()), 0.0)
    level = square / trace if trace > 0.0 else 0.0
    third = float((captured**3).sum()) + square * level
    fourth = float((captured**4).sum()) + square * level**2
    gram = update.columns.T @ update.columns
    spread = chance_spread((v.squares, gram_squares, third, fourth), v.shape[0], float(gram.square().sum()))
    return _Chance(rho_null, spread)


def _power_of_two(size: float) -> float:
    """The power of two that brings a positive size to about 1, so that scaling by it rounds nothing."""
    if not (math.isfinite(size) and size > 0.0):
        return 1.0
    return math.ldexp(1.0, max(-126, min(126, -math.frexp(size)[1])))


def _why_undefined(v: Difference, tensors: Sequence[Matrix], workspace: Workspace) -> Undefined | None:
    """Says why V gives no ρ, or returns None."""
    if not (math.isfinite(v.minuend_squares) and math.isfinite(v.squares)):
        for tensor in tensors:
            if not tensor.is_finite(workspace.chunk_elements):
                return Undefined(f"non-finite values in {tensor.role} tensor {tensor.name}", nonfinite=True)
        return Undefined(
            f"non-finite values in float32 arithmetic on tensor {tensors[0].name}", nonfinite=True
        )
    return Undefined("V is zero") if v.squares == 0.0 else None
