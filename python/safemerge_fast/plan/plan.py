"""Stage 5, plan: rows and operations become plain data that says what every output tensor is made of.

The engine validates the data again and executes it; see `_engine.Plan`. Nothing here opens or writes a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from ..checkpoint.model import Model
from ..pairing.operand import OWN_NAME
from ..pairing.rows import Row
from .layout import Shard, output_dtype, tensor_bytes
from .operation import Operation

__all__ = ["PLAN_FILE", "Plan", "build_plan"]

VERSION = 2
"""Version of the plan's format."""

PLAN_FILE = "safemerge_plan.json"
"""Name of the plan within the output that it was executed into."""


class _PlannedTensor(msgspec.Struct, omit_defaults=True):
    """One output tensor as the plan writes it; what can be derived is left out."""

    name: str
    operation: int
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


_encoder = msgspec.json.Encoder()


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
    """

    models: Mapping[str, Model]
    anchor: str
    layout: tuple[Shard, ...]
    dtype: str
    operations: tuple[Operation, ...]
    numbers: tuple[Sequence[int], ...]
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

    def tensors(self) -> Iterator[tuple[Shard, Row, Operation]]:
        """Every output tensor with its file and operation, in the order of the files."""
        for shard, numbers in zip(self.layout, self.numbers, strict=True):
            for row, number in zip(shard.rows, numbers, strict=True):
                yield shard, row, self.operations[number]

    def to_json(self) -> bytes:
        """The plan as `_engine.Plan` takes it and as an output carries it: a line per tensor."""
        out = bytearray(b'{"version": %d,\n"sources": ' % VERSION)
        out += _encoder.encode(self._sources())
        out += b',\n"operations": [\n'
        out += b",\n".join(_encoder.encode(operation.to_plan()) for operation in self.operations)
        out += b'],\n"shards": ['
        for place, (shard, numbers) in enumerate(zip(self.layout, self.numbers, strict=True)):
            out += b',\n{"file": ' if place else b'\n{"file": '
            out += _encoder.encode(shard.file) + b', "metadata": {"format": "pt"}, "tensors": ['
            for position, (row, number) in enumerate(zip(shard.rows, numbers, strict=True)):
                out += b",\n" if position else b"\n"
                _encoder.encode_into(self._planned(row, number), out, -1)
            out += b"]}"
        out += b"]}\n"
        return bytes(out)

    def index_json(self) -> bytes | None:
        """The index of a checkpoint with these files, as transformers 5 writes it; None for one file."""
        if len(self.layout) == 1:
            return None
        parameters = sum(math.prod(row.shape) for shard in self.layout for row in shard.rows)
        places = sorted((row.name, shard.file) for shard in self.layout for row in shard.rows)
        out = bytearray(
            b'{\n  "metadata": {\n    "total_parameters": %d,\n    "total_size": %d\n  },'
            % (parameters, self.total_bytes)
        )
        out += b'\n  "weight_map": {\n'
        out += b",\n".join(
            b"    %b: %b" % (_encoder.encode(name), _encoder.encode(file)) for name, file in places
        )
        out += b"\n  }\n}\n"
        return bytes(out)

    def _planned(self, row: Row, number: int) -> _PlannedTensor:
        operation = self.operations[number]
        first = operation.arguments[0].operand
        dtype: str | None = output_dtype(row, self.dtype)
        # Where operands are the tensor's counterparts, the pairing has compared their shapes.
        derived = first.source == self.anchor and first.tensor in (OWN_NAME, row.name)
        if derived and dtype == row.dtype:
            return _PlannedTensor(row.name, number)
        return _PlannedTensor(row.name, number, dtype, row.shape)

    def _sources(self) -> dict[str, object]:
        """Path and identity of the files of every model that is read."""
        used = {
            source
            for operation in self.operations
            for operand in operation.operands
            for source in operand.sources
        }
        return {
            role: {
                "path": self.models[role].headers.path,
                "files": {
                    file: facts.to_dict() for file, facts in self.models[role].headers.identity().items()
                },
            }
            for role in sorted(used)
        }


def build_plan(
    models: Mapping[str, Model],
    layout: Sequence[Shard],
    operation: Callable[[Row], Operation],
    *,
    anchor: str,
    dtype: str = "auto",
) -> Plan:
    """Says what each tensor of the output files is made of.

    Args:
        models: The models by role.
        layout: The output files.
        operation: Gives the operation that makes a row's tensor; best the same object for rows that are alike.
        anchor: The role whose tensors the rows describe.
        dtype: Output dtype of float tensors.

    Raises:
        PairingError: What operation raises.
        AdapterError: Likewise.
    """
    numbers: dict[Operation, int] = {}
    # Many rows give one object, whose hash would be computed again and again.
    known: dict[int, int] = {}
    kept: list[Operation] = []
    planned = []
    for shard in layout:
        of_shard = []
        for row in shard.rows:
            made = operation(row)
            number = known.get(id(made))
            if number is None:
                shared = made.without_name(row.name)
                number = numbers.setdefault(shared, len(numbers))
                if shared == made:
                    kept.append(made)
                    known[id(made)] = number
            of_shard.append(number)
        planned.append(of_shard)
    return Plan(models, anchor, tuple(layout), dtype, tuple(numbers), tuple(planned))
