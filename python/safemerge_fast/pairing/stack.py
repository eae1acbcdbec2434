"""How the matrices of many experts lie in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .operand import Term
from .view import View

__all__ = ["Elsewhere", "Part", "Slices", "Stack"]


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of matrix of a stacked tensor; each expert has one of it.

    Attributes:
        name: What follows the expert's number where each expert has tensors of its own: "gate_proj.weight"; or
            "gate_up_proj" for both together, where it is not known which is which.
        module_type: The type that such matrices are counted under.
        view: The first expert's; its axes are those of the stored tensor.
    """

    name: str
    module_type: str
    view: View


@dataclass(frozen=True, slots=True)
class Stack:
    """A layout of experts in one tensor.

    Attributes:
        experts: How many there are.
        size: Elements of one expert, all its parts together; experts follow each other.
        parts: What each expert consists of, in the order of the bytes.
        transposed: Whether the matrices are stored as (in, out).
    """

    experts: int
    size: int
    parts: tuple[Part, ...]
    transposed: bool

    def view(self, expert: int, part: Part) -> View:
        """Where one expert's matrix lies in the tensor, rows and columns as they are stored."""
        first = part.view
        return View(first.start + expert * self.size, first.shape, first.strides)

    def part(self, name: str) -> Part | None:
        """The part of that name, or None."""
        return next((part for part in self.parts if part.name == name), None)

    def __iter__(self) -> Iterator[tuple[int, Part]]:
        for expert in range(self.experts):
            for part in self.parts:
                yield expert, part


class Elsewhere(Protocol):
    """How a role has the experts of a tensor that it does not store in the same layout."""

    def terms(self, expert: int, part: Part, *, transposed: bool) -> tuple[Term, ...]:
        """What one expert's matrix is the sum of there.

        Args:
            expert: The expert's number.
            part: Which matrix.
            transposed: Whether it is wanted as (in, out).
        """


_NOWHERE: Mapping[str, Elsewhere] = {}


@dataclass(frozen=True, slots=True)
class Slices:
    """The modules of a tensor that holds many experts.

    Attributes:
        prefix: What their names begin with, "model.layers.0.mlp.experts".
        stack: Their layout in the output tensor.
        elsewhere: Roles that have the same matrices in another layout.
    """

    prefix: str
    stack: Stack
    elsewhere: Mapping[str, Elsewhere] = field(default_factory=lambda: _NOWHERE)

    def name(self, expert: int, part: Part) -> str:
        """The name of one expert's matrix, the same in all layouts."""
        return f"{self.prefix}.{expert}.{part.name}"
