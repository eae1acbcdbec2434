"""Output tensors that hold many modules: every module is made by an operation of its own, those alike together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..decision import Decision
from ..pairing.module import Module, slices_of
from ..pairing.row import Row
from ..pairing.view import View
from .blend import Composer
from .methods import known_methods
from .operation import Operation

__all__ = ["Piece", "Pieces", "compose_row", "decided_modules"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an output tensor, and what it is made of.

    Attributes:
        view: Which elements.
        operation: What makes them; an operand without a view that is shaped like the tensor is meant with this one.
    """

    view: View
    operation: Operation


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces that cover an output tensor, each element once."""

    pieces: tuple[Piece, ...]

    @property
    def is_copy(self) -> bool:
        """Whether the tensor is one input tensor as it is: never."""
        return False

    def describe(self) -> str:
        """What the pieces are, in one line."""
        kinds = dict.fromkeys(piece.operation.describe() for piece in self.pieces)
        return f"by expert: {'; '.join(kinds)}"


def compose_row(
    blend: Composer, row: Row, decisions: Mapping[str, Decision] | Callable[[Row], Decision]
) -> Operation | Pieces:
    """Says what a row's tensor is made of.

    Args:
        blend: What merged modules are made of, and where the others come from.
        row: The row.
        decisions: What decide returns; or what says it of a whole row.

    Raises:
        PairingError: What Blend.compose raises.
        AdapterError: Likewise.
    """
    slices = row.slices
    if slices is None:
        return blend.compose(row, decisions[row.name] if isinstance(decisions, Mapping) else decisions(row))
    chosen = decided_modules(row, decisions)
    if not any(decision.merge for _, decision in chosen) and row.is_plain(blend.kept):
        return blend.compose(row, chosen[0][1])
    parts = len(slices.stack.parts)
    made = [Piece(_view(module), blend.compose(module, decision)) for module, decision in chosen]
    experts = (made[start : start + parts] for start in range(0, len(made), parts))
    spans = [span for number, expert in enumerate(experts) for span in _of_expert(expert, number, row)]
    pieces = tuple(_joined(spans, row.shape[-1]))
    if len(pieces) == 1 and pieces[0].view.size == math.prod(row.shape) and _joins(pieces[0].operation):
        return pieces[0].operation
    return Pieces(pieces)


def decided_modules(
    row: Row, decisions: Mapping[str, Decision] | Callable[[Row], Decision]
) -> list[tuple[Module, Decision]]:
    """The matrices that a row consists of, with what was decided of each: of one, or of all of them.

    Args:
        row: The row.
        decisions: As for compose_row.
    """
    if isinstance(decisions, Mapping) and row.analysed:
        return [(module, decisions[module.name]) for module in slices_of(row)]
    decision = decisions[row.name] if isinstance(decisions, Mapping) else decisions(row)
    return [(module, decision) for module in slices_of(row)]


def _view(module: Module) -> View:
    assert module.view is not None
    return module.view


def _of_expert(parts: list[Piece], number: int, row: Row) -> list[Piece]:
    """One expert's pieces: one for all of it where its parts are made alike."""
    first = parts[0].operation
    if len(parts) == 1 or not _joins(first) or any(part.operation != first for part in parts[1:]):
        return parts
    assert row.slices is not None
    size = row.slices.stack.size
    return [Piece(_span(number * size, size, row.shape[-1]), first)]


def _joined(pieces: Iterable[Piece], columns: int) -> Iterator[Piece]:
    """Makes one piece of neighbours that are made alike."""
    last: Piece | None = None
    for piece in pieces:
        if (
            last is not None
            and last.operation == piece.operation
            and _joins(piece.operation)
            and last.view.is_contiguous
            and piece.view.is_contiguous
            and last.view.start + last.view.size == piece.view.start
        ):
            last = Piece(_span(last.view.start, last.view.size + piece.view.size, columns), piece.operation)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _span(start: int, size: int, columns: int) -> View:
    return View(start, (size // columns, columns), (columns, 1))


def _joins(operation: Operation) -> bool:
    """Whether the operation makes of two modules together what it makes of each.

    A sum does, element by element. A method that looks at a whole matrix, to vote or to thin it out, does not; nor does
    one whose operands are modules of other tensors.
    """
    if any(operand.view is not None or not operand.is_plain for operand in operation.operands):
        return False
    return operation.method is None or known_methods()[operation.method].sums
