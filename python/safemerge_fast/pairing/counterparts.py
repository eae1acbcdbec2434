"""Which tensor of one model is which of another: by name, exactly or but for a prefix, and heads that are tied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._engine import Checkpoint
from ..checkpoint.model import Model
from .live_names import live_names
from .names import match_names
from .tied import embedding_name, is_head, ties_head

__all__ = ["Counterparts", "counterparts"]


class Counterparts:
    """The names that one model's tensors have in another model: mostly their own."""

    def __init__(self, headers: Checkpoint, renamed: Mapping[str, str]) -> None:
        """Holds what differs.

        Args:
            headers: The other model's.
            renamed: Names that are others there.
        """
        self._headers = headers
        self._renamed = renamed

    def get(self, name: str) -> str | None:
        """The counterpart of a name, or None."""
        return name if name in self._headers else self._renamed.get(name)


def counterparts(names: Checkpoint | Sequence[str], other: Model) -> tuple[Counterparts, list[str]]:
    """Maps names of one model's tensors to another model's; and says what was not an exact match.

    Args:
        names: Names of the one model, or its headers; a head that the other does not store because it ties it is the
            embedding.
        other: The other model.

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
    alone = [name for name in lost if name not in renamed and not (tied and is_head(name))]
    if alone and _may_be_renamed(names, alone, left, other):
        found = _by_loading(alone, all_names, other)
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
    return Counterparts(headers, renamed), notes


def _may_be_renamed(
    names: Checkpoint | Sequence[str], alone: Sequence[str], left: Sequence[str], other: Model
) -> bool:
    """Whether tensors could be others of another name, so that it is worth it to ask transformers, which is slow."""
    if isinstance(names, Sequence):
        return bool(left)
    shapes = {tuple(other.headers.tensor(name).shape) for name in left}
    return any(tuple(names.tensor(name).shape) in shapes for name in alone)


def _by_loading(lost: Sequence[str], names: Sequence[str], other: Model) -> dict[str, str]:
    """Counterparts that are one parameter once transformers has loaded them, whatever the checkpoints call them."""
    theirs = live_names(other.config, other.headers.names).tensors
    if not theirs:
        return {}
    mine = {tensor: live for live, tensor in live_names(other.config, names).tensors.items()}
    taken = set(names)
    found = {name: tensor for name in lost if (tensor := theirs.get(mine.get(name, ""))) is not None}
    return {name: tensor for name, tensor in found.items() if tensor not in taken}
