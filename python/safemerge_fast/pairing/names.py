"""Tensor names of checkpoints that spell them differently: which name is which."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["match_names"]

_FROM_LAYERS = re.compile(r"[^.]+\.\d+\..*$")


def match_names(mine: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Matches the tensor names of two checkpoints of one architecture.

    Exact names first; then names of which one is the other with a prefix (`transformer.h.0…` and `h.0…`);
    then names that agree from the list of layers on (`model.language_model.layers.0…` and
    `language_model.model.layers.0…`). A name is matched only if nothing else can be meant on either side, and
    only with a name that has the same numbers in it: a missing layer is not its neighbour.

    Args:
        mine: Names to find counterparts for.
        theirs: Names to find them among.

    Returns:
        The counterpart of each of mine that has one, in the order of mine.
    """
    mine, left = list(mine), set(theirs)
    found = {name: name for name in mine if name in left}
    for same in (_same_but_for_prefix, _same_from_layers):
        left -= set(found.values())
        candidates: dict[str, set[str]] = {}
        claims: dict[str, set[str]] = {}
        for name, other in same([name for name in mine if name not in found], left):
            if _numbers(name) == _numbers(other):
                candidates.setdefault(name, set()).add(other)
                claims.setdefault(other, set()).add(name)
        for name, meant in candidates.items():
            other = next(iter(meant))
            if len(meant) == 1 and len(claims[other]) == 1:
                found[name] = other
    return {name: found[name] for name in mine if name in found}


def _same_but_for_prefix(mine: Iterable[str], theirs: set[str]) -> list[tuple[str, str]]:
    """Pairs of which one name is the other with parts in front."""
    mine = set(mine)
    pairs = [(name, tail) for name in mine for tail in _tails(name) if tail in theirs]
    return pairs + [(tail, other) for other in theirs for tail in _tails(other) if tail in mine]


def _same_from_layers(mine: Iterable[str], theirs: set[str]) -> list[tuple[str, str]]:
    """Pairs that agree from the part before the first number on."""
    by_tail: dict[str, list[str]] = {}
    for other in theirs:
        if match := _FROM_LAYERS.search(other):
            by_tail.setdefault(match[0], []).append(other)
    return [
        (name, other)
        for name in mine
        if (match := _FROM_LAYERS.search(name))
        for other in by_tail.get(match[0], ())
    ]


def _tails(name: str) -> list[str]:
    """All that remains of a name when parts are taken off its front: "a.b.c" gives "b.c" and "c"."""
    return [name[place + 1 :] for place, character in enumerate(name) if character == "."]


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]
