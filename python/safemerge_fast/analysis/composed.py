"""Reads a tensor that adapters change as if it were stored: composed in float32, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .blocks import Mapped, read_tensor

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.operand import LowRank, Magnitude, Operand, Rows, Term

__all__ = ["Composed"]


class Composed:
    """A role's 2-D tensor: the sum of weight · operand over its terms, with the interface of blocks.Mapped.

    Factors of products, replaced rows and norms are held in memory (float32); the matrices are not.
    """

    def __init__(self, models: Mapping[str, Model], role: str, name: str, terms: Sequence[Term]) -> None:
        """Opens what the terms name.

        Args:
            models: The models by role; sources of the operands.
            role: The role whose tensor this is, for messages.
            name: Its name, for messages.
            terms: What it is the sum of; all of one shape.
        """
        self.role = role
        self.name = name
        self._parts = [(_Part(models, term.operand), term.weight) for term in terms]
        self.shape = self._parts[0][0].shape
        self.dtype = "F32"

    def chunk(self, rows: slice, columns: slice) -> torch.Tensor:
        """Returns a part of the tensor, float32 on the CPU, in memory of its own."""
        total: torch.Tensor | None = None
        for part, weight in self._parts:
            values = part.chunk(rows, columns)
            if weight != 1.0:
                values.mul_(weight)
            total = values if total is None else total.add_(values)
        assert total is not None
        return total

    def is_finite(self, chunk_elements: int) -> bool:
        """Whether no value is NaN or infinite, in float32."""
        rows, columns = self.shape
        step = max(chunk_elements // columns, 1)
        for start in range(0, rows, step):
            chunk = self.chunk(slice(start, min(start + step, rows)), slice(0, columns))
            if not bool(torch.isfinite(chunk).all()):
                return False
            self.release_when_full()
        return True

    def release_when_full(self) -> None:
        """Gives the mapped pages back once enough of them may have been touched."""
        for part, _ in self._parts:
            part.stored.release_when_full()

    def release(self) -> None:
        """Gives the mapped pages back."""
        for part, _ in self._parts:
            part.stored.release()


class _Part:
    """One operand: rows are replaced, products added and norms set, in this order."""

    def __init__(self, models: Mapping[str, Model], operand: Operand) -> None:
        self.stored = Mapped(models[operand.source], operand.tensor)
        self.shape = self.stored.shape
        self._rows = None if operand.rows is None else _Replacement(models, operand.rows)
        self._products = [_Product(models, product) for product in operand.low_rank]
        self._norms = None if operand.magnitude is None else self._factors(models, operand.magnitude)

    def chunk(self, rows: slice, columns: slice) -> torch.Tensor:
        """A part of the operand in memory of its own."""
        values = self._sum(rows, columns)
        if self._norms is not None:
            factors, along_columns = self._norms
            values.mul_(factors[columns][None, :] if along_columns else factors[rows][:, None])
        return values

    def _sum(self, rows: slice, columns: slice) -> torch.Tensor:
        """A part of the operand before its norms are set."""
        values = self.stored.chunk(rows, columns).to(torch.float32, copy=True)
        if self._rows is not None:
            self._rows.put(values, rows, columns)
        for product in self._products:
            product.add(values, rows, columns)
        return values

    def _factors(self, models: Mapping[str, Model], magnitude: Magnitude) -> tuple[torch.Tensor, bool]:
        """By what each output feature is multiplied so that its norm becomes the magnitude (DoRA).

        Returns:
            The factors, and whether they apply to the columns of the stored matrix.
        """
        rows, columns = self.shape
        norms = torch.zeros(columns if magnitude.transpose else rows, dtype=torch.float64)
        step = max((256 << 10) // columns, 1)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            squares = self._sum(part, slice(0, columns)).double().square_()
            if magnitude.transpose:
                norms += squares.sum(dim=0)
            else:
                norms[part] = squares.sum(dim=1)
            self.stored.release_when_full()
        # A vector; (1, d_out) in adapters of early PEFT versions.
        wanted = read_tensor(models[magnitude.source], magnitude.tensor).double().reshape(-1)
        return (wanted / norms.sqrt()).float(), magnitude.transpose


class _Replacement:
    """Rows that take the place of stored ones."""

    def __init__(self, models: Mapping[str, Model], rows: Rows) -> None:
        self._values = read_tensor(models[rows.source], rows.tensor).float()
        order = sorted(range(len(rows.indices)), key=rows.indices.__getitem__)
        self._values = self._values[order]
        self._indices = torch.tensor([rows.indices[place] for place in order])

    def put(self, values: torch.Tensor, rows: slice, columns: slice) -> None:
        """Overwrites those of the rows that lie in a chunk."""
        first, last = (
            int(torch.searchsorted(self._indices, torch.tensor(edge))) for edge in (rows.start, rows.stop)
        )
        if first < last:
            values[self._indices[first:last] - rows.start] = self._values[first:last, columns]


class _Product:
    """scale·B·A, transposed if the matrix is stored as (in, out)."""

    def __init__(self, models: Mapping[str, Model], product: LowRank) -> None:
        a = read_tensor(models[product.source], product.a).float()
        b = read_tensor(models[product.source], product.b).float()
        # Both as (stored rows, r) and (r, stored columns).
        self._left, self._right = (a.T.contiguous(), b.T) if product.transpose else (b, a)
        self._scale = product.scale

    def add(self, values: torch.Tensor, rows: slice, columns: slice) -> None:
        """Adds the product's part to a chunk."""
        values.addmm_(self._left[rows], self._right[:, columns], alpha=self._scale)
