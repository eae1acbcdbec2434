"""Computes ρ exactly for updates of full rank, through the smaller of the two Gram matrices of V.

With V = W_aligned - W_base and Δ = W_finetuned - W_reference, both (d_out, d_in), SafeMERGE (arXiv
2503.17239) takes ρ = cos(C Δ, Δ) with C = V Vᵀ/‖V‖. The scale of C cancels:

    ρ = ‖VᵀΔ‖² / (‖V VᵀΔ‖ ‖Δ‖)            ρ_null = ‖V‖² / (√d_out ‖V Vᵀ‖)

A wide V (d_out <= d_in) goes through K = V Vᵀ and KΔ by blocks of columns; a tall one through N = VᵀV and M =
VᵀΔ by blocks of rows, where ‖V VᵀΔ‖² = ⟨M, N M⟩. So memory is min(d_out, d_in)² floats (twice that if V is
tall) and a few blocks, and the products take 3 to 4 · d_out · d_in · min(d_out, d_in) operations; 2 · min(d_out, d_in)³
more say how far chance scatters. Products are float32, sums over rows float64. The cosine of V and Δ themselves comes
from the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .blocks import Difference, Matrix, Workspace, open_matrix
from .chance import chance_spread
from .device import full_float32
from .rounding import v_rounding
from .score import Score, Undefined, signed_cosine

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.module import Module

__all__ = ["Workspace", "score_module"]

# Columns that estimate ‖ΔΔᵀ‖ to a few percent, which is enough for a standard deviation.
_PROBES = 32
_SEED = 20250317


def score_module(
    models: Mapping[str, Model], module: Module, *, delta_reference: str = "aligned", workspace: Workspace
) -> Score:
    """Scores one module.

    Args:
        models: base, aligned and finetuned, by role.
        module: A module of the pairing: 2-D, float, of one shape in all three models. What adapters change
            is composed as it is read.
        delta_reference: What Δ is taken against, "aligned" or "base".
        workspace: Buffers and the device to compute on.

    Returns:
        The score. ρ is 0 where V VᵀΔ is zero and neither V nor Δ is: the update lies wholly outside the
        subspace.
    """
    terms = module.terms
    tensors = {
        role: open_matrix(models, role, module.name, terms[role]) for role in ("base", "aligned", "finetuned")
    }
    turned = module.transposed
    v = Difference(workspace, tensors["aligned"], tensors["base"], transposed=turned, minuend_norm=True)
    delta = Difference(workspace, tensors["finetuned"], tensors[delta_reference], transposed=turned)
    d_out, d_in = v.shape
    found: _Found | None = None
    with full_float32(workspace.device):
        if v.is_zero() or delta.is_zero():
            _norms_only(v, delta, workspace)
        elif d_out <= d_in:
            found = _wide(v, delta, workspace)
        else:
            found = _tall(v, delta, workspace)
    undefined = _why_undefined(v, delta, tensors, workspace)
    v.release()
    delta.release()
    v_norm, weight_norm = math.sqrt(v.squares), math.sqrt(v.minuend_squares)
    delta_norm = math.sqrt(delta.squares)
    score = Score(
        rho=None,
        rho_null=None,
        v_norm=v_norm,
        delta_norm=delta_norm,
        weight_norm=weight_norm,
        v_rounding=v_rounding(tensors["base"].dtype, tensors["aligned"].dtype, weight_norm, v_norm),
        undefined=None if undefined is None else undefined.reason,
        nonfinite=undefined is not None and undefined.nonfinite,
    )
    if undefined is not None or found is None:
        return score
    return replace(
        score,
        rho=found.rho,
        rho_low=found.rho,
        rho_high=found.rho,
        rho_null=found.null(v),
        null_sd=found.null_sd(v, delta),
        cos_v_delta=signed_cosine(found.inner, v_norm, delta_norm),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What the products of a module say.

    Attributes:
        rho: ρ.
        inner: ⟨V, Δ⟩.
        scale: What the Gram matrix of V was multiplied by.
        powers: tr of its second, third and fourth power, so scaled.
        delta_fourth: Estimates ‖ΔΔᵀ‖².
    """

    rho: float
    inner: float
    scale: float
    powers: tuple[float, float, float]
    delta_fourth: float

    def null(self, v: Difference) -> float | None:
        """ρ_null; the Gram matrix' trace is ‖V‖² times the scale."""
        square = self.powers[0]
        return v.squares * self.scale / math.sqrt(v.shape[0] * square) if square > 0.0 else None

    def null_sd(self, v: Difference, delta: Difference) -> float | None:
        """The standard deviation of log ρ over rotations of Δ."""
        return chance_spread(
            (v.squares * self.scale, *self.powers), v.shape[0], self.delta_fourth / delta.squares**2
        )


def _wide(v: Difference, delta: Difference, workspace: Workspace) -> _Found:
    """Goes through K = V Vᵀ, for d_out <= d_in; two passes over blocks of columns."""
    d_out, d_in = v.shape
    rows = slice(0, d_out)
    blocks = workspace.blocks(d_in, d_out, least=workspace.block_columns)
    gram = workspace.buffer("gram", d_out, d_out).zero_()
    for columns in blocks:
        _add_lower_gram(gram, v.block(rows, columns, "block"), workspace)
    gram_scale = _power_of_two(v.squares)
    _complete_gram(gram, gram_scale, workspace)
    powers = _powers(gram, workspace)
    sketch = workspace.buffer("sketch", d_out, _PROBES).zero_()

    overlap = image_squares = inner = 0.0  # ⟨KΔ, Δ⟩ and ‖KΔ‖², scaled; ⟨V, Δ⟩
    for columns in blocks:
        block = delta.block(rows, columns, "block")
        # V is read once more, which costs little beside the products.
        inner += workspace.dot(v.block(rows, columns, "update", norms=False), block)
        sketch.addmm_(block, _probes(d_in, workspace.device)[columns])
        for first, last in workspace.strips(d_out, 2.0 * block.numel()):
            image = workspace.buffer("product", last - first, block.shape[1])
            torch.mm(gram[first:last], block, out=image)
            overlap += workspace.dot(block[first:last], image)
            image_squares += workspace.squares(image)
    rho = _cosine(overlap, math.sqrt(image_squares), math.sqrt(delta.squares))
    return _Found(rho, inner, gram_scale, powers, _fourth(sketch))


def _tall(v: Difference, delta: Difference, workspace: Workspace) -> _Found:
    """Goes through N = VᵀV and M = VᵀΔ, for d_out > d_in; by blocks of rows.

    M is made in panels of columns, so that beside a large N there is no second matrix of its size. Each panel
    is a pass over V, and up to d_in = 4096 there is but one.
    """
    d_out, d_in = v.shape
    blocks = workspace.blocks(d_out, d_in)
    gram = workspace.buffer("gram", d_in, d_in).zero_()
    gram_scale, powers = 1.0, (0.0, 0.0, 0.0)
    sketch = workspace.buffer("sketch", d_out, _PROBES).zero_()
    overlap = image_squares = inner = 0.0  # ‖M‖² and ⟨M, N M⟩, the latter scaled; ⟨V, Δ⟩
    for number, panel in enumerate(workspace.panels(d_in)):
        width = panel.stop - panel.start
        cross = workspace.buffer("cross", d_in, width).zero_()
        for rows in blocks:
            v_block = v.block(rows, slice(0, d_in), "block", norms=number == 0).T
            delta_block = delta.block(rows, panel, "update")
            inner += workspace.dot(v_block[panel].T, delta_block)
            sketch[rows].addmm_(delta_block, _probes(d_in, workspace.device)[panel])
            if number == 0:
                _add_lower_gram(gram, v_block, workspace)
            for first, last in workspace.strips(d_in, 2.0 * delta_block.numel()):
                cross[first:last].addmm_(v_block[first:last], delta_block)
        if number == 0:
            gram_scale = _power_of_two(v.squares)
            _complete_gram(gram, gram_scale, workspace)
            powers = _powers(gram, workspace)
        # Scaled against underflow of the products of small weights.
        cross_scale = _power_of_two(math.sqrt(v.squares) * math.sqrt(delta.squares))
        cross.mul_(cross_scale)
        overlap += workspace.squares(cross) / cross_scale**2
        for first, last in workspace.strips(d_in, 2.0 * d_in * width):
            product = workspace.buffer("product", last - first, width)
            torch.mm(gram[first:last], cross, out=product)
            image_squares += workspace.dot(cross[first:last], product) / cross_scale**2
    image = math.sqrt(max(image_squares, 0.0) / gram_scale)
    rho = _cosine(overlap, image, math.sqrt(delta.squares))
    return _Found(rho, inner, gram_scale, powers, _fourth(sketch))


def _norms_only(v: Difference, delta: Difference, workspace: Workspace) -> None:
    """Reads both differences for their norms."""
    d_out, d_in = v.shape
    for rows in workspace.blocks(d_out, d_in):
        v.block(rows, slice(0, d_in), "block")
        delta.block(rows, slice(0, d_in), "block")


def _add_lower_gram(gram: torch.Tensor, block: torch.Tensor, workspace: Workspace) -> None:
    """Adds block · blockᵀ to the lower part of the gram matrix, in strips of rows."""
    rows, width = block.shape
    for first, last in workspace.strips(rows, 2.0 * rows * width):
        gram[first:last, :last].addmm_(block[first:last], block[:last].T)


def _complete_gram(gram: torch.Tensor, scale: float, workspace: Workspace) -> None:
    """Scales the gram matrix, and mirrors its lower part into the upper one.

    Without the scale, fourth powers of small weights would leave float32's range.
    """
    size = gram.shape[0]
    strips = workspace.blocks(size, size)
    for rows in strips:
        gram[rows, : rows.stop].mul_(scale)
        gram[: rows.start, rows].copy_(gram[rows, : rows.start].T)
        corner = gram[rows, rows]
        upper = corner.tril(-1).T
        corner.tril_().add_(upper)


def _powers(gram: torch.Tensor, workspace: Workspace) -> tuple[float, float, float]:
    """The traces of a symmetric matrix' second, third and fourth power."""
    size = gram.shape[0]
    second = third = fourth = 0.0
    for first, last in workspace.strips(size, 2.0 * size * size):
        strip = gram[first:last]
        square = workspace.buffer("product", last - first, size)
        torch.mm(strip, gram, out=square)
        second += workspace.squares(strip)
        third += workspace.dot(square, strip)
        fourth += workspace.squares(square)
    return second, third, fourth


@lru_cache(maxsize=4)
def _probes(size: int, device: torch.device) -> torch.Tensor:
    """Normal columns that every module with this d_in shares; not to be written to."""
    return torch.randn(size, _PROBES, generator=torch.Generator().manual_seed(_SEED)).to(device)


def _fourth(sketch: torch.Tensor) -> float:
    """Estimates ‖ΔΔᵀ‖² from ΔΩ: off the diagonal, entries of its Gram matrix have that mean square."""
    columns = sketch.cpu().double()
    gram = columns.T @ columns
    count = gram.shape[0]
    return float((gram.square().sum() - gram.diagonal().square().sum()) / (count * (count - 1)))


def _power_of_two(size: float) -> float:
    """The power of two that brings a positive size to about 1, so that scaling by it rounds nothing."""
    if not (math.isfinite(size) and size > 0.0):
        return 1.0
    return math.ldexp(1.0, max(-126, min(126, -math.frexp(size)[1])))


def _cosine(overlap: float, image_norm: float, delta_norm: float) -> float:
    """The cosine of a Gram matrix's image, kept within 0 to 1 against rounding."""
    scale = image_norm * delta_norm
    if not scale > 0.0:
        return 0.0
    return max(0.0, min(1.0, overlap / scale))


def _why_undefined(
    v: Difference, delta: Difference, tensors: Mapping[str, Matrix], workspace: Workspace
) -> Undefined | None:
    """Says why there is no ρ, or returns None."""
    if not all(math.isfinite(squares) for squares in (v.minuend_squares, v.squares, delta.squares)):
        for tensor in tensors.values():
            if not tensor.is_finite(workspace.chunk_elements):
                return Undefined(f"non-finite values in {tensor.role} tensor {tensor.name}", nonfinite=True)
        name = tensors["finetuned"].name
        return Undefined(f"non-finite values in float32 arithmetic on tensor {name}", nonfinite=True)
    if v.squares == 0.0:
        return Undefined("V is zero")
    if delta.squares == 0.0:
        return Undefined("Δ is zero")
    return None
