"""Stage 5, plan: rows and operations become plain data that says what every output tensor is made of.

The engine validates the data again and executes it; see `_engine.Plan`. Nothing here opens or writes a file.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from ..checkpoint.model import Model
from ..pairing.operand import OWN_NAME, Operand
from ..pairing.row import Row
from ..pairing.view import View
from .layout import Shard, output_dtype, tensor_bytes
from .operation import Operation, copy_of
from .pieces import Piece, Pieces

__all__ = ["PLAN_FILE", "Plan", "build_plan", "is_own"]

VERSION = 2
"""Version of the plan's format."""

_PIECE = 1 << 20

PLAN_FILE = "safemerge_plan.json"
"""Name of the plan within the output that it was executed into."""


class _PlannedPiece(msgspec.Struct):
    """A piece of an output tensor as the plan writes it."""

    view: View
    operation: int


class _Encode(msgspec.Struct):
    """As which input a tensor is stored, and which part of that it is."""

    source: str
    tensor: str
    part: str


class _PlannedTensor(msgspec.Struct, omit_defaults=True):
    """One output tensor as the plan writes it; what can be derived is left out."""

    name: str
    operation: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    pieces: list[_PlannedPiece] | None = None
    encode: _Encode | None = None


_encoder = msgspec.json.Encoder()

_IN_PIECES = 0xFFFF_FFFF
"""In place of an operation's number: the tensor is made in pieces."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every tensor of an output is made of.

    Attributes:
        models: The models that operands name, by role.
        anchor: The role whose tensors the rows describe; a tensor of its dtype and shape need not say them.
        layout: The output files.
        dtype: Output dtype of float tensors, as layout.output_dtype takes it.
        operations: The operations, each once.
        numbers: The operation of each tensor, by the file's and the row's order.
        parts: By name, the parts of tensors that are made in pieces, and the operation of each.
        copies: By role, the operation that copies a tensor of that name from it; of roles that have quantised tensors.
        beside: By role, the directory within the output that holds the model's files once the output is published.
    """

    models: Mapping[str, Model]
    anchor: str
    layout: tuple[Shard, ...]
    dtype: str
    operations: tuple[Operation, ...]
    numbers: tuple[Sequence[int], ...]
    parts: Mapping[str, Sequence[tuple[View, int]]] = field(default_factory=dict)
    copies: Mapping[str, int] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    _sizes: list[int] = field(default_factory=list, compare=False, repr=False)

    @property
    def files(self) -> list[str]:
        """Names of the output files."""
        return [shard.file for shard in self.layout]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        if not self._sizes:
            self._sizes.append(
                sum(tensor_bytes(row, self.dtype) for shard in self.layout for row in shard.rows)
            )
        return self._sizes[0]

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return sum(len(shard.rows) for shard in self.layout)

    def tensors(
        self, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Shard, Row, Operation | Pieces]]:
        """Output tensors with their files and operations, in the order of the files.

        Args:
            start: How many to leave out at the beginning.
            stop: Which one to stop before; None goes on to the end.
        """
        passed = 0
        for shard, numbers in zip(self.layout, self.numbers, strict=True):
            first = max(start - passed, 0)
            last = len(numbers) if stop is None else min(stop - passed, len(numbers))
            for place in range(first, last):
                yield shard, shard.rows[place], self._operation(shard.rows[place], numbers[place])
            passed += len(numbers)

    def _operation(self, row: Row, number: int) -> Operation | Pieces:
        if number != _IN_PIECES:
            return self.operations[number]
        return Pieces(tuple(Piece(view, self.operations[part]) for view, part in self.parts[row.name]))

    def to_json(self) -> bytes:
        """The plan as `_engine.Plan` takes it."""
        return b"".join(self.pieces())

    def pieces(self, *, published: bool = False) -> Iterator[bytes]:
        """The same, piece by piece and with a line per tensor.

        Args:
            published: Whether it is what the output carries, which names the files in it from there.
        """
        yield b'{"version": %d,\n"sources": %b,\n"operations": [\n' % (
            VERSION,
            _encoder.encode(self._sources(published=published)),
        )
        yield b",\n".join(_encoder.encode(operation.to_plan()) for operation in self.operations)
        yield b'],\n"shards": ['
        for place, (shard, numbers) in enumerate(zip(self.layout, self.numbers, strict=True)):
            file = _encoder.encode(shard.file)
            piece = bytearray(b",\n" if place else b"\n")
            piece += b'{"file": %b, "metadata": {"format": "pt"}, "tensors": [' % file
            for position, (row, number) in enumerate(zip(shard.rows, numbers, strict=True)):
                piece += b",\n" if position else b"\n"
                piece += b",\n".join(map(_encoder.encode, self._stored(row, number)))
                if len(piece) > _PIECE:
                    yield bytes(piece)
                    piece.clear()
            yield bytes(piece) + b"]}"
        yield b"]}\n"

    def index_pieces(self) -> Iterator[bytes]:
        """The index of a checkpoint with these files, as transformers 5 writes it, piece by piece."""
        parameters = sum(math.prod(row.shape) for shard in self.layout for row in shard.rows)
        yield b'{\n  "metadata": {\n    "total_parameters": %d,\n    "total_size": %d\n  },' % (
            parameters,
            self.total_bytes,
        )
        yield b'\n  "weight_map": {'
        places = [
            (name, number)
            for number, shard in enumerate(self.layout)
            for row in shard.rows
            for name in _stored_names(row)
        ]
        places.sort()
        files = [_encoder.encode(shard.file) for shard in self.layout]
        for start in range(0, len(places), 10_000):
            lines = (
                b"\n    %b: %b" % (_encoder.encode(name), files[n])
                for name, n in places[start : start + 10_000]
            )
            yield (b"," if start else b"") + b",".join(lines)
        yield b"\n  }\n}\n"

    def _stored(self, row: Row, number: int) -> Iterator[_PlannedTensor]:
        """The tensors that a row is stored as: one, or the parts of a quantised one."""
        encoded = row.encoded
        if encoded is None or not encoded.kept:
            yield self._planned(row, number)
            return
        if number != _IN_PIECES and is_own(self.operations[number], row):
            for name in _stored_names(row):
                yield _PlannedTensor(name, number)
            return
        pieces = None
        if number == _IN_PIECES:
            pieces = [_PlannedPiece(view, part) for view, part in self.parts[row.name]]
        made = None if pieces else number
        codes = _Encode(encoded.role, row.name, "codes")
        yield _PlannedTensor(encoded.codes, made, pieces=pieces, encode=codes)
        if encoded.scales is not None:
            scales = _Encode(encoded.role, row.name, "scales")
            yield _PlannedTensor(encoded.scales, made, pieces=pieces, encode=scales)
        for name in encoded.others:
            yield _PlannedTensor(name, self.copies[encoded.role])

    def _planned(self, row: Row, number: int) -> _PlannedTensor:
        dtype = output_dtype(row, self.dtype)
        if number == _IN_PIECES:
            pieces = [_PlannedPiece(view, part) for view, part in self.parts[row.name]]
            return _PlannedTensor(row.name, dtype=dtype, shape=row.shape, pieces=pieces)
        operation = self.operations[number]
        first = operation.arguments[0].operand
        # Where operands are the tensor's counterparts, the pairing has compared their shapes.
        derived = first.source == self.anchor and first.tensor in (OWN_NAME, row.name)
        if derived and dtype == row.dtype and row.encoded is None:
            return _PlannedTensor(row.name, number)
        return _PlannedTensor(row.name, number, dtype, row.shape)

    def _sources(self, *, published: bool) -> dict[str, object]:
        """Path and identity of the files of every model that is read."""
        used = {
            source
            for operation in self.operations
            for operand in operation.operands
            for source in operand.sources
        }
        return {
            role: {
                "path": self.beside[role]
                if published and role in self.beside
                else self.models[role].headers.path,
                "files": {
                    file: facts.to_dict() for file, facts in self.models[role].headers.identity().items()
                },
            }
            for role in sorted(used)
        }


def build_plan(
    models: Mapping[str, Model],
    layout: Sequence[Shard],
    operation: Callable[[Row], Operation | Pieces],
    *,
    anchor: str,
    dtype: str = "auto",
    beside: Mapping[str, str] | None = None,
) -> Plan:
    """Says what each tensor of the output files is made of.

    Args:
        models: The models by role.
        layout: The output files.
        operation: Gives the operation that makes a row's tensor, or the pieces of it; best the same object for rows
            that are alike.
        anchor: The role whose tensors the rows describe.
        dtype: Output dtype of float tensors.
        beside: As Plan has it.

    Raises:
        PairingError: What operation raises.
        AdapterError: Likewise.
    """
    numbers: dict[Operation, int] = {}
    # Many rows give one object, whose hash would be computed again and again.
    known: dict[int, int] = {}
    kept: list[Operation] = []

    def number_of(made: Operation, name: str) -> int:
        number = known.get(id(made))
        if number is None:
            shared = made.without_name(name)
            number = numbers.setdefault(shared, len(numbers))
            if shared == made:
                kept.append(made)
                known[id(made)] = number
        return number

    # What belongs to a quantised tensor is copied as it is.
    quantised = {row.encoded.role for shard in layout for row in shard.rows if row.encoded is not None}
    copies = {role: number_of(copy_of(Operand(role, OWN_NAME)), OWN_NAME) for role in sorted(quantised)}
    planned = []
    parts: dict[str, Sequence[tuple[View, int]]] = {}
    for shard in layout:
        of_shard = []
        for row in shard.rows:
            made = operation(row)
            if isinstance(made, Pieces):
                parts[row.name] = [
                    (piece.view, number_of(piece.operation, row.name)) for piece in made.pieces
                ]
                of_shard.append(_IN_PIECES)
            else:
                of_shard.append(number_of(made, row.name))
        planned.append(array("I", of_shard))
    return Plan(
        models, anchor, tuple(layout), dtype, tuple(numbers), tuple(planned), parts, copies, beside or {}
    )


def _stored_names(row: Row) -> Iterator[str]:
    """Names of the tensors that a row's tensor is stored as."""
    encoded = row.encoded
    if encoded is None or not encoded.kept:
        yield row.name
        return
    yield encoded.codes
    if encoded.scales is not None:
        yield encoded.scales
    yield from encoded.others


def is_own(operation: Operation | Pieces, row: Row) -> bool:
    """Whether an operation copies the very tensor that a row describes."""
    if isinstance(operation, Pieces) or not operation.is_copy:
        return False
    operand = operation.arguments[0].operand
    return (
        row.encoded is not None
        and operand.source == row.encoded.role
        and operand.tensor in (OWN_NAME, row.name)
        and operand.view is None
    )
