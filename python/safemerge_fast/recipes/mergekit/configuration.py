"""What lies beside the weights: config.json with the output's layers, and whether models and vocabularies fit."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint.model import Model
from ...documents import TOKENIZER, parse_json, read_bytes
from ...errors import CheckpointError, PairingError, PlanError
from ...execution.companions import has_tokenizer
from ...printable import printable
from .models import Participant
from .slices import Section

__all__ = ["check_architectures", "check_vocabularies", "stacked_configuration", "tokenizer_model"]

_TOKENIZER = "tokenizer.json"

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

# Lists with an entry for each layer.
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")

# What a layer is follows from its number by these, unless the list behind the colon says it.
_BY_NUMBER = {
    "attn_layer_offset": "layers_block_type",
    "attn_layer_period": "layers_block_type",
    "decoder_sparse_step": "mlp_layer_types",
    "expert_layer_offset": "mlp_layer_types",
    "expert_layer_period": "mlp_layer_types",
    "first_k_dense_replace": "mlp_layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "interleave_moe_layer_step": "mlp_layer_types",
    "max_window_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
}

# Models with different values cannot be stacked on each other.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
)


def check_architectures(host: Participant, sections: Sequence[Section]) -> list[str]:
    """Compares the models' configurations: what is stacked must fit together.

    Args:
        host: The model that the output is shaped like.
        sections: The slices.

    Returns:
        Notes on model types that differ.

    Raises:
        PlanError: Layers are stacked that have other sizes than the host's.
    """
    notes = []
    mine = _text(host.model.config)
    for section in sections:
        for item in section.all_inputs:
            label, other = item.participant.label, _text(item.participant.model.config)
            for name in (*_SIZES, "model_type"):
                values = mine.get(name), other.get(name)
                if values[0] == values[1] or None in values:
                    continue
                if name == "model_type":
                    notes.append(f"the model_type is {values[0]} in {host.label} but {values[1]} in {label}")
                elif section.layers is not None:
                    raise PlanError(
                        f"{item.place}: {name} is {values[1]} in {label} but {values[0]} in {host.label}, so that "
                        f"their layers do not fit together; give models of one size"
                    )
    return list(dict.fromkeys(notes))


def stacked_configuration(
    host: Participant, layers: Sequence[tuple[Participant, int]]
) -> dict[str, Any] | None:
    """The host's configuration with the output's layers.

    Args:
        host: The model that the output is shaped like.
        layers: The model and the layer of it that each output layer is like.

    Returns:
        The configuration, or None if the host has none.

    Raises:
        PlanError: It says of layers what cannot be said of these.
    """
    if not host.model.config:
        return None
    config = copy.deepcopy(host.model.config)
    text = _text(config)
    count = host.layers("cut slices").count
    counts = [name for name in _COUNTS if text.get(name) == count]
    if not counts:
        raise PlanError(
            f"the config.json of {host.label} does not say its number of layers as num_hidden_layers, so that it "
            f"cannot be changed; write that field into it"
        )
    for name in counts:
        text[name] = len(layers)
    in_place = [layer for _, layer in layers] == list(range(count))
    for name, value in list(text.items()):
        if name in _LISTS and value is not None:
            text[name] = [_entry(participant, name, layer) for participant, layer in layers]
        elif not in_place and _follows_number(text, name, value, [layer for _, layer in layers], count):
            raise PlanError(
                f"the config.json of {host.label} says by {name} which layers are of which kind, which slices would "
                f"change; merge whole models, or give layer_types"
            )
    return config


def _entry(participant: Participant, name: str, layer: int) -> Any:
    """What a model's list says of one of its layers."""
    entries = _text(participant.model.config).get(name)
    if not isinstance(entries, list) or layer >= len(entries):
        raise PlanError(
            f"the config.json of {participant.label} should have an entry for layer {layer} in {name}, as other "
            f"models' have; write it there"
        )
    return entries[layer]


def _follows_number(
    text: dict[str, Any], name: str, value: object, layers: Sequence[int], count: int
) -> bool:
    """Whether a field tells kinds of layers by their numbers, so that it is wrong for these layers."""
    if name in _BY_NUMBER:
        if text.get(_BY_NUMBER[name]) is not None:
            return False
        if name == "first_k_dense_replace" and isinstance(value, int):
            return any((number < value) != (layer < value) for number, layer in enumerate(layers))
        if name == "max_window_layers" and not text.get("use_sliding_window"):
            return False
        return value not in (None, 0, 1)
    if (
        isinstance(value, list)
        and len(value) == count
        and not name.endswith(("_id", "_ids", "architectures"))
    ):
        return True
    # Lists of layers' numbers, such as mlp_only_layers, and patterns.
    speaks = "layer" in name or "block" in name or "pattern" in name
    return speaks and isinstance(value, list | dict | str) and bool(value)


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is about the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) and "num_hidden_layers" in text else config


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
    mine = _tokenizer_file(tokenizer)
    notes = []
    for other in others:
        theirs = _tokenizer_file(other)
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


def _tokenizer_file(participant: Participant) -> Path | None:
    for model in (participant.adapter, participant.model):
        if model is not None:
            path = (model.path if model.path.is_dir() else model.path.parent) / _TOKENIZER
            if path.is_file():
                return path
    return None


def _agree(mine: Path, theirs: Path) -> bool:
    """Whether no number means one token here and another there; either may have tokens the other has not."""
    if mine.samefile(theirs):
        return True
    texts = [read_bytes(file, CheckpointError, limit=TOKENIZER) for file in (mine, theirs)]
    if texts[0] == texts[1]:
        return True
    tokens, others = _tokens(mine, texts[0]), _tokens(theirs, texts[1])
    return all(others.get(number, token) == token for number, token in tokens.items())


def _tokens(path: Path, text: bytes) -> dict[int, str]:
    """Tokens by their numbers."""
    document = parse_json(text, CheckpointError, subject=str(path), limit=TOKENIZER, nonfinite=True)
    try:
        vocabulary = document["model"].get("vocab") or {}
        tokens = (
            {number: token for token, number in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else {number: token for number, (token, *_) in enumerate(vocabulary)}
        )
        return tokens | {token["id"]: token["content"] for token in document.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a tokenizer as the library tokenizers writes it: {printable(repr(error))}"
        ) from error
