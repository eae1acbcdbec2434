"""What the shapes and configurations of the models say once: sizes of vocabularies, numbers of experts, families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.model import Model
from .tied import embedding_name

__all__ = ["Structure", "decoder_layers", "structure_of"]

_EXPERTS = frozenset(
    {
        "moe_num_experts",
        "n_routed_experts",
        "num_experts",
        "num_local_experts",
        "num_routed_experts",
        "router_num_experts",
    }
)
_HIDDEN = frozenset({"d_model", "dim", "embed_dim", "hidden_dim", "hidden_size", "model_dim", "n_embd"})
_STACKED = re.compile(r"^(num|n)_(\w*codebook\w*|mel\w*|quantizers|books)$")
_EXPERT = re.compile(r"^(?P<parent>.*\.)?experts\.(?P<number>\d{1,9})\.")
_STACK = re.compile(r"^(?P<parent>.*\.)?(experts\.\w+|\w*(input|output)_linear\.weight)$")

# Configurations nest a few times; what is deeper was made to take long.
_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Structure:
    """What holds of a whole model, as its tensors are sorted by it.

    Attributes:
        model_types: Of all parts of all roles' configurations; empty if there is no configuration.
        vocabularies: Rows that a table or a head of tokens may have.
        experts: How many experts a layer may have, by the configurations.
        routed: The same for modules that hold experts, by what their names begin with, e.g. "model.layers.3.mlp.".
        hidden: Sizes of hidden states.
        labels: How many labels a classifier may tell apart.
        layers: Number of decoder layers, or None; what lies past it predicts further tokens (MTP).
    """

    model_types: frozenset[str]
    vocabularies: frozenset[int]
    experts: frozenset[int]
    routed: Mapping[str, int]
    hidden: frozenset[int]
    labels: frozenset[int]
    layers: int | None


def structure_of(anchor: Model, others: Iterable[Model] = ()) -> Structure:
    """Looks at a model's headers, and at the configuration of every role: that of one may be missing.

    Args:
        anchor: The model whose tensors are to be sorted.
        others: The other roles' models.
    """
    configs = [anchor.config, *(model.config for model in others)]
    parts = [part for config in configs for part in _parts(config)]
    vocabularies: set[int] = set()
    for part in parts:
        vocabularies |= set(_vocabularies(part))
    embedding = embedding_name(anchor.headers.names)
    if embedding is not None:
        # A vocabulary that grew, or was padded, whatever the configuration says.
        vocabularies |= set(anchor.headers.tensor(embedding).shape[:1])
    routed = _routed(anchor)
    layers = (decoder_layers(config) for config in configs)
    return Structure(
        model_types=frozenset(str(part["model_type"]) for part in parts if "model_type" in part),
        vocabularies=frozenset(size for size in vocabularies if size > 1),
        experts=frozenset(_numbers(parts, _EXPERTS)) | frozenset(routed.values()),
        routed=routed,
        hidden=frozenset(_numbers(parts, _HIDDEN)),
        labels=frozenset(_labels(parts)),
        layers=next((count for count in layers if count is not None), None),
    )


def decoder_layers(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers by the configuration; what lies past it predicts further tokens (MTP)."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        count = part.get("num_hidden_layers")
        if isinstance(count, int) and count > 0:
            return count
    return None


def _parts(config: Mapping[str, Any], depth: int = _DEPTH) -> Iterator[Mapping[str, Any]]:
    """A configuration and those nested in it."""
    yield config
    for value in config.values() if depth else ():
        if isinstance(value, Mapping):
            yield from _parts(value, depth - 1)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numbers(parts: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> Iterator[int]:
    """Numbers under these keys; some families give one for each layer, or for each kind of expert."""
    names = tuple(keys)
    for part in parts:
        for name in names:
            value = part.get(name)
            for each in value if isinstance(value, list) else (value,):
                if isinstance(each, int) and _whole(each):
                    yield each


def _vocabularies(part: Mapping[str, Any]) -> Iterator[int]:
    """Sizes of vocabularies, also of several that lie in one table."""
    own = [
        value
        for key, value in part.items()
        if isinstance(key, str)
        and _whole(value)
        and (("vocab" in key and "type_vocab" not in key) or key == "codebook_size")
    ]
    yield from own
    for key, value in part.items():
        if isinstance(key, str) and _whole(value) and _STACKED.match(key):
            yield from (size * value for size in own)


def _labels(parts: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    """Numbers of labels; two is what transformers does not write down."""
    yield 2
    for part in parts:
        labels, count = part.get("id2label"), part.get("num_labels")
        if isinstance(labels, Mapping) and labels:
            yield len(labels)
        if isinstance(count, int) and _whole(count):
            yield count


def _routed(model: Model) -> dict[str, int]:
    """Modules that hold experts, and how many."""
    counts: dict[str, int] = {}
    for tensor in model.headers.tensors:
        name = tensor.name
        # Most models have none, and the patterns are slower.
        if "expert" not in name and "put_linear" not in name:
            continue
        if match := _EXPERT.match(name):
            parent = match["parent"] or ""
            counts[parent] = max(counts.get(parent, 0), int(match["number"]) + 1)
        elif len(tensor.shape) == 3 and (match := _STACK.match(name)):
            counts.setdefault(match["parent"] or "", tensor.shape[0])
    return counts
