"""What settings of several recipes may be, and how they are checked."""

from __future__ import annotations

from typing import Any

from .errors import PlanError
from .sizes import parse_size

__all__ = [
    "COMPATIBILITIES",
    "DTYPES",
    "OUTPUT_FORMATS",
    "READ_BACKENDS",
    "check_dtype",
    "check_read_backend",
    "check_sizes",
    "check_threads",
]

OUTPUT_FORMATS = ("auto", "adapter", "checkpoint")
"""What can be written; "auto" is an adapter if all that is merged are adapters."""

READ_BACKENDS = ("auto", "mmap", "pread")
"""How the engine reads inputs; "auto" reads network file systems by position and maps the others."""

COMPATIBILITIES = ("peft-linear",)
"""Other programs' ways to combine adapters that can be reproduced."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Output dtypes that can be asked for, and their names in safetensors; "auto" keeps each tensor's own."""


def check_sizes(configuration: Any) -> None:
    """Replaces the fields max_shard_size and memory_budget, where set, by their bytes.

    Raises:
        PlanError: One is no size.
    """
    for name in ("max_shard_size", "memory_budget"):
        value = getattr(configuration, name)
        if value is not None:
            object.__setattr__(configuration, name, parse_size(value))


def check_dtype(dtype: str) -> None:
    """Raises PlanError if an output dtype is neither "auto" nor a key of DTYPES."""
    if dtype != "auto" and dtype not in DTYPES:
        raise PlanError(f"dtype should be auto, {', '.join(DTYPES)}, not {dtype!r}")


def check_threads(threads: int | None) -> None:
    """Raises PlanError if a number of threads is below 1."""
    if threads is not None and threads < 1:
        raise PlanError(f"threads should be at least 1, not {threads}")


def check_read_backend(name: str) -> None:
    """Raises PlanError if a read backend is none of READ_BACKENDS."""
    if name not in READ_BACKENDS:
        raise PlanError(f"read_backend should be {', '.join(READ_BACKENDS)}, not {name!r}")
