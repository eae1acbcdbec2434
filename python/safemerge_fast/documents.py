"""JSON documents that a person can read and quick to write for a hundred thousand tensors."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["write_document"]

# With this the encoder in C does the work; an indent would leave it to the one in Python, ten times slower.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def write_document(document: Any, *, levels: int) -> str:
    """Writes JSON with line breaks and indents at the outer levels only.

    Args:
        document: What json can encode; NaN and infinity it cannot.
        levels: How many levels of nested objects and arrays have a line per item; deeper ones have none.

    Returns:
        JSON that ends with a line break.
    """
    return _write(document, levels, "\n") + "\n"


def _write(value: Any, levels: int, line: str) -> str:
    if levels == 0 or not value or not isinstance(value, dict | list | tuple):
        return _encode(value)
    deeper = f"{line}  "
    if isinstance(value, dict):
        items = [f"{_encode(str(key))}: {_write(item, levels - 1, deeper)}" for key, item in value.items()]
        return f"{{{deeper}{f',{deeper}'.join(items)}{line}}}"
    items = [_write(item, levels - 1, deeper) for item in value]
    return f"[{deeper}{f',{deeper}'.join(items)}{line}]"
