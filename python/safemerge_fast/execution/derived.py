"""Tensors that a recipe computes from the models, such as an SVD's factors: a file that the plan names like an input.

They are written one after the other into the job's directory, so that a run that was killed goes on behind the last
whole one, and copied into the output in the end: a verification evaluates the plan with the very numbers that the merge
had. There the file lies in a directory of its own, where no loader takes it for weights.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from .. import _engine
from ..checkpoint.model import Model
from ..errors import OutputError

__all__ = [
    "DERIVED",
    "DERIVED_DIRECTORY",
    "DERIVED_FILE",
    "DerivedTensors",
    "Outline",
    "Shapes",
    "derived_bytes",
]

DERIVED = "derived"
"""The role that plans call them by."""

DERIVED_DIRECTORY = "safemerge_derived"
"""Where they lie in an output."""

_FILE = "derived.safetensors"

DERIVED_FILE = f"{DERIVED_DIRECTORY}/{_FILE}"
"""The file, from the output on."""

_ITEM = 4
_PIECE = 1 << 20

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of float32 tensors by name, in the order in which they are computed."""


class DerivedTensors:
    """The file of one job: its header says from the start what it will hold, and it grows tensor by tensor.

    Attributes:
        path: The file.
    """

    def __init__(self, directory: _engine.JobDirectory, shapes: Shapes) -> None:
        """Begins the file, or finds what an earlier run left of it.

        Args:
            directory: The job's directory.
            shapes: What it will hold.

        Raises:
            OutputError: It cannot be written.
        """
        self._directory = directory
        self._names = list(shapes)
        self._sizes = [_ITEM * math.prod(shape) for shape in shapes.values()]
        self._starts = dict(zip(self._names, accumulate(self._sizes, initial=0), strict=False))
        self._header = _header(shapes)
        self.path = Path(directory.path) / _FILE
        self._next = self._found()

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that are not there yet, in order."""
        return self._names[self._next :]

    def append(self, name: str, pieces: Iterable[bytes]) -> None:
        """Adds the next tensor: float32, little-endian, row after row.

        Args:
            name: The first of those that are missing.
            pieces: Its bytes.

        Raises:
            OutputError: It cannot be written.
        """
        assert name == self._names[self._next], name
        written = 0
        for piece in pieces:
            self._directory.append(_FILE, piece)
            written += len(piece)
        assert written == self._sizes[self._next], name
        self._next += 1

    def first(self, name: str) -> float:
        """The first number of a tensor that is there.

        Raises:
            OutputError: The file cannot be read.
        """
        start = len(self._header) + self._starts[name]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                (number,) = struct.unpack("<f", file.read(_ITEM))
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror}") from error
        return float(number)

    def model(self) -> Model:
        """The whole file, as plans and readers take it."""
        return _model(self.path)

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, for the output's copy."""
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    def _found(self) -> int:
        """How many whole tensors are there already; what follows them is cut off."""
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                same = file.read(len(self._header)) == self._header
        except FileNotFoundError:
            size, same = 0, False
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror}") from error
        if not same:
            self._directory.remove(_FILE)
            self._directory.append(_FILE, self._header)
            return 0
        end, count = len(self._header), 0
        while count < len(self._sizes) and end + self._sizes[count] <= size:
            end += self._sizes[count]
            count += 1
        if end < size:
            try:
                os.truncate(self.path, end)
            except OSError as error:
                raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error
        return count


class Outline:
    """A file of such tensors without their numbers, which takes no room: for a plan that is looked at, not executed.

    It lies among temporary files, and goes with this object.
    """

    def __init__(self, shapes: Shapes) -> None:
        """Makes it.

        Raises:
            OutputError: There is no place for temporary files.
        """
        try:
            self._directory = tempfile.TemporaryDirectory(prefix="safemerge-")
            path = Path(self._directory.name) / _FILE
            header = _header(shapes)
            path.write_bytes(header)
            os.truncate(path, len(header) + derived_bytes(shapes))
        except OSError as error:
            raise OutputError(f"cannot write a temporary file: {error.strerror}; set TMPDIR") from error
        self._model = _model(path)

    def model(self) -> Model:
        """The file, as plans take it."""
        return self._model


def derived_bytes(shapes: Shapes) -> int:
    """Bytes of such tensors."""
    return sum(_ITEM * math.prod(shape) for shape in shapes.values())


def _model(path: Path) -> Model:
    return Model(DERIVED, str(path), path, _engine.Checkpoint(path), {})


def _header(shapes: Shapes) -> bytes:
    entries: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _ITEM * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
