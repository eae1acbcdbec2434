"""The order in which layers and module types are shown: layers by their numbers, types as they lie in a block."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["natural", "ordered_types"]

_EXPERTS = "experts."

# How most decoders are written down; other names follow in the order of appearance.
_BLOCK = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "o_proj",
    "out_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "c_fc",
    "fc1",
    "down_proj",
    "fc2",
    "c_proj",
)
_RANKS = {name: rank for rank, name in enumerate(_BLOCK)}


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by their value: layers.2 comes before layers.10."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part)
        for part in re.split(r"([0-9]+)", name)
    ]


def ordered_types(types: Iterable[str]) -> list[str]:
    """Module types as they follow each other in a block, experts last."""
    return sorted(
        types, key=lambda name: (name.startswith(_EXPERTS), _RANKS.get(name.removeprefix(_EXPERTS), 99))
    )
