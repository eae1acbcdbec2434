"""What an adapter makes of the experts of one stacked tensor (target_parameters), matrix by matrix."""

from __future__ import annotations

from dataclasses import dataclass

from .expert_updates import StackedUpdate
from .modules import PROJECTION, module_type
from .operand import LowRank, Operand, Term
from .stack import Part, Slices, Stack
from .view import View

__all__ = ["AdaptedStack", "slices_of"]


@dataclass(frozen=True, slots=True)
class AdaptedStack:
    """The experts of a tensor, each with its own low-rank update.

    Attributes:
        role: The adapter's.
        model_role: The role of the checkpoint that it adapts.
        tensor: The stacked tensor there.
        stack: How the experts lie in it.
        update: The update of all of them.
    """

    role: str
    model_role: str
    tensor: str
    stack: Stack
    update: StackedUpdate

    def terms(self, expert: int, part: Part, *, transposed: bool) -> tuple[Term, ...]:
        """The matrix and its update, cut out of the product of the whole expert.

        Args:
            expert: The expert's number.
            part: Which of its matrices.
            transposed: Whether it is wanted as (in, out).
        """
        width = self.update.stored.shape[2]
        (row, column), (rows, columns) = divmod(part.view.start, width), part.view.shape
        row_step, column_step = part.view.strides[0] // width, part.view.strides[1]
        a, b = self.update.views(expert)
        if self.update.transposed:
            a, b = a.columns(row, rows, row_step), b.rows(column, columns, column_step)
        else:
            a, b = a.columns(column, columns, column_step), b.rows(row, rows, row_step)
        view, turned = self.stack.view(expert, part), self.update.transposed
        if transposed != self.stack.transposed:
            view, turned = view.turned(), not turned
        factors, scale, rank = self.update.factors, self.update.scale, self.update.rank
        product = LowRank(self.role, factors.a, factors.b, scale, rank, turned, a, b)
        return (Term(Operand(self.model_role, self.tensor, low_rank=(product,), view=view)),)


def slices_of(update: StackedUpdate) -> Slices:
    """The experts of a stacked tensor as an update of it takes them: each is one matrix."""
    (tensor,) = update.stored.tensors
    experts, rows, columns = update.stored.shape
    prefix, _, leaf = tensor.removesuffix(".weight").rpartition(".")
    part = Part(leaf, module_type(f"{prefix}.0.{leaf}", PROJECTION), View(0, (rows, columns), (columns, 1)))
    return Slices(prefix, Stack(experts, rows * columns, (part,), update.transposed))
