"""Tensors of the aligned model that an output would lack: which of them matter, and what the others are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .._engine import TensorInfo
from ..checkpoint.model import Model
from ..errors import PairingError
from .encoded import encoded_of
from .modules import layer_of, module_type, predicts_further
from .names import is_of_other_tower, prefix_of_layers
from .row import Row
from .structure import decoder_layers
from .tied import embedding_name, is_head, is_tied_table, ties_head

__all__ = [
    "Lacking",
    "Missing",
    "filled_config",
    "filled_rows",
    "lacking_tensors",
    "reduced_config",
    "require_complete",
]

FILLED = "filled from aligned"
"""What a row is called whose tensor the fine-tuned model lacks."""

# Buffers that models compute, which older checkpoints store.
_COMPUTED = re.compile(
    r"(^|\.)(\w*inv_freq|position_ids|token_type_ids|masked_bias|relative_position_index|"
    r"(cos|sin)_cached|embed_positions\.weights|\w*_float_tensor)$"
)
_COUNTS = re.compile(r"(^|_)(nextn|mtp)_\w*layers$")
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.(bias|mask)$")


class Missing(Enum):
    """What becomes of tensors of the aligned model that the fine-tuned one lacks."""

    NOTE = "they are noted, since nothing is written"
    REFUSE = "they are refused"
    LEAVE_OUT = "they are left out"
    FILL = "they are copied from the aligned model"


@dataclass(frozen=True, slots=True)
class Lacking:
    """What an output lacks.

    Attributes:
        names: Tensors of the aligned model that nothing accounts for.
        notes: What accounts for others, in sentences.
    """

    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def lacking_tensors(anchor: Model, aligned: Model, met: Collection[str]) -> Lacking:
    """Finds the tensors of the aligned model that an output shaped like the fine-tuned one lacks.

    Buffers that models compute, a head that the fine-tuned model ties to its embedding, and the other towers of a
    multimodal model whose language model alone was fine-tuned are accounted for.

    Args:
        anchor: The model that the output is shaped like.
        aligned: The aligned model.
        met: Its tensors that have counterparts in the anchor, whatever their shapes.
    """
    left = [tensor for tensor in aligned.headers.tensors if tensor.name not in met]
    if not left:
        return Lacking()
    embedding = embedding_name(anchor.headers.names)
    language = _language_prefixes(anchor, aligned, met)
    names: list[str] = []
    notes: list[str] = []
    towers: list[str] = []
    for tensor in left:
        name = tensor.name
        if _is_computed(tensor):
            continue
        if embedding is not None and (
            (is_head(name) and _ties_head(anchor.config, aligned.config))
            or (is_tied_table(name) and name != embedding)
        ):
            notes.append(f"{name} of aligned is not in the output, which ties it to {embedding}")
        elif language and not name.startswith(language) and not predicts_further(name, None):
            towers.append(name)
        else:
            names.append(name)
    if towers:
        notes.append(
            f"the fine-tuned model is the language model of aligned alone, and so is the output: {len(towers)} tensors "
            f"of aligned's other parts, such as {towers[0]}, are not in it"
        )
    return Lacking(tuple(names), tuple(notes))


def require_complete(lacking: Lacking) -> None:
    """Refuses an output that lacks tensors.

    Raises:
        PairingError: It does.
    """
    if not lacking.names:
        return
    count = len(lacking.names)
    more = f" and {count - 3} more" if count > 3 else ""
    raise PairingError(
        f"finetuned lacks {count} tensors that aligned has, and so would the output: "
        f"{', '.join(lacking.names[:3])}{more}; give the whole fine-tuned model, copy them with --fill-from aligned, "
        f"or do without them with --allow-missing"
    )


def filled_rows(lacking: Lacking, anchor: Model, aligned: Model) -> list[Row]:
    """Makes rows of what is lacking: copies of the aligned model's tensors, behind all others."""
    last = anchor.headers.tensors[-1].file
    return [
        Row(
            name=name,
            file=last,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            names={aligned.role: name},
            module_type=module_type(name, ""),
            layer=layer_of(name),
            analysed=False,
            transposed=False,
            reason=FILLED,
            encoded=encoded_of(tensor, aligned.role),
        )
        for name in lacking.names
        for tensor in (aligned.headers.tensor(name),)
    ]


def filled_config(config: Mapping[str, Any], aligned: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that counts the layers for multi-token prediction as the aligned model's does."""
    written = {**config, **{key: value for key, value in aligned.items() if _COUNTS.search(key)}}
    text, theirs = config.get("text_config"), aligned.get("text_config")
    if isinstance(text, Mapping) and isinstance(theirs, Mapping):
        written["text_config"] = filled_config(text, theirs)
    return written


def reduced_config(config: Mapping[str, Any], aligned: Mapping[str, Any], lacking: Lacking) -> dict[str, Any]:
    """A configuration that counts no layers for multi-token prediction, if those are what is lacking."""
    layers = decoder_layers(aligned)
    written = dict(config)
    if not any(predicts_further(name, layers) for name in lacking.names):
        return written
    written |= {key: 0 for key, value in config.items() if _COUNTS.search(key) and value}
    text = config.get("text_config")
    if isinstance(text, Mapping):
        written["text_config"] = reduced_config(text, aligned, lacking)
    return written


def _is_computed(tensor: TensorInfo) -> bool:
    mask = _MASK.search(tensor.name) is not None and len(tensor.shape) != 1
    return mask or _COMPUTED.search(tensor.name) is not None


def _ties_head(config: Mapping[str, Any], aligned: Mapping[str, Any]) -> bool:
    """Whether the fine-tuned model ties its head; where its configuration does not say, it is the aligned one's way."""
    return ties_head(config, default=ties_head(aligned))


def _language_prefixes(anchor: Model, aligned: Model, met: Collection[str]) -> tuple[str, ...]:
    """What names begin with in the part of a multimodal model that a language model was made of; else nothing."""
    if _is_multimodal(anchor) or not _is_multimodal(aligned):
        return ()
    prefixes = {prefix for name in met if (prefix := prefix_of_layers(name)) is not None}
    # A head lies beside the part; one that is lacking is not of vision.
    return (*sorted(prefixes), "lm_head.", "language_model.lm_head.") if prefixes - {""} else ()


def _is_multimodal(model: Model) -> bool:
    """Whether a model has other parts beside a language model, by its names and its configuration."""
    if any(is_of_other_tower(f"{key}.") for key in model.config if key.endswith("_config")):
        return True
    return any(map(is_of_other_tower, model.headers.names))
