"""Tensor names of checkpoints that spell them differently: which name is which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

__all__ = ["is_of_other_tower", "match_names", "prefix_of_layers"]

_FROM_LAYERS = re.compile(r"[^.]+\.\d+\..*$")
# Parts of names of what a multimodal model has beside its language model.
_OTHER_TOWER = re.compile(
    r"(^|[._])(vision|visual|vit|image|images|img|pixel|video|audio|speech|sound|multi_?modal|mm|merger|resampler|qformer|"
    r"connector|perceiver|aligner|projector|sam)(?=[._\d]|$)"
)


def is_of_other_tower(name: str) -> bool:
    """Whether a tensor belongs to what a multimodal model has beside its language model, by its name."""
    return _OTHER_TOWER.search(name) is not None


def prefix_of_layers(name: str) -> str | None:
    """What a name of a layer's tensor begins with, before the list of layers; None for other names."""
    match = _FROM_LAYERS.search(name)
    return None if match is None else name[: match.start()]


def match_names(
    mine: Iterable[str],
    theirs: Iterable[str],
    *,
    among: tuple[Sequence[str], Sequence[str]] | None = None,
) -> dict[str, str]:
    """Matches the tensor names of two checkpoints of one architecture.

    Exact names first; then names of which one is the other with a prefix (`transformer.h.0…` and `h.0…`);
    then names that agree from the list of layers on (`model.language_model.layers.0…` and
    `language_model.model.layers.0…`); then names that differ by what those differ by (`model.norm.weight` and
    `model.language_model.norm.weight`). A name is matched only if nothing else can be meant on either side, and
    only with a name that has the same numbers in it: a missing layer is not its neighbour. Names of a language model
    are not matched with those of other towers of a multimodal one.

    Args:
        mine: Names to find counterparts for.
        theirs: Names to find them among.
        among: All names of the two checkpoints, if those are more.

    Returns:
        The counterpart of each of mine that has one, in the order of mine.
    """
    mine, left = list(mine), set(theirs)
    found = {name: name for name in mine if name in left}
    if len(found) < len(mine):
        towers = [any(map(is_of_other_tower, names)) for names in among or (mine, left)]
        if towers == [False, True]:
            left = {name for name in left if not is_of_other_tower(name)}
        if towers == [True, False]:
            mine = [name for name in mine if name in found or not is_of_other_tower(name)]
    layers: dict[str, str] = {}
    for same in (_same_but_for_prefix, _same_from_layers, partial(_same_as_layers, layers)):
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
        layers.update((name, other) for name, other in found.items() if name != other)
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


def _same_as_layers(
    layers: Mapping[str, str], mine: Iterable[str], theirs: set[str]
) -> list[tuple[str, str]]:
    """Pairs that begin as names in lists of layers do which were matched already."""
    prefixes: set[tuple[str, str]] = set()
    for name, other in layers.items():
        own, their = _FROM_LAYERS.search(name), _FROM_LAYERS.search(other)
        if own is not None and their is not None and own[0] == their[0]:
            prefixes.add((name[: own.start()], other[: their.start()]))
    return [
        (name, other)
        for name in mine
        for own, their in prefixes
        if name.startswith(own) and (other := f"{their}{name.removeprefix(own)}") in theirs
    ]


def _tails(name: str) -> list[str]:
    """All that remains of a name when parts are taken off its front: "a.b.c" gives "b.c" and "c"."""
    return [name[place + 1 :] for place, character in enumerate(name) if character == "."]


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]
