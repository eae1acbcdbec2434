"""The page cache before a run: filled with the inputs, or emptied of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")

# Of the memory that is free or cached: the rest is for the output's pages and the processes.
_SHARE = 0.7


def warm(directories: Iterable[Path]) -> None:
    """Reads the weights, so that they are cached, and waits until earlier outputs are on the disk."""
    os.sync()
    for file in _weights(directories):
        with file.open("rb", buffering=0) as opened:
            buffer = memoryview(bytearray(1 << 22))
            while opened.readinto(buffer):
                pass


def empty(directories: Iterable[Path]) -> None:
    """Empties the cache, of everything where that is permitted, else of the weights."""
    os.sync()
    if can_drop_all():
        DROP_CACHES.write_text("3")
        return
    for file in _weights(directories):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def can_drop_all() -> bool:
    """Tells whether the whole page cache may be dropped."""
    return os.access(DROP_CACHES, os.W_OK)


def how_emptied() -> str:
    """Says how `empty` works here, for a table's title."""
    return "all caches dropped" if can_drop_all() else "inputs evicted by posix_fadvise"


def fits(size: int) -> bool:
    """Tells whether so many bytes of inputs can stay cached beside an output."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return True
    available = next(line for line in text.splitlines() if line.startswith("MemAvailable:"))
    return size < _SHARE * int(available.split()[1]) * 1024


def _weights(directories: Iterable[Path]) -> Iterable[Path]:
    for directory in directories:
        yield from sorted(directory.glob("*.safetensors"))
