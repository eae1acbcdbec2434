"""Products of a difference of two weights with thin matrices, by blocks that fit the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .blocks import Difference, Workspace

__all__ = ["HELD", "Products", "power_of_two"]

HELD = 64 << 20
"""Elements of a difference that are kept in memory; a larger one is read again for each product."""


class Products:
    """Products with V and its transpose; V is read once if it is kept, else once for each product.

    Attributes:
        is_held: Whether it is kept.
    """

    def __init__(self, difference: Difference, *, transposed: bool, workspace: Workspace) -> None:
        """Reads nothing yet.

        Args:
            difference: V.
            transposed: Whether it is stored as (in, out).
            workspace: Buffers and the device.
        """
        self._difference = difference
        self._transposed = transposed
        self._workspace = workspace
        self._read = False
        self._held: torch.Tensor | None = None
        self.is_held = math.prod(difference.shape) <= HELD

    def whole(self) -> torch.Tensor:
        """V, for one that is kept."""
        if self._held is None:
            d_out, d_in = self._difference.shape
            self._held = self._difference.block(slice(0, d_out), slice(0, d_in), "held")
        return self._held

    def image(self, columns: torch.Tensor) -> torch.Tensor:
        """V·X, float32."""
        columns = columns.float().to(self._workspace.device)
        result = torch.zeros(self._difference.shape[0], columns.shape[1], device=columns.device)
        for rows, inner, block in self._blocks():
            result[rows].addmm_(block, columns[inner])
        return result

    def returned(self, columns: torch.Tensor) -> torch.Tensor:
        """Vᵀ·Y, float32."""
        columns = columns.float().to(self._workspace.device)
        result = torch.zeros(self._difference.shape[1], columns.shape[1], device=columns.device)
        for rows, inner, block in self._blocks():
            result[inner].addmm_(block.T, columns[rows])
        return result

    def _blocks(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Blocks that cover V, with their rows and columns; as it is stored, so that reading is in order."""
        d_out, d_in = self._difference.shape
        every_row, every_column = slice(0, d_out), slice(0, d_in)
        if self.is_held:
            yield every_row, every_column, self.whole()
            return
        extent, across = (d_in, d_out) if self._transposed else (d_out, d_in)
        for part in self._workspace.blocks(extent, across):
            rows, columns = (every_row, part) if self._transposed else (part, every_column)
            yield rows, columns, self._difference.block(rows, columns, "block", norms=not self._read)
        self._read = True


def power_of_two(size: float) -> float:
    """The power of two that brings a positive size to about 1, so that scaling by it rounds nothing."""
    if not (math.isfinite(size) and size > 0.0):
        return 1.0
    return math.ldexp(1.0, max(-126, min(126, -math.frexp(size)[1])))
