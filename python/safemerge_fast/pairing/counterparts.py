"""Which tensor of one model is which of another: by name, exactly or but for a prefix, and heads that are tied."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from .._engine import Checkpoint
from ..checkpoint.model import Model
from .live_names import LiveNames, Made, live_names
from .names import match_names
from .tied import embedding_name, is_head, ties_head
from .view import View

__all__ = ["Counterparts", "counterparts"]


class Counterparts:
    """The names that one model's tensors have in another model: mostly their own."""

    def __init__(
        self, headers: Checkpoint, renamed: Mapping[str, str], made: Mapping[str, Made] | None = None
    ) -> None:
        """Holds what differs.

        Args:
            headers: The other model's.
            renamed: Names that are others there.
            made: Names that transformers' loading makes of tensors there, by more than another name.
        """
        self._headers = headers
        self._renamed = renamed
        self._made = made or {}

    def get(self, name: str) -> str | None:
        """The counterpart of a name, or None."""
        return name if name in self._headers else self._renamed.get(name)

    def part(self, name: str, shape: Sequence[int]) -> tuple[str, View] | None:
        """The tensor that holds rows of which this name's tensor consists, and where; None if there is none.

        Args:
            name: The name.
            shape: Its tensor's shape.
        """
        made = self._made.get(name)
        share = None if made is None else made.rows or made.part
        if made is None or share is None or len(shape) != 2:
            return None
        tensor = self._headers.tensor(made.sources[0][0])
        (index, count), (rows, columns) = share, shape
        if tuple(tensor.shape) != (rows * count, columns):
            return None
        whole = View(0, (rows * count, columns), (columns, 1))
        return tensor.name, whole.rows(index, rows, count) if made.rows else whole.rows(index * rows, rows)

    def held_in(self, name: str) -> tuple[str, ...]:
        """The tensors that a name's tensor is in the other model, or is made of there by loading."""
        if (found := self.get(name)) is not None:
            return (found,)
        made = self._made.get(name)
        return () if made is None else tuple(source for group in made.sources for source in group)

    def why_missing(self, name: str) -> str:
        """What is to be said of a name that has no counterpart."""
        made = self._made.get(name)
        return "missing" if made is None else f"made of {made.describe()}"


def counterparts(
    names: Checkpoint | Sequence[str], other: Model, config: Mapping[str, Any] | None = None
) -> tuple[Counterparts, list[str]]:
    """Maps names of one model's tensors to another model's; and says what was not an exact match.

    Args:
        names: Names of the one model, or its headers; a head that the other does not store because it ties it is the
            embedding.
        other: The other model.
        config: The one model's config.json, if it has one: it may be a part of what the other is, such as the language
            model of one that sees.

    Returns:
        The counterpart of each name that has one, and notes.
    """
    notes = []
    all_names = names if isinstance(names, Sequence) else names.names
    headers = other.headers
    lost = [name for name in all_names if name not in headers]
    renamed: dict[str, str] = {}
    left: list[str] = []
    if lost:
        known = set(all_names)
        left = [name for name in headers.names if name not in known]
        renamed = match_names(lost, left, among=(all_names, headers.names))
        if renamed:
            first = next(iter(renamed))
            notes.append(
                f"{len(renamed)} tensors have other names in {other.role}, such as {renamed[first]} for {first}"
            )
    tied = ties_head(other.config)
    made: dict[str, Made] = {}
    # A head that is tied may be stored nevertheless, under a name that only loading knows; shapes show whether that is
    # worth asking for, and names alone do not.
    shapeless = tied and isinstance(names, Sequence)
    alone = [name for name in lost if name not in renamed and not (shapeless and is_head(name))]
    matched = {*renamed.values()}
    left = [name for name in left if name not in matched]
    if alone and _may_be_renamed(names, alone, left, other):
        found, made = _by_loading(alone, all_names, other)
        lost_still = [name for name in alone if name not in found and name not in made]
        if lost_still and config is not None and config.get("model_type") != other.config.get("model_type"):
            taken = {name for name in all_names if name in headers} | {*renamed.values(), *found.values()}
            more, more_made = _by_loading_both(lost_still, all_names, config, other, taken)
            found, made = {**found, **more}, {**made, **more_made}
        renamed |= found
        if found:
            first = next(iter(found))
            notes.append(
                f"{len(found)} tensors have other names in {other.role} by transformers' own table, such as "
                f"{found[first]} for {first}"
            )
    heads = [name for name in lost if name not in renamed and is_head(name)]
    if heads and tied:
        # Names of a part of a model may be without its embedding.
        embedding = embedding_name(name for name in all_names if name in headers or name in renamed)
        source = embedding_name(headers.names) if embedding is None else renamed.get(embedding, embedding)
        for name in heads:
            if source is not None:
                renamed[name] = source
                notes.append(
                    f"{name} is not stored in {other.role}, which ties it to {source}; that is taken for it"
                )
    return Counterparts(headers, renamed, made), notes


def _may_be_renamed(
    names: Checkpoint | Sequence[str], alone: Sequence[str], left: Sequence[str], other: Model
) -> bool:
    """Whether tensors could be others of another name, so that it is worth it to ask transformers, which is slow."""
    if isinstance(names, Sequence):
        return bool(left)
    shapes = {tuple(other.headers.tensor(name).shape) for name in left}
    return any(tuple(names.tensor(name).shape) in shapes for name in alone)


_Found = tuple[dict[str, str], dict[str, Made]]
"""Counterparts by name, and of what the others are made."""


def _by_loading(lost: Sequence[str], names: Sequence[str], other: Model) -> _Found:
    """Counterparts that are one parameter once transformers has loaded them, whatever the checkpoints call them."""
    theirs = live_names(other.config, other.headers.names)
    if not theirs.tensors:
        return {}, {}
    mine = {tensor: live for live, tensor in live_names(other.config, names).tensors.items()}
    return _joined({name: mine[name] for name in lost if name in mine}, theirs, {*names})


def _by_loading_both(
    lost: Sequence[str],
    names: Sequence[str],
    config: Mapping[str, Any],
    other: Model,
    taken: Container[str],
) -> _Found:
    """Counterparts whose parameters are called alike, but for a prefix, once each model is loaded as its own class.

    A language model and the one that it is a part of are different classes, each of which renames in its own way.
    """
    theirs, mine = live_names(other.config, other.headers.names), live_names(config, names)
    live = {tensor: name for name, tensor in mine.tensors.items()}
    left = [name for name, tensor in theirs.tensors.items() if tensor not in taken]
    wanted = [*(live[name] for name in lost if name in live), *mine.made]
    everything = [*theirs.tensors, *theirs.made]
    matched = match_names(wanted, [*left, *theirs.made], among=([*mine.tensors, *mine.made], everything))
    found, made = _joined(
        {mine.tensors[name]: its for name, its in matched.items() if name in mine.tensors}, theirs, taken
    )
    for name, its in matched.items():
        if name in mine.made and its in theirs.made:
            found |= _same_sources(mine.made[name], theirs.made[its])
    return {name: tensor for name, tensor in found.items() if name in {*lost}}, made


def _same_sources(mine: Made, theirs: Made) -> dict[str, str]:
    """Counterparts among the tensors that two models make a parameter of, if they make it in the same way."""
    counts = [[len(group) for group in made.sources] for made in (mine, theirs)]
    if mine.operations != theirs.operations or counts[0] != counts[1]:
        return {}
    pairs = zip(mine.sources, theirs.sources, strict=True)
    return {one: other for own, its in pairs for one, other in zip(own, its, strict=True)}


def _joined(live: Mapping[str, str], theirs: LiveNames, taken: Container[str]) -> _Found:
    """What becomes of names, by what they are called once they are loaded."""
    found = {name: tensor for name, its in live.items() if (tensor := theirs.tensors.get(its)) is not None}
    made = {name: made for name, its in live.items() if (made := theirs.made.get(its)) is not None}
    return {name: tensor for name, tensor in found.items() if tensor not in taken}, made
