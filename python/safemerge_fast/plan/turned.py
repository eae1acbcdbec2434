"""Stacked matrices that are stored the other way round where they are quantised: gpt-oss' experts.

Their blocks are those of (experts, out, in), but the tensor that a loader wants in their place is (experts, in, out).
"""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec

from ..errors import PlanError
from ..pairing.operand import Operand
from ..pairing.row import Row
from ..pairing.view import View
from .operation import Mask, Operation
from .pieces import Piece, Pieces

__all__ = ["turned_operation", "turned_row", "turns"]


def turns(row: Row) -> bool:
    """Whether a row's tensor is stored the other way round in the output."""
    encoded = row.encoded
    return encoded is not None and not encoded.kept and encoded.is_block_format and len(row.shape) == 3


def turned_row(row: Row) -> Row:
    """The row with the shape that its tensor has in the output."""
    experts, rows, columns = row.shape
    return msgspec.structs.replace(row, shape=(experts, columns, rows))


def turned_operation(made: Operation | Pieces, row: Row) -> Operation | Pieces:
    """What makes the turned tensor.

    Args:
        made: What makes the tensor as it is quantised.
        row: Its row, with the shape that it is quantised in.

    Raises:
        PlanError: A piece of it is neither within one expert nor made of whole ones.
    """
    experts, rows, columns = row.shape
    if isinstance(made, Operation):
        return _turned(made, _whole(0, experts, rows, columns))
    return Pieces(tuple(_piece(piece, row) for piece in made.pieces))


def _whole(first: int, count: int, rows: int, columns: int) -> View:
    """Some whole experts, turned."""
    return View(first * rows * columns, (count, columns, rows), (rows * columns, 1, columns))


def _piece(piece: Piece, row: Row) -> Piece:
    _, rows, columns = row.shape
    view, size = piece.view, rows * columns
    # Operands of a piece of one expert may be views of other tensors: matrices, as it is one then.
    if view.size > size and view.is_contiguous and view.start % size == 0 and view.size % size == 0:
        count = view.size // size
        into = View(view.start, (count, columns, rows), (size, rows, 1))
        return Piece(into, _turned(piece.operation, _whole(view.start // size, count, rows, columns)))
    expert, place = divmod(view.start, size)
    reach = place + sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
    if len(view.shape) != 2 or reach >= size or view.strides[0] % columns or view.strides[1] >= columns:
        raise PlanError(
            f"{row.name} cannot be dequantised in part: {view} is no part of one expert; pass --encode keep"
        )
    into = View(
        expert * size + place % columns * rows + place // columns,
        view.shape[::-1],
        (view.strides[1] * rows, view.strides[0] // columns),
    )
    assert math.prod(into.shape) == view.size
    return Piece(into, _turned(piece.operation, view.turned()))


def _turned(operation: Operation, view: View) -> Operation:
    """The operation of turned matrices; `view` is where those lie in a tensor that is shaped like the quantised one."""

    def turn(operand: Operand) -> Operand:
        products = tuple(replace(product, transpose=not product.transpose) for product in operand.low_rank)
        return replace(
            operand, low_rank=products, view=view if operand.view is None else operand.view.turned()
        )

    return replace(
        operation,
        arguments=tuple(
            replace(argument, operand=turn(argument.operand)) for argument in operation.arguments
        ),
        base=None if operation.base is None else turn(operation.base),
        mask=None if operation.mask is None else Mask(turn(operation.mask.shares), turn(operation.mask.kept)),
    )
