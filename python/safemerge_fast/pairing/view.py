"""A matrix inside a stored tensor: a slice of experts, or every n-th column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["View"]


@dataclass(frozen=True, slots=True)
class View:
    """A matrix whose elements lie in a stored tensor, at start + row·strides[0] + column·strides[1].

    Attributes:
        start: Where its first element lies; all places are counted in elements of the stored tensor, row by row.
        shape: Its rows and columns.
        strides: How far apart rows and columns are.
    """

    start: int
    shape: tuple[int, int]
    strides: tuple[int, int]

    def to_plan(self) -> dict[str, Any]:
        """The view as the plan writes it."""
        return {"start": self.start, "shape": list(self.shape), "strides": list(self.strides)}

    def rows(self, first: int, count: int) -> View:
        """Some of its rows."""
        return View(self.start + first * self.strides[0], (count, self.shape[1]), self.strides)

    def columns(self, first: int, count: int) -> View:
        """Some of its columns."""
        return View(self.start + first * self.strides[1], (self.shape[0], count), self.strides)
