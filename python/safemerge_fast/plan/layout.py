"""The files of an output: which rows' tensors each holds, and in which dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..checkpoint.model import FLOATS
from ..pairing.row import Row
from ..settings import DTYPES

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Shard", "lay_out", "output_dtype", "tensor_bytes"]

SINGLE_FILE = "model.safetensors"
"""Name of the weights of a checkpoint that has one file."""

INDEX_FILE = "model.safetensors.index.json"
"""Name of the index of a checkpoint that has several."""

_STANDARD_NAME = re.compile(r"model-\d{5}-of-(?P<count>\d{5})\.safetensors")

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file and the rows whose tensors it holds, in the order of their bytes."""

    file: str
    rows: tuple[Row, ...]


def output_dtype(row: Row, dtype: str) -> str:
    """The dtype of a row's tensor in the output.

    Args:
        row: The row.
        dtype: "auto" or a key of settings.DTYPES; tensors that are not float keep theirs.

    Returns:
        A dtype as safetensors names it.
    """
    return row.dtype if dtype == "auto" or row.dtype not in FLOATS else DTYPES[dtype]


def tensor_bytes(row: Row, dtype: str) -> int:
    """Bytes of a row's tensor in the output, with all that it is stored as."""
    if row.encoded is not None and row.encoded.kept:
        return row.encoded.nbytes
    return math.prod(row.shape) * _ITEM_BYTES[output_dtype(row, dtype)]


def lay_out(rows: Sequence[Row], *, dtype: str = "auto", max_shard_size: int | None = None) -> list[Shard]:
    """Distributes the rows over output files, without changing their order.

    Args:
        rows: All rows of the pairing.
        dtype: Output dtype of float tensors, as in output_dtype.
        max_shard_size: Most bytes of tensors in a file (a larger tensor gets a file of its own). None keeps
            the files of the model that the rows are of; they keep their names where transformers would find them by
            these.

    Returns:
        The output files in order; none is empty.
    """
    groups: list[list[Row]] = []
    if max_shard_size is None:
        by_file: dict[str, list[Row]] = {}
        for row in rows:
            by_file.setdefault(row.file, []).append(row)
        groups = list(by_file.values())
        if len(groups) > 1 and _names_are_standard(by_file):
            return [Shard(file, tuple(group)) for file, group in by_file.items()]
    else:
        filled = 0
        for row in rows:
            size = tensor_bytes(row, dtype)
            if not groups or filled + size > max_shard_size:
                groups.append([])
                filled = 0
            groups[-1].append(row)
            filled += size
    count = len(groups)
    if count == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def _names_are_standard(files: Iterable[str]) -> bool:
    """Whether all files are named as parts of one and the same sharded checkpoint."""
    matches = [_STANDARD_NAME.fullmatch(file) for file in files]
    counts = {match["count"] for match in matches if match is not None}
    return None not in matches and len(counts) == 1
