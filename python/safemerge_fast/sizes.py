"""Sizes in bytes as people write them: `5GB` and `4GiB` in, `5.0 GB` out."""

from __future__ import annotations

import re

from .errors import PlanError
from .printable import printable

__all__ = ["format_size", "parse_size"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST = 1 << 62
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*((?P<unit>[KMGT]?)(?P<binary>i?)B?)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Reads a size.

    Args:
        text: A number with a unit: B, KB, MB, GB, TB are powers of 1000 (as in huggingface_hub), KiB, MiB,
            GiB, TiB powers of 1024; the B may be left out. A plain number is bytes.

    Returns:
        Bytes, at least 1.

    Raises:
        PlanError: The text is not a positive size.
    """
    match = _SIZE.fullmatch(str(text))
    size = 0
    if match is not None and (match["unit"] or not match["binary"]):
        unit = _UNITS[match["unit"].upper()]
        if match["binary"]:
            unit = 1024 ** (len(str(unit)) // 3)
        # Beyond that no machine counts bytes; and float() makes infinity of 400 digits.
        size = int(min(float(match["number"]) * unit, _MOST))
    if not 1 <= size < _MOST:
        raise PlanError(f"a size should be like 5GB, 500MB or 4GiB, not {printable(str(text), 80)!r}")
    return size


def format_size(size: int) -> str:
    """Writes bytes with the largest unit of 1000 that leaves a number of at least 1, e.g. `16.4 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
