"""What a tensor is, from its name, dtype and shape: its module type, its layer, and whether to analyse it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .._engine import TensorInfo
from ..checkpoint.model import FLOATS

__all__ = [
    "MTP",
    "PROJECTION",
    "classify",
    "decoder_layers",
    "is_float_matrix",
    "is_stored_transposed",
    "layer_of",
    "module_type",
]

PROJECTION = "projection"
"""What classify says of a tensor that is analysed by default."""

MTP = "multi-token prediction (MTP)"
"""What classify says of a tensor that predicts further tokens."""

_LAYER = re.compile(r"^(?:.*?\.)?[A-Za-z_]\w*\.(?P<index>\d+)(?=\.)")
_DECODER_LAYER = re.compile(
    r"^(model\.|model\.language_model\.|language_model\.model\.)?layers\.(?P<index>\d{1,9})\."
)
_MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
_NORM = re.compile(r"norm|^ln(_|\d|$)")
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head|"
    r"output)\."
)
_EMBEDDING = re.compile(r"^(embed(?!.*proj).*|.*_embed|.*embeddings?|wte|wpe|shared)$")
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)\.")
_CONVOLUTION = re.compile(r"(^|\.)conv(1d|2d|3d|\d*)\.")
_EXPERT = re.compile(r"(^|\.)experts(\.|$)")
_SHARED_EXPERT = re.compile(r"(^|\.)shared_experts?\.")

# Model types of transformers whose projections are Conv1D modules, stored as (in, out), and those modules'
# names.
_CONV1D_MODEL_TYPES = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_MODULES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def is_float_matrix(tensor: TensorInfo) -> bool:
    """Whether a tensor can be analysed at all: 2-D, of a dtype that can be averaged, and not empty."""
    return tensor.dtype in FLOATS and len(tensor.shape) == 2 and 0 not in tensor.shape


def decoder_layers(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers by the configuration; what lies past it predicts further tokens (MTP)."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        count = part.get("num_hidden_layers")
        if isinstance(count, int) and count > 0:
            return count
    return None


def is_stored_transposed(tensor: TensorInfo, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is stored as (in, out), as GPT-2's Conv1D is."""
    conv1d = config.get("model_type") in _CONV1D_MODEL_TYPES
    return conv1d and len(tensor.shape) == 2 and _leaf(tensor.name) in _CONV1D_MODULES


def layer_of(name: str) -> str | None:
    """The layer that a tensor belongs to, e.g. "model.layers.7", or None."""
    match = _LAYER.match(name)
    return None if match is None else match[0]


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def classify(tensor: TensorInfo, layers: int | None) -> str:
    """Says why a tensor is left out of the analysis by default.

    Args:
        tensor: The tensor.
        layers: What decoder_layers says of the model's configuration.

    Returns:
        A noun for reports ("norm", "embedding", …), or PROJECTION for a 2-D float weight that is none of
        these.
    """
    name, shape = tensor.name, tensor.shape
    decoder = None if layers is None else _DECODER_LAYER.match(name)
    past = decoder is not None and layers is not None and int(decoder["index"]) >= layers
    # Layers and experts differ by their numbers only, so that a model has few kinds of names.
    return _classify(_NUMBER.sub("0", name), tensor.dtype, len(shape), 0 in shape, past)


@lru_cache(maxsize=4096)
def _classify(name: str, dtype: str, dimensions: int, empty: bool, past: bool) -> str:
    """What classify says of a tensor, but for the numbers in its name; `past` is whether it lies past the layers."""
    leaf = _leaf(name)
    # The first that holds is the reason.
    reasons = (
        (dtype not in FLOATS, f"not a float tensor ({dtype})"),
        (empty, "empty tensor"),
        (past or _MTP.search(name) is not None, MTP),
        (name.endswith("bias"), "bias"),
        (_NORM.search(leaf) is not None, "norm"),
        (layer_of(name) is None and _HEAD.search(name) is not None, "head"),
        (_EMBEDDING.search(leaf) is not None, "embedding"),
        (_ROUTER.search(name) is not None, "router"),
        (_CONVOLUTION.search(name) is not None, "convolution"),
        (dimensions == 3 and _EXPERT.search(name) is not None, "fused experts"),
        (dimensions != 2, f"{dimensions}-D tensor"),
        (not name.endswith(".weight"), "not a weight matrix"),
    )
    return next((reason for holds, reason in reasons if holds), PROJECTION)


def module_type(name: str, reason: str) -> str:
    """The type that a tensor is counted under, e.g. "q_proj", "experts.gate_proj", "embed_tokens", "norm".

    Args:
        name: The tensor's name.
        reason: What classify says of it.
    """
    if reason in ("norm", "bias", "router"):
        return reason
    leaf = _leaf(name)
    if _SHARED_EXPERT.search(name):
        return f"shared_expert.{leaf}"
    return f"experts.{leaf}" if _EXPERT.search(name) else leaf


def _leaf(name: str) -> str:
    """The module's own name: the last part before "weight" or "bias"; two parts if that is a number."""
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] in ("weight", "bias"):
        parts = parts[:-1]
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]
