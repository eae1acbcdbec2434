"""What an adapter makes of fused experts: one low-rank product for each expert's matrix.

PEFT stacks the products of all experts into two factors. With r rows an expert, E experts and (out, in) matrices, A is
(E·r, in), an expert's rows side by side; B is (out, r·E), an expert's columns E apart. What is updated is one tensor of
all experts, or, where the checkpoint has one for each, theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint.adapter_parameters import Factors
from ..checkpoint.model import ExpertLayout
from .operand import LowRank, Operand, Term
from .view import View

__all__ = ["ExpertPiece", "Place", "StackedUpdate", "Stored"]


@dataclass(frozen=True, slots=True)
class Stored:
    """How a parameter of several experts lies in a checkpoint.

    Attributes:
        names: The tensor's name; or the names of each expert's parts, part by part, whose rows follow each other.
        shape: (experts, rows, columns) of the whole.
        rows: The rows of each part; empty where there is one tensor of all experts.
        is_matrix: Whether it is one tensor of two dimensions.
    """

    names: tuple[tuple[str, ...], ...]
    shape: tuple[int, int, int]
    rows: tuple[int, ...] = ()
    is_matrix: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """All names."""
        return tuple(name for part in self.names for name in part)


@dataclass(frozen=True, slots=True)
class ExpertPiece:
    """A matrix of one expert, with its update.

    Attributes:
        expert: Which one.
        tensor: The tensor that holds it.
        view: Where it lies there, or None if it is all of it.
        term: What it becomes.
    """

    expert: int
    tensor: str
    view: View | None
    term: Term


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of which expert's product two views of the stored factors mean.

    Attributes:
        expert: The expert.
        outputs: Which rows of its B.
        inputs: Which columns of its A.
    """

    expert: int
    outputs: slice
    inputs: slice


@dataclass(frozen=True, slots=True)
class StackedUpdate:
    """The update of one parameter.

    Attributes:
        parameter: The parameter's name in the model, as the adapter has it.
        factors: The keys of A and B.
        rank: The rank of each expert's product.
        scale: The factor s of s·B·A.
        transposed: Whether an expert's matrix is stored as (in, out).
        inputs: Columns of A.
        outputs: Rows of B.
        is_swapped: Whether PEFT before 0.19 made it, which calls inputs what PEFT calls outputs now.
        layout: How the columns of B are ordered.
        stored: Where the parameter is.
    """

    parameter: str
    factors: Factors
    rank: int
    scale: float
    transposed: bool
    inputs: int
    outputs: int
    is_swapped: bool
    layout: ExpertLayout
    stored: Stored

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return self.stored.shape[0]

    def views(self, expert: int) -> tuple[View, View]:
        """One expert's A, (rank, in), and B, (out, rank), in the stored factors."""
        rank, width = self.rank, self.rank * self.experts
        a = View(expert * rank * self.inputs, (rank, self.inputs), (self.inputs, 1))
        if self.layout == "peft":
            return a, View(expert, (self.outputs, rank), (width, self.experts))
        return a, View(expert * rank, (self.outputs, rank), (width, 1))

    def place(self, a: View | None, b: View | None) -> Place:
        """What parts of the factors mean that pieces gives, or parts of these.

        Args:
            a: The part of the stored A; None for all of it.
            b: The part of the stored B, likewise.
        """
        if a is None or b is None:
            return Place(0, slice(0, self.outputs, 1), slice(0, self.inputs, 1))
        expert, first = divmod(a.start, self.rank * self.inputs)
        width = self.rank * self.experts
        return Place(
            expert,
            _slice(b.start // width, b.shape[0], b.strides[0] // width),
            _slice(first, a.shape[1], a.strides[1]),
        )

    def pieces(self, role: str, model_role: str) -> Iterator[ExpertPiece]:
        """Every expert's matrices with their updates.

        Args:
            role: The adapter's.
            model_role: The checkpoint's.
        """
        stored = self.stored
        if stored.is_matrix:
            yield self._piece(role, model_role, 0, stored.names[0][0], None, (None, None))
            return
        _, height, width = stored.shape
        for expert in range(self.experts):
            a, b = self.views(expert)
            if not stored.rows:
                view = View(expert * height * width, (height, width), (width, 1))
                yield self._piece(role, model_role, expert, stored.names[0][0], view, (a, b))
                continue
            first = 0
            for names, count in zip(stored.names, stored.rows, strict=True):
                # Rows of the whole are rows of B·A, or of its transpose.
                part = (a.columns(first, count), b) if self.transposed else (a, b.rows(first, count))
                yield self._piece(role, model_role, expert, names[expert], None, part)
                first += count

    def _piece(
        self,
        role: str,
        model_role: str,
        expert: int,
        tensor: str,
        view: View | None,
        parts: tuple[View | None, View | None],
    ) -> ExpertPiece:
        product = LowRank(
            role, self.factors.a, self.factors.b, self.scale, self.rank, self.transposed, *parts
        )
        return ExpertPiece(
            expert, tensor, view, Term(Operand(model_role, tensor, low_rank=(product,), view=view))
        )


def _slice(first: int, count: int, step: int) -> slice:
    return slice(first, first + (count - 1) * step + 1, step)
