"""Whether two models hold the same weights: by their files, else by their bytes, read only as long as they agree."""

from __future__ import annotations

import numpy as np

from .. import _engine
from .adapter import Adapter
from .model import Model

__all__ = ["same_weights"]

# Bytes that are compared of each tensor before any is compared whole: two fine-tunes differ in the first few.
_FIRST = 4096
# Bytes that are compared at a time.
_PIECE = 16 << 20


def same_weights(left: Model, right: Model, *, read: bool = True) -> bool:
    """Whether two models are one: the same files, or the same tensors with the same bytes.

    How tensors are spread over files does not count. Of an adapter its scales count as well.

    Args:
        left: A checkpoint or an adapter.
        right: Another one.
        read: Whether bytes are read where the files differ; without, only the files are compared.
    """
    if isinstance(left, Adapter) != isinstance(right, Adapter):
        return False
    if isinstance(left, Adapter) and isinstance(right, Adapter) and left.modules != right.modules:
        return False
    if _files(left) == _files(right):
        return True
    if not read or len(left.headers) != len(right.headers) or left.headers.nbytes != right.headers.nbytes:
        return False
    # Two fine-tunes differ in their first tensors, so that few are looked at. Of quantised ones the parts are compared.
    tensors, others = left.headers.stored_tensors, {t.name: t for t in right.headers.stored_tensors}
    return all(_begins_alike(left, right, tensor, others.get(tensor.name)) for tensor in tensors) and all(
        _same(left, right, tensor, _rows(tensor), None) for tensor in tensors if tensor.nbytes
    )


def _files(model: Model) -> set[tuple[object, ...]]:
    """What no two files share: the inode of one that lies here, address and ETag of one that lies elsewhere."""
    return {
        (facts.device, facts.inode) if facts.etag is None else (model.headers.path, file, facts.etag)
        for file, facts in model.headers.identity().items()
    }


def _begins_alike(
    left: Model, right: Model, tensor: _engine.TensorInfo, other: _engine.TensorInfo | None
) -> bool:
    """Whether the other model has a tensor of that name, dtype and shape, and of its first row the same bytes."""
    if other is None or (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    return not tensor.nbytes or _same(left, right, tensor, 1, _FIRST)


def _rows(tensor: _engine.TensorInfo) -> int:
    return tensor.shape[0] if tensor.shape else 1


def _same(left: Model, right: Model, tensor: _engine.TensorInfo, rows: int, most: int | None) -> bool:
    """Compares the first rows of a stored tensor, of their bytes at most so many."""
    name, step = tensor.name, max(1, _PIECE * rows // max(tensor.nbytes, 1))
    parts = ((start, min(start + step, rows)) for start in range(0, rows, step))
    try:
        return all(
            np.array_equal(_bytes(left, name, part)[:most], _bytes(right, name, part)[:most])
            for part in parts
        )
    finally:
        for model in (left, right):
            model.headers.release(name, stored=True)


def _bytes(model: Model, name: str, rows: tuple[int, int]) -> np.ndarray:
    return np.asarray(model.headers.rows(name, *rows, stored=True))
