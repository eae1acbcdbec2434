"""Tied weights: heads that are the embedding, and which tensors these are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["embedding_name", "is_head", "is_tied_table", "ties_head"]

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|lm_head\.decoder|predictions\.decoder|proj_out)\.weight$")
_TIED_TABLE = re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings?|tok_embeddings|tokens_embed|shared|(backbone|rwkv)\.embeddings)"
    r"\.weight$"
)


def is_head(name: str) -> bool:
    """Whether a tensor is an output head that models tie to their embedding."""
    return _HEAD.search(name) is not None


def is_tied_table(name: str) -> bool:
    """Whether a tensor is one of the tables of an encoder and a decoder that share one."""
    return _TIED_TABLE.search(name) is not None


def embedding_name(names: Iterable[str]) -> str | None:
    """The first of the names that is an embedding of tokens."""
    return next((name for name in names if _EMBEDDING.search(name)), None)


def ties_head(config: Mapping[str, Any], *, default: bool = True) -> bool:
    """Whether a model's head is its embedding.

    Args:
        config: Its config.json.
        default: The answer where the configuration does not say; transformers takes it for true.
    """
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", default) if isinstance(text, Mapping) else default
    return config.get("tie_word_embeddings", inner) is not False
