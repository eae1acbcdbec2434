"""Computes ρ of small modules exactly, in float64 by numpy: there the products cost less than a sketch's statistics.

The formulas are those of cosine.py, through the smaller Gram matrix of V. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import _engine
from .chance import chance_spread
from .opened import OpenedModule
from .rounding import v_rounding
from .score import Score, signed_cosine

__all__ = ["score_small"]

_Matrix = NDArray[np.float64]

_BLOCK = 1 << 18
"""Elements that are read at a time."""


def score_small(opened: OpenedModule) -> Score:
    """Scores a module one of whose sides is short.

    Args:
        opened: The module. Memory is a few Gram matrices of the shorter side and blocks of _BLOCK elements.

    Returns:
        The score, exact.
    """
    d_out, d_in = opened.module.shape
    # NaN and infinity are told of below, by the sums.
    with np.errstate(all="ignore"):
        sums = _wide(opened) if d_out <= d_in else _tall(opened)
    undefined = opened.undefined(sums.v, sums.delta, sums.weight)
    opened.release()
    v_norm, delta_norm, weight_norm = (math.sqrt(x) for x in (sums.v, sums.delta, sums.weight))
    rounding = v_rounding(opened.dtypes["base"], opened.dtypes["aligned"], weight_norm, v_norm)
    if undefined is not None:
        return Score(
            None,
            None,
            v_norm,
            delta_norm,
            weight_norm,
            rounding,
            undefined.reason,
            nonfinite=undefined.nonfinite,
        )
    rho_null, null_sd = sums.chance(d_out)
    return Score(
        rho=sums.rho,
        rho_null=rho_null,
        v_norm=v_norm,
        delta_norm=delta_norm,
        weight_norm=weight_norm,
        v_rounding=rounding,
        undefined=None,
        cos_v_delta=signed_cosine(sums.inner, v_norm, delta_norm),
        null_sd=null_sd,
    )


@dataclass(slots=True)
class _Sums:
    """What is summed over a module.

    Attributes:
        v: ‖V‖².
        delta: ‖Δ‖².
        weight: ‖W_aligned‖².
        inner: ⟨V, Δ⟩.
        overlap: ‖VᵀΔ‖².
        image: ‖V VᵀΔ‖².
        gram: V's Gram matrix of the shorter side.
        delta_gram: Δ's.
    """

    gram: _Matrix
    delta_gram: _Matrix
    v: float = 0.0
    delta: float = 0.0
    weight: float = 0.0
    inner: float = 0.0
    overlap: float = 0.0
    image: float = 0.0

    @property
    def rho(self) -> float:
        """The cosine, kept within 0 to 1 against rounding; 0 where V VᵀΔ vanishes."""
        scale = math.sqrt(self.image * self.delta)
        return min(1.0, self.overlap / scale) if scale > 0.0 else 0.0

    def chance(self, d_out: int) -> tuple[float | None, float | None]:
        """ρ_null, and the standard deviation of log ρ over rotations of Δ; None where undefined."""
        square = self.gram @ self.gram
        first, second = float(np.trace(self.gram)), float(np.trace(square))
        if not second > 0.0:
            return None, None
        third, fourth = float(np.vdot(square, self.gram)), float(np.vdot(square, square))
        return first / math.sqrt(d_out * second), chance_spread(
            (first, second, third, fourth),
            d_out,
            float(np.vdot(self.delta_gram, self.delta_gram)) / self.delta**2,
        )

    def add(self, block: _Block) -> None:
        """Adds a block's sums."""
        self.v += float(np.vdot(block.v, block.v))
        self.delta += float(np.vdot(block.delta, block.delta))
        self.inner += float(np.vdot(block.v, block.delta))
        self.weight += block.weight


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of V and Δ as they are stored, in float64, and their share of ‖W_aligned‖²."""

    v: _Matrix
    delta: _Matrix
    weight: float


def _wide(opened: OpenedModule) -> _Sums:
    """Sums of a module with d_out <= d_in, through K = V Vᵀ: two passes."""
    size = opened.module.shape[0]
    sums = _Sums(np.zeros((size, size)), np.zeros((size, size)))
    # Columns of V and Δ, whichever way they are stored.
    for block in _blocks(opened, across=not opened.module.transposed):
        sums.add(block)
        sums.gram += block.v @ block.v.T
        sums.delta_gram += block.delta @ block.delta.T
    if not math.isfinite(sums.v + sums.delta):
        return sums
    for block in _blocks(opened, across=not opened.module.transposed):
        image = sums.gram @ block.delta
        sums.overlap += float(np.vdot(block.delta, image))
        sums.image += float(np.vdot(image, image))
    return sums


def _tall(opened: OpenedModule) -> _Sums:
    """Sums of a module with d_out > d_in, through VᵀV and VᵀΔ: one pass."""
    size = opened.module.shape[1]
    sums = _Sums(np.zeros((size, size)), np.zeros((size, size)))
    cross = np.zeros((size, size))
    for block in _blocks(opened, across=opened.module.transposed):
        sums.add(block)
        sums.gram += block.v.T @ block.v
        sums.delta_gram += block.delta.T @ block.delta
        cross += block.v.T @ block.delta
    sums.overlap = float(np.vdot(cross, cross))
    sums.image = max(float(np.vdot(cross, sums.gram @ cross)), 0.0)
    return sums


def _blocks(opened: OpenedModule, *, across: bool) -> Iterator[_Block]:
    """Cuts a module in blocks along its longer side.

    Args:
        opened: The module.
        across: Whether the blocks are columns of what is stored, not rows.
    """
    rows, columns = opened.module.stored
    step = max(1, _BLOCK // (rows if across else columns))
    for start in range(0, columns if across else rows, step):
        stop = min(start + step, columns if across else rows)
        yield _read(opened, (0, rows) if across else (start, stop), (start, stop) if across else (0, columns))


def _read(opened: OpenedModule, rows: tuple[int, int], columns: tuple[int, int]) -> _Block:
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    memory = _engine.Block(shape[0] * shape[1])

    def difference(minuend: _engine.Matrix, subtrahend: _engine.Matrix) -> tuple[_Matrix, float]:
        sums = memory.read_difference(minuend, subtrahend, rows, columns, minuend_squares=True)
        found = np.asarray(memory).astype(np.float64).reshape(shape)
        return (found.T if opened.module.transposed else found), sums[1]

    v, weight = difference(opened.roles["aligned"], opened.roles["base"])
    delta, _ = difference(opened.roles["finetuned"], opened.reference)
    return _Block(v, delta, weight)
