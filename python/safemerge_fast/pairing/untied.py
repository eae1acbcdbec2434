"""A head of its own for a model that ties it to its embedding, on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.model import Model
from ..errors import PairingError
from .counterparts import Counterparts
from .operand import Operand, Term
from .row import NOT_ADAPTED, Row
from .tied import embedding_name, is_head

__all__ = ["untied_config", "untied_head"]


def untied_head(
    anchor: Model,
    others: Mapping[str, Model],
    matches: Mapping[str, Counterparts],
    adapters: Iterable[str],
    adapted: str,
) -> Row | None:
    """Makes the row of a head that the output gets beside its embedding.

    Args:
        anchor: The model that the output is shaped like.
        others: The other checkpoints by role; a head that one of them stores is taken, else its embedding.
        matches: The names of the anchor's tensors there.
        adapters: Roles that are adapters. Their head is the embedding as it was, which is what PEFT computes with as
            long as an adapter is not merged.
        adapted: The role that they are adapters of.

    Returns:
        The row; None if the anchor stores a head.

    Raises:
        PairingError: No embedding of tokens is found.
    """
    if any(map(is_head, anchor.headers.names)):
        return None
    embedding = embedding_name(anchor.headers.names)
    if embedding is None:
        raise PairingError(
            f"--untie makes a head of the embedding of tokens, and {anchor.role} has none that is known by its name; "
            f"leave it out"
        )
    table = anchor.headers.tensor(embedding)
    shape = tuple(table.shape)
    heads = {role: next(filter(is_head, model.headers.names), None) for role, model in others.items()}
    name = next((head for head in heads.values() if head is not None), None)
    if name is None:
        name = "embed_out.weight" if embedding.endswith("embed_in.weight") else "lm_head.weight"
    names = {anchor.role: embedding}
    for role, model in others.items():
        own = heads[role] or matches[role].get(embedding)
        if own is not None and tuple(model.headers.tensor(own).shape) == shape:
            names[role] = own
    plain = (Term(Operand(adapted, names[adapted])),) if adapted in names else ()
    return Row(
        name=name,
        file=anchor.headers.tensors[-1].file,
        dtype=table.dtype,
        shape=shape,
        names=names,
        module_type="lm_head",
        layer=None,
        analysed=False,
        transposed=False,
        reason="head, untied from the embedding",
        adapted=dict.fromkeys(adapters, plain) if plain else NOT_ADAPTED,
    )


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says that the head is a tensor of its own."""
    text = config.get("text_config")
    written = {**config, "tie_word_embeddings": False}
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        written["text_config"] = {**text, "tie_word_embeddings": False}
    return written
