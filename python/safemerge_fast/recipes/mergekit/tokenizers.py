"""Whose tokenizer the output gets, and whether the models' vocabularies are one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ...checkpoint.model import Model
from ...errors import CheckpointError, PairingError
from ...execution.companions import has_tokenizer
from .references import Participant

__all__ = ["check_vocabularies", "tokenizer_model"]

_FILE = "tokenizer.json"


def tokenizer_model(participant: Participant, asked: str | None) -> Model:
    """The checkpoint or adapter whose tokenizer is copied.

    Args:
        participant: Whose tokenizer it is: an adapter's if it has one, else the checkpoint's.
        asked: Where the configuration asks for this one's tokenizer, or None if it does not.

    Raises:
        CheckpointError: It is asked for, and there is none.
    """
    for model in (participant.adapter, participant.model):
        if model is not None and has_tokenizer(model):
            return model
    if asked is not None:
        raise CheckpointError(
            f"{asked}: {participant.model.path} has neither tokenizer.json nor tokenizer_config.json; name a model "
            f"that has a tokenizer"
        )
    return participant.model


def check_vocabularies(tokenizer: Participant, others: Iterable[Participant], asked: str | None) -> list[str]:
    """Compares which token is which row of the embedding.

    Args:
        tokenizer: The model whose tokenizer the output gets.
        others: All models that are merged.
        asked: Where the configuration names it, or None.

    Returns:
        Notes on models that have other vocabularies.

    Raises:
        PairingError: The configuration names a tokenizer, and a model has another vocabulary.
    """
    mine = _file(tokenizer)
    notes = []
    for other in others:
        theirs = _file(other)
        if mine is None or theirs is None or _agree(mine, theirs):
            continue
        sentence = (
            f"the vocabulary of {other.label} ({theirs}) differs from that of {tokenizer.label} ({mine})"
        )
        if asked is not None:
            raise PairingError(
                f"{asked}: {sentence}, and rows of embeddings are not rearranged here; give all models one "
                f"vocabulary first"
            )
        notes.append(f"{sentence}: rows of the embedding that are merged may mean different tokens")
    return notes


def _file(participant: Participant) -> Path | None:
    for model in (participant.adapter, participant.model):
        if model is not None:
            path = (model.path if model.path.is_dir() else model.path.parent) / _FILE
            if path.is_file():
                return path
    return None


def _agree(mine: Path, theirs: Path) -> bool:
    """Whether no number means one token here and another there; either may have tokens the other has not."""
    if mine.samefile(theirs) or (texts := (mine.read_bytes(), theirs.read_bytes()))[0] == texts[1]:
        return True
    tokens, others = _tokens(mine, texts[0]), _tokens(theirs, texts[1])
    return all(others.get(number, token) == token for number, token in tokens.items())


def _tokens(path: Path, text: bytes) -> dict[int, str]:
    """Tokens by their numbers."""
    try:
        document = json.loads(text)
        vocabulary = document["model"].get("vocab") or {}
        tokens = (
            {number: token for token, number in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else {number: token for number, (token, *_) in enumerate(vocabulary)}
        )
        return tokens | {token["id"]: token["content"] for token in document.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a tokenizer as the library tokenizers writes it: {error}"
        ) from error
