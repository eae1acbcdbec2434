"""Reads matrices and their differences block by block into float32 buffers that are allocated once.

Peak memory is the buffers; the mapped pages that reading touches are given back as it goes. Fresh allocations
per block would cost more time than the reading. Inputs come through the engine's reader, as in the merge: where that
reads by position, nothing is mapped here either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import _engine

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.operand import Term
    from ..pairing.view import View

__all__ = ["Composed", "Difference", "Matrix", "Workspace", "open_matrix", "read_tensor"]

_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_RELEASE_BYTES = 16 << 20
# The kernel maps up to this much around a page that is touched, if it is in the page cache.
_FAULT_AROUND_BYTES = 64 << 10


# Threads that torch needs to read as fast as the engine does in one.
_ENGINE_THREADS = 2

# Elements that are summed in float32; chunks and blocks need not be whole multiples of it.
_RUN = 1024


class Workspace:
    """The buffers that all modules of one analysis share, and how large blocks and operations may be.

    Attributes:
        device: Where the buffers lie.
        block_elements: Elements of a float32 block, about.
        block_columns: Least width of a block of columns, so that a row's segment is a page or more.
        chunk_elements: Elements that are converted at a time: on the CPU what stays in its second-level
            cache.
        operation_flops: Floating-point operations of one product at most, so that Ctrl-C waits for no more
            than about a tenth of a second.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        block_elements: int = 4 << 20,
        block_columns: int = 2048,
        chunk_elements: int | None = None,
        operation_flops: float | None = None,
    ) -> None:
        on_cpu = device.type == "cpu"
        self.device = device
        self.block_elements = block_elements
        self.block_columns = block_columns
        self.chunk_elements = max(chunk_elements or (256 << 10 if on_cpu else 8 << 20), _RUN)
        self.operation_flops = operation_flops or (4e9 if on_cpu else 4e12)
        self._buffers: dict[str, torch.Tensor] = {}
        self._blocks: dict[str, _engine.Block] = {}

    def buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Returns a contiguous float32 (rows, columns) buffer; one name always gives the same memory."""
        size = rows * columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers.pop(name, None)
            self._blocks.pop(name, None)
            self._buffers[name] = self._allocate(name, size)
        return self._buffers[name][:size].view(rows, columns)

    def _allocate(self, name: str, size: int) -> torch.Tensor:
        if self.device.type != "cpu":
            return torch.empty(size, dtype=torch.float32, device=self.device)
        # The engine fills memory of its own only.
        block = self._blocks[name] = _engine.Block(size)
        return torch.from_numpy(np.asarray(block))

    def engine_block(self, name: str) -> _engine.Block | None:
        """The memory of a buffer, if the engine can fill it and is the faster way to do so.

        The engine reads a block in one call, without the interpreter, in half of the time that torch's operations
        take in one thread. But it uses one thread, and torch all that this one may use.
        """
        return self._blocks.get(name) if torch.get_num_threads() <= _ENGINE_THREADS else None

    def blocks(self, extent: int, across: int, *, least: int = 1) -> list[slice]:
        """Cuts an extent into blocks that are `across` wide in the other direction and at least `least` long."""
        step = max(self.block_elements // across, least)
        return [slice(start, min(start + step, extent)) for start in range(0, extent, step)]

    def panels(self, size: int) -> list[slice]:
        """Cuts the columns of a large square matrix into panels of four blocks' size."""
        step = max(4 * self.block_elements // size, self.block_columns)
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def strips(self, rows: int, flops_per_row: float) -> Iterator[tuple[int, int]]:
        """Cuts the rows of a product so that no operation takes long; yields (start, stop)."""
        step = max(int(self.operation_flops / flops_per_row), 16)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def squares(self, matrix: torch.Tensor) -> float:
        """Sums the squares of a contiguous float32 matrix: short runs in float32, the runs in float64.

        A long float32 sum of numbers that were rounded to a narrow dtype drifts: 5e-6 in a quarter million.
        """
        flat = matrix.reshape(-1)
        whole = flat.numel() // _RUN * _RUN
        total = 0.0
        step = self.chunk_elements // _RUN * _RUN
        for start in range(0, whole, step):
            runs = flat[start : min(start + step, whole)].view(-1, _RUN)
            total += _sum_of_squares(torch.linalg.vector_norm(runs, dim=1))
        return total + (_sum_of_squares(flat[whole:]) if whole < flat.numel() else 0.0)

    def dot(self, left: torch.Tensor, right: torch.Tensor) -> float:
        """Sums the products of two float32 matrices of one shape: float32 within a row, float64 over rows."""
        rows, columns = left.shape
        total = 0.0
        step = max(self.chunk_elements // columns, 1)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            scratch = self.buffer("scratch", part.stop - part.start, columns)
            torch.mul(left[part], right[part], out=scratch)
            total += float(scratch.sum(dim=1).cpu().double().sum())
        return total


def _sum_of_squares(vector: torch.Tensor) -> float:
    """Sums the squares of a short vector in float64, on the CPU, because MPS has no float64."""
    double = vector.cpu().double()
    return float(torch.dot(double, double))


class Matrix:
    """One 2-D tensor of one model, as it is stored.

    Attributes:
        role: The role whose tensor it is.
        name: Its name, for messages.
        dtype: Its dtype as safetensors names it; "F32" if it is composed.
        shape: (rows, columns) as it is stored.
        engine: The same for the engine.
    """

    def __init__(self, model: Model, name: str) -> None:
        self.role = model.role
        self.name = name
        self._open(_engine.Matrix.stored(model.headers, name))
        self._headers = model.headers
        self._view = _whole_view(model.headers, name, self.shape[0]) if self.engine.mapped else None

    def _open(self, engine: _engine.Matrix) -> None:
        self.engine = engine
        self.dtype = engine.dtype
        self.shape = engine.shape
        self._dtype = _TORCH_DTYPES[engine.dtype]
        self._itemsize = self._dtype.itemsize
        self._touched = 0

    def chunk(self, rows: slice, columns: slice) -> torch.Tensor:
        """Returns a part of the tensor in its own dtype on the CPU: a view of the mapping where that is possible.

        Args:
            rows: Its rows, with a start and a stop.
            columns: Its columns, likewise.
        """
        self.touch(rows, columns)
        width = slice(columns.start * self._itemsize, columns.stop * self._itemsize)
        if self._view is None:
            # Whole rows are read, into memory of their own.
            data = np.array(self._headers.rows(self.name, rows.start, rows.stop))
            return torch.from_numpy(data).view(self._dtype).view(-1, self.shape[1])[:, columns]
        if self._view.data_ptr() % self._itemsize == 0:
            return self._view.view(self._dtype).view(self.shape)[rows, columns]
        # A header that is not padded puts the data at any byte; a clone starts at an aligned one.
        stored = self._view.view(self.shape[0], self.shape[1] * self._itemsize)[rows, width]
        return stored.clone(memory_format=torch.contiguous_format).view(self._dtype)

    def touch(self, rows: slice, columns: slice) -> None:
        """Notes that a part has been read, for release_when_full."""
        width = columns.stop - columns.start
        around = 0 if width == self.shape[1] else _FAULT_AROUND_BYTES
        self._touched += (rows.stop - rows.start) * (width * self._itemsize + around)

    def is_finite(self, chunk_elements: int) -> bool:
        """Whether no value is NaN or infinite, in float32."""
        rows, columns = self.shape
        step = max(chunk_elements // columns, 1)
        for start in range(0, rows, step):
            part = self.chunk(slice(start, min(start + step, rows)), slice(0, columns))
            if not bool(torch.isfinite(part.float()).all()):
                return False
            self.release_when_full()
        return True

    def release_when_full(self) -> None:
        """Gives the pages back once enough of them may have been touched."""
        if self._touched >= _RELEASE_BYTES:
            self.release()

    def release(self) -> None:
        """Gives the pages back; what is read again is mapped again."""
        self._headers.release(self.name)
        self.engine.release()
        self._touched = 0


class Composed(Matrix):
    """A role's 2-D tensor that adapters change: the sum of weight · operand over its terms, composed as it is read.

    The engine does it by the arithmetic of a merge; no whole matrix of it ever exists.
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
        sources = {source: model.headers for source, model in models.items()}
        planned = [{"operand": term.operand.to_plan(), "weight": term.weight} for term in terms]
        self._open(_engine.Matrix(name, sources=sources, terms=planned))

    def chunk(self, rows: slice, columns: slice) -> torch.Tensor:
        """Returns a part of the tensor, float32 on the CPU, in memory of its own."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        block = _engine.Block(shape[0] * shape[1])
        self.engine.read(block, (rows.start, rows.stop), (columns.start, columns.stop))
        self.touch(rows, columns)
        return torch.from_numpy(np.asarray(block)).view(shape)

    def release(self) -> None:
        """Gives the pages back; what is read again is mapped again."""
        self.engine.release()
        self._touched = 0


def open_matrix(models: Mapping[str, Model], role: str, name: str, terms: Sequence[Term]) -> Matrix:
    """A role's matrix: as it is stored if it is that, else composed; arguments as for Composed."""
    operand = terms[0].operand
    if len(terms) > 1 or terms[0].weight != 1.0 or not operand.is_plain:
        return Composed(models, role, name, terms)
    stored = models[operand.source].headers.tensor(operand.tensor)
    if operand.view is None and stored.encoding is None:
        return Matrix(models[operand.source], operand.tensor)
    part = Composed(models, role, name, terms)
    # Its numbers were rounded to what is stored, though they are read as float32.
    part.dtype = stored.dtype if stored.encoding is None else stored.encoding.split()[0]
    return part


def _whole_view(headers: _engine.Checkpoint, name: str, rows: int) -> torch.Tensor:
    """The bytes of a tensor in a mapped file, without a copy."""
    array = np.asarray(headers.rows(name, 0, rows))
    with warnings.catch_warnings():
        # Read-only memory: nothing here writes to it.
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(array)


def read_tensor(model: Model, name: str, view: View | None = None) -> torch.Tensor:
    """Reads a small tensor whole, or a part of one, in its own dtype, into memory of its own."""
    info = model.headers.tensor(name)
    if view is None:
        data = _read_rows(model, name, 0, info.shape[0] if info.shape else 1)
        return data.view(_TORCH_DTYPES[info.dtype]).view(*info.shape)
    # The rows of the stored tensor that the part touches.
    width = math.prod(info.shape[1:])
    last = view.start + sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
    first = view.start // width
    data = _read_rows(model, name, first, last // width + 1).view(_TORCH_DTYPES[info.dtype])
    return data.as_strided(view.shape, view.strides, view.start - first * width)


def _read_rows(model: Model, name: str, first: int, stop: int) -> torch.Tensor:
    data = np.array(model.headers.rows(name, first, stop), dtype=np.uint8)
    model.headers.release(name)
    return torch.from_numpy(data.reshape(-1))


class Difference:
    """minuend - subtrahend of two tensors of one shape, as float32 blocks; and the norms of both.

    The subtraction is done in float32 on the values as they are stored. Rows and columns are those of the
    module's (d_out, d_in) matrix, whichever way it is stored.

    Attributes:
        shape: (d_out, d_in).
        squares: ‖minuend - subtrahend‖² over the blocks read so far.
        minuend_squares: ‖minuend‖² over the blocks read so far, if it was asked for.
    """

    def __init__(
        self,
        workspace: Workspace,
        minuend: Matrix,
        subtrahend: Matrix,
        *,
        transposed: bool,
        minuend_norm: bool = False,
    ) -> None:
        stored = minuend.shape
        self.shape = (stored[1], stored[0]) if transposed else stored
        self.squares = 0.0
        self.minuend_squares = 0.0
        self._workspace = workspace
        self._minuend = minuend
        self._subtrahend = subtrahend
        self._transposed = transposed
        self._minuend_norm = minuend_norm

    def is_zero(self) -> bool:
        """Whether the two tensors hold equal numbers; reads on only as long as they do."""
        rows, columns = self._minuend.shape
        step = max(self._workspace.chunk_elements // columns, 1)
        for start in range(0, rows, step):
            part = (slice(start, min(start + step, rows)), slice(0, columns))
            left, right = self._minuend.chunk(*part), self._subtrahend.chunk(*part)
            if left.dtype != right.dtype:
                left, right = left.float(), right.float()
            if not torch.equal(left, right):
                return False
            self._minuend.release_when_full()
            self._subtrahend.release_when_full()
        return True

    def block(self, rows: slice, columns: slice, buffer: str, *, norms: bool = True) -> torch.Tensor:
        """Reads a block of the difference.

        Args:
            rows: Rows of the (d_out, d_in) matrix, with a start and a stop.
            columns: Columns of it, with a start and a stop.
            buffer: Name of the buffer to read into.
            norms: Whether to add the block to the norms; false where it is read a second time.

        Returns:
            The block, in the buffer; a transposed view of it if the module is stored as (in, out).
        """
        stored_rows, stored_columns = (columns, rows) if self._transposed else (rows, columns)
        workspace = self._workspace
        width = stored_columns.stop - stored_columns.start
        block = workspace.buffer(buffer, stored_rows.stop - stored_rows.start, width)
        step = max(workspace.chunk_elements // width, 1)
        for start in range(stored_rows.start, stored_rows.stop, step):
            chunk = slice(start, min(start + step, stored_rows.stop))
            first = chunk.start - stored_rows.start
            squares, minuend_squares = self._read(buffer, block, first, chunk, stored_columns, norms)
            if norms:
                self.squares += squares
                self.minuend_squares += minuend_squares
            self._minuend.release_when_full()
            self._subtrahend.release_when_full()
        return block.T if self._transposed else block

    def release(self) -> None:
        """Gives the mapped pages of both tensors back."""
        self._minuend.release()
        self._subtrahend.release()

    def _read(
        self, buffer: str, block: torch.Tensor, first: int, rows: slice, columns: slice, norms: bool
    ) -> tuple[float, float]:
        """Reads stored rows into those of a buffer's block from `first` on.

        Returns:
            The squared norms of their difference and of the minuend, 0 where they are not wanted.
        """
        minuend, subtrahend = self._minuend, self._subtrahend
        memory = self._workspace.engine_block(buffer)
        minuend_norm = norms and self._minuend_norm
        if memory is not None:
            squares = memory.read_difference(
                minuend.engine,
                subtrahend.engine,
                (rows.start, rows.stop),
                (columns.start, columns.stop),
                offset=first * block.shape[1],
                minuend_squares=minuend_norm,
            )
            minuend.touch(rows, columns)
            subtrahend.touch(rows, columns)
            return squares
        part = block[first : first + rows.stop - rows.start]
        self._load(minuend, rows, columns, part)
        minuend_squares = self._workspace.squares(part) if minuend_norm else 0.0
        scratch = self._workspace.buffer("scratch", *part.shape)
        self._load(subtrahend, rows, columns, scratch)
        part.sub_(scratch)
        return self._workspace.squares(part) if norms else 0.0, minuend_squares

    def _load(self, tensor: Matrix, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """Converts a chunk to float32; to another device it travels in its own, narrower dtype."""
        part = tensor.chunk(rows, columns)
        out.copy_(part if out.device.type == "cpu" else part.to(out.device))
