"""What a tensor is, by its shape, its neighbours and its name: its module type, its layer, whether to analyse it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .._engine import TensorInfo
from ..checkpoint.model import FLOATS, Model
from .structure import Structure, decoder_layers

__all__ = [
    "EMBEDDING",
    "HEAD",
    "MTP",
    "PROJECTION",
    "Classifier",
    "classify",
    "decoder_layers",
    "is_conv1d_name",
    "is_float_matrix",
    "is_projection_of_heads",
    "is_stored_transposed",
    "layer_of",
    "leads_into_heads",
    "lies_in_layer",
    "module_type",
    "own_name",
    "predicts_further",
]

PROJECTION = "projection"
"""What a tensor is called that is analysed by default."""

HEAD = "head"
"""What makes tokens, labels or scores of hidden states."""

EMBEDDING = "embedding"
"""A table whose rows are looked up: tokens, positions, segments, relative positions."""

MTP = "multi-token prediction (MTP)"
"""What classify says of a tensor that predicts further tokens."""

_LAYER = re.compile(r"^(?:.*?\.)?[A-Za-z_]\w*\.(?P<index>\d+)(?=\.)")
_DECODER_LAYER = re.compile(
    r"^(model\.|model\.language_model\.|language_model\.model\.)?layers\.(?P<index>\d{1,9})\."
)
_MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
_NORM = re.compile(r"norm|^ln(_|\d|$)")
_HEAD = re.compile(
    r"(^|\.)(lm_heads?|embed_out|unembed|score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head|"
    r"class_embed|seq_relationship)\."
)
_HEAD_NAME = re.compile(r"(^|_)heads?$|^(output|cls)$")
_HEAD_WORD = re.compile(r"head|unembed|output|decoder|pred|logit|softmax|cls|classif|proj|^lm|(^|\.)out")
# Words of the names of tables, and words that say that a matrix makes something of vectors instead.
_TABLE_WORD = re.compile(r"(embed|embeds|embedder|embedding|embeddings|emb|embs)$|^(wte|wpe)$")
_NO_TABLE = re.compile(r"proj|linear|mapping|transform|dense|patch|fc\d|mlp|merger|layernorm")
_TABLE = re.compile(
    r"(^|\.)(relative_attention_bias\w*\.(weight|bias_values\.weight)|rel_pos\w*\.weight|\w*_token\.weight|"
    r"query_feat\.weight|embed_positions\.\w+\.weight|\w*bias_values\.weight)$"
)
_ROUTER = re.compile(r"(^|\.)(router|gate(?=\.(?!weight))|shared_expert_gate)\.")
_GATE = re.compile(r"(^|\.)gate\.weight(_\d+)?$")
_MIXTURE = re.compile(r"mlp|moe|ffn|feed_forward|mixer|expert|(^|\.)layers\.0\.gate\.")
_CONVOLUTION = re.compile(r"^conv(1d|2d|3d|\d*)$")
_CONVOLUTION_PART = re.compile(r"(^|\.)conv(1d|2d|3d|\d*)\.")
_EXPERT = re.compile(r"(^|\.)experts(\.|$)")
_SHARED_EXPERT = re.compile(r"(^|\.)shared_experts?\.")
# Matrices that are parameters of their module, not of a Linear in it: MultiheadAttention's, and a few others.
_BARE_MATRIX = re.compile(r"(^|\.)((in|q|k|v)_proj_weight|\w*_proj)$")
# XLNet's, (hidden, heads, head size): h·q, but for o into hidden states, o·h.
_OF_HEADS = re.compile(r"(^|\.)rel_attn\.(?P<which>[qkvor])$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

# Model types of transformers whose projections are Conv1D modules, stored as (in, out), and those modules'
# names.
_CONV1D_MODEL_TYPES = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_MODULES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def is_float_matrix(tensor: TensorInfo) -> bool:
    """Whether a tensor can be analysed at all: 2-D, of a dtype that can be averaged, and not empty."""
    return tensor.dtype in FLOATS and len(tensor.shape) == 2 and 0 not in tensor.shape


def is_conv1d_name(name: str) -> bool:
    """Whether a tensor's module is called as GPT-2's Conv1D modules are, which are Linear in other families."""
    return own_name(name) in _CONV1D_MODULES


def is_stored_transposed(tensor: TensorInfo, config: Mapping[str, Any]) -> bool:
    """Whether a matrix is stored as (in, out), by the family that one configuration names; Orientations knows more."""
    conv1d = config.get("model_type") in _CONV1D_MODEL_TYPES
    return conv1d and len(tensor.shape) == 2 and is_conv1d_name(tensor.name)


def layer_of(name: str) -> str | None:
    """The layer that a tensor belongs to, e.g. "model.layers.7", or None."""
    match = _LAYER.match(name)
    return None if match is None else match[0]


def is_projection_of_heads(name: str, dimensions: int) -> bool:
    """Whether a tensor of three dimensions is a matrix whose second side is that of heads, as XLNet has them."""
    return dimensions == 3 and _OF_HEADS.search(name) is not None


def leads_into_heads(name: str) -> bool:
    """Whether such a matrix is stored as (in, out): all but the one that leads back to hidden states."""
    match = _OF_HEADS.search(name)
    return match is not None and match["which"] != "o"


def lies_in_layer(name: str) -> bool:
    """Whether a tensor belongs to a module of a layer, and is not itself one of a list: `lm_heads.3.weight` is not."""
    layer = layer_of(name)
    return layer is not None and name[len(layer) + 1 :] not in ("weight", "bias")


def predicts_further(name: str, layers: int | None) -> bool:
    """Whether a tensor is of multi-token prediction (MTP): by its name, or past the decoder's layers."""
    decoder = None if layers is None else _DECODER_LAYER.match(name)
    past = decoder is not None and layers is not None and int(decoder["index"]) >= layers
    return past or _MTP.search(name) is not None


def classify(tensor: TensorInfo, layers: int | None) -> str:
    """What a tensor is called that nothing is known of but its model's number of layers; see Classifier."""
    structure = Structure(frozenset(), frozenset(), frozenset(), {}, frozenset(), frozenset(), layers)
    return _Kinds(structure).kind(tensor, has_bias=False)


class Classifier:
    """Says what the tensors of one model are."""

    def __init__(self, model: Model, structure: Structure) -> None:
        """Remembers what it is to look at.

        Args:
            model: The model.
            structure: What its shapes and all configurations say.
        """
        self._headers = model.headers
        self._kinds = _Kinds(structure)

    def __call__(self, tensor: TensorInfo) -> str:
        """Says why a tensor is left out of the analysis by default.

        Returns:
            A noun for reports ("norm", "embedding", …), or PROJECTION for a float matrix that is none of these.
        """
        name = tensor.name
        has_bias = name.endswith("weight") and f"{name.removesuffix('weight')}bias" in self._headers
        return self._kinds.kind(tensor, has_bias=has_bias)


class _Kinds:
    """The rules. Layers and experts differ by their numbers only, so that a model has few kinds of names."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._known: dict[tuple[object, ...], str] = {}

    def kind(self, tensor: TensorInfo, *, has_bias: bool) -> str:
        """What a tensor is called."""
        name = tensor.name
        further = predicts_further(name, self._structure.layers)
        shape = tuple(tensor.shape)
        routes = len(shape) == 2 and self._routes(name, shape)
        key = (_NUMBER.sub("0", name), tensor.dtype, shape, has_bias, further, routes)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._decide(key[0], tensor.dtype, shape, has_bias, further, routes)
        return found

    def _decide(
        self, name: str, dtype: str, shape: tuple[int, ...], has_bias: bool, further: bool, routes: bool
    ) -> str:
        own, dimensions = own_name(name), len(shape)
        matrix = dimensions == 2
        # The first that holds is the reason.
        reasons = (
            (dtype not in FLOATS, f"not a float tensor ({dtype})"),
            (0 in shape, "empty tensor"),
            (further, MTP),
            (name.endswith("bias"), "bias"),
            (_NORM.search(own) is not None and not own.endswith("_proj"), "norm"),
            (not lies_in_layer(name) and self._is_head(name, own, shape), HEAD),
            (not has_bias and self._is_table(name, own, shape), EMBEDDING),
            (routes or self._is_router(name, shape), "router"),
            (
                (_CONVOLUTION if matrix else _CONVOLUTION_PART).search(own if matrix else name) is not None,
                "convolution",
            ),
            (dimensions == 3 and _EXPERT.search(name) is not None, "fused experts"),
            (not matrix and not is_projection_of_heads(name, dimensions), f"{dimensions}-D tensor"),
            (
                matrix and not name.endswith(".weight") and _BARE_MATRIX.search(name) is None,
                "not a weight matrix",
            ),
        )
        return next((reason for holds, reason in reasons if holds), PROJECTION)

    def _is_head(self, name: str, own: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor outside of all layers is a head, by its name or its rows."""
        if len(shape) != 2:
            return False
        if _HEAD.search(name) is not None or _HEAD_NAME.search(own) is not None:
            return True
        if _TABLE_WORD.search(own.lower()) is not None:
            return False
        rows = shape[0]
        if rows in self._structure.labels and rows < shape[1]:
            return name.endswith(".weight") and _TABLE.search(name) is None
        return self._is_vocabulary(rows) and _HEAD_WORD.search(name) is not None

    def _is_table(self, name: str, own: str, shape: tuple[int, ...]) -> bool:
        """Whether rows of a tensor are looked up, by its name or its rows; a table has no bias."""
        if _TABLE.search(name) is not None:
            return True
        word = own.lower().rstrip("_.0123456789")
        if word == "shared" and not lies_in_layer(name):
            return True
        if (_TABLE_WORD.search(word.rpartition("_")[2]) or "embed" in word) and not _NO_TABLE.search(word):
            return True
        # Whatever it is called: CTRL's is w.
        return len(shape) == 2 and not lies_in_layer(name) and self._is_vocabulary(shape[0])

    def _is_vocabulary(self, rows: int) -> bool:
        """Whether rows are tokens; a number that is that of hidden states, too, says nothing."""
        return rows in self._structure.vocabularies and rows not in self._structure.hidden

    def _is_router(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor shares tokens out among experts."""
        if _ROUTER.search(name) is not None:
            return True
        if _GATE.search(name) is None:
            return False
        experts = self._structure.experts
        if not experts:
            return _MIXTURE.search(name) is not None
        return shape[:1] == (1,) or any(size in experts for size in shape)

    def _routes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a matrix lies beside experts and is their gate, or has a row for each."""
        routed = self._structure.routed
        if not routed:
            return False
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        count = routed.get(f"{parent}.")
        return count is not None and (own == "gate" or count == shape[0] != shape[1])


def module_type(name: str, reason: str) -> str:
    """The type that a tensor is counted under, e.g. "q_proj", "experts.gate_proj", "embed_tokens", "norm".

    Args:
        name: The tensor's name.
        reason: What it was classified as.
    """
    if reason in ("norm", "bias", "router"):
        return reason
    leaf = own_name(name)
    if _SHARED_EXPERT.search(name):
        return f"shared_expert.{leaf}"
    return f"experts.{leaf}" if _EXPERT.search(name) else leaf


def own_name(name: str) -> str:
    """The module's own name: the last part before "weight" or "bias"; two parts if that is a number."""
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] in ("weight", "bias"):
        parts = parts[:-1]
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]
