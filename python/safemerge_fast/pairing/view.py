"""A part of a tensor: where its elements lie among those of the whole, in row-major order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["View"]


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a stored tensor, counted in elements from its first one.

    Attributes:
        start: Where the first one lies.
        shape: How many there are along each axis of the part.
        strides: How far apart neighbours along each axis lie.
    """

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other without a gap, in the order of the axes."""
        step = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != step:
                return False
            step *= extent
        return True

    @property
    def size(self) -> int:
        """How many elements there are."""
        return math.prod(self.shape)

    def turned(self) -> View:
        """The same elements with the axes in the other order: the transposed matrix."""
        return View(self.start, self.shape[::-1], self.strides[::-1])

    def rows(self, first: int, count: int, step: int = 1) -> View:
        """Some rows of a matrix, every so manieth."""
        return View(
            self.start + first * self.strides[0],
            (count, *self.shape[1:]),
            (self.strides[0] * step, *self.strides[1:]),
        )

    def columns(self, first: int, count: int, step: int = 1) -> View:
        """Some columns of a matrix, every so manieth."""
        return self.turned().rows(first, count, step).turned()

    def to_plan(self) -> dict[str, Any]:
        """The view as the plan writes it."""
        return {"start": self.start, "shape": list(self.shape), "strides": list(self.strides)}
