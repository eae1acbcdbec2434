"""What an output tensor is made of: input tensors, and what adapters do to them on the way.

The engine makes an operand tile by tile, so that no merged copy of it ever exists; see the plan's format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .view import View

__all__ = ["OWN_NAME", "LowRank", "Magnitude", "Operand", "Rows", "Term"]

OWN_NAME = ""
"""In place of a tensor's name: the name of the output tensor that is made, so that many can share an operand."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The product `scale·B·A`, which is added to a matrix (LoRA).

    Attributes:
        source: Role whose file holds the factors.
        a: Name of A there, shape (rank, in).
        b: Name of B there, shape (out, rank).
        scale: Factor of the product.
        rank: Rows of A and columns of B.
        transpose: Whether the matrix is stored as (in, out), so that the transposed product is added.
        a_view: The part of the stored A that is meant, or None for all of it.
        b_view: The part of the stored B, likewise.
    """

    source: str
    a: str
    b: str
    scale: float
    rank: int
    transpose: bool
    a_view: View | None = None
    b_view: View | None = None

    def to_plan(self) -> dict[str, Any]:
        """The product as the plan writes it."""
        return {
            "a": _reference(self.source, self.a, self.a_view),
            "b": _reference(self.source, self.b, self.b_view),
            "scale": self.scale,
            "transpose": self.transpose,
        }


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a matrix that come from another one (PEFT's trainable tokens).

    Attributes:
        source: Role whose file holds the other matrix.
        tensor: Its name there; it has one row for each index.
        indices: Which rows are replaced, each once.
    """

    source: str
    tensor: str
    indices: tuple[int, ...]

    def to_plan(self) -> dict[str, Any]:
        """The rows as the plan writes them."""
        return {"source": self.source, "tensor": self.tensor, "indices": list(self.indices)}


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Norms that a matrix is rescaled to, one for each output feature (DoRA).

    Attributes:
        source: Role whose file holds the norms.
        tensor: Their name there.
        transpose: Whether the output features are the columns of the stored matrix.
    """

    source: str
    tensor: str
    transpose: bool

    def to_plan(self) -> dict[str, Any]:
        """The norms as the plan writes them."""
        return {"source": self.source, "tensor": self.tensor, "transpose": self.transpose}


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor, and the changes that an adapter makes to it in the order of the fields.

    Attributes:
        source: Role whose file holds the tensor.
        tensor: Its name there; OWN_NAME is the output tensor's.
        rows: Rows that are replaced first, or None.
        low_rank: Products that are added then.
        magnitude: Norms that the sum gets at last, or None.
        view: The matrix in the tensor that is meant, or None for all of it.
    """

    source: str
    tensor: str
    rows: Rows | None = None
    low_rank: tuple[LowRank, ...] = ()
    magnitude: Magnitude | None = None
    view: View | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is taken as it is stored."""
        return self.view is None and self.rows is None and not self.low_rank and self.magnitude is None

    @property
    def sources(self) -> tuple[str, ...]:
        """The roles whose files it reads."""
        parts = (self.rows, *self.low_rank, self.magnitude)
        return (self.source, *(part.source for part in parts if part is not None))

    def to_plan(self) -> dict[str, Any]:
        """The operand as the plan writes it; what is not there is left out."""
        document: dict[str, Any] = {"source": self.source}
        if self.tensor != OWN_NAME:
            document["tensor"] = self.tensor
        if self.view is not None:
            document["view"] = self.view.to_plan()
        if self.rows is not None:
            document["rows"] = self.rows.to_plan()
        if self.low_rank:
            document["low_rank"] = [term.to_plan() for term in self.low_rank]
        if self.magnitude is not None:
            document["magnitude"] = self.magnitude.to_plan()
        return document


def _reference(source: str, tensor: str, view: View | None) -> dict[str, Any]:
    """A tensor, or a view of it, as the plan writes it."""
    document: dict[str, Any] = {"source": source, "tensor": tensor}
    if view is not None:
        document["view"] = view.to_plan()
    return document


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a role's tensor, which is the sum of weight · operand over its terms."""

    operand: Operand
    weight: float = 1.0
