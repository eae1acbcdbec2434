"""Whether two models hold the same weights: by their files, else by their bytes, read only as long as they agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import _engine
from ..errors import CheckpointError
from .adapter import Adapter
from .model import Model

__all__ = ["same_weights"]

# Bytes that are compared of each tensor before any is compared whole: two fine-tunes differ in the first few.
_FIRST = 4096
# Bytes that are compared at a time.
_PIECE = 16 << 20


def same_weights(left: Model, right: Model) -> bool:
    """Whether two models are one: the same files, or the same tensors with the same bytes.

    How tensors are spread over files does not count. Of an adapter its scales count as well.

    Args:
        left: A checkpoint or an adapter.
        right: Another one.
    """
    if isinstance(left, Adapter) != isinstance(right, Adapter):
        return False
    if isinstance(left, Adapter) and isinstance(right, Adapter) and left.modules != right.modules:
        return False
    if _inodes(left) == _inodes(right):
        return True
    pairs = _pairs(left.headers, right.headers)
    if pairs is None:
        return False
    return all(_same(left, right, name, 1, _FIRST) for name, _ in pairs) and all(
        _same(left, right, name, rows, None) for name, rows in pairs
    )


def _inodes(model: Model) -> set[tuple[int, int]]:
    return {(facts.device, facts.inode) for facts in model.headers.identity().values()}


def _pairs(left: _engine.Checkpoint, right: _engine.Checkpoint) -> Sequence[tuple[str, int]] | None:
    """Name and rows of every tensor that has bytes; None unless both have the same ones."""
    if len(left.tensors) != len(right.tensors) or left.nbytes != right.nbytes:
        return None
    pairs = []
    for tensor in left.tensors:
        try:
            other = right.tensor(tensor.name)
        except CheckpointError:
            return None
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return None
        if tensor.nbytes:
            pairs.append((tensor.name, tensor.shape[0] if tensor.shape else 1))
    return pairs


def _same(left: Model, right: Model, name: str, rows: int, most: int | None) -> bool:
    """Compares the first rows of a tensor, of their bytes at most so many."""
    step = max(1, _PIECE * rows // max(left.headers.tensor(name).nbytes, 1))
    parts = ((start, min(start + step, rows)) for start in range(0, rows, step))
    try:
        return all(
            np.array_equal(_bytes(left, name, part)[:most], _bytes(right, name, part)[:most])
            for part in parts
        )
    finally:
        for model in (left, right):
            model.headers.release(name)


def _bytes(model: Model, name: str, rows: tuple[int, int]) -> np.ndarray:
    return np.asarray(model.headers.rows(name, *rows))
