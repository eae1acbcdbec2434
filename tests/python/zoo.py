"""Models of transformers as headers only: their parameters on the meta device, under the names that they are saved by.

What a tensor is comes from the module that owns it, so that names and shapes can be judged against that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from safemerge_fast.checkpoint.model import Model

_LAYERS = {
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
}
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
_ROUTER = re.compile(r"Router|Gating|Gate$")
_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")


class Headers:
    """Headers of a checkpoint that does not exist."""

    def __init__(self, tensors: dict[str, SimpleNamespace]) -> None:
        self.files = ["model.safetensors"]
        self.names = list(tensors)
        self.tensors = list(tensors.values())
        self.tensor = tensors.__getitem__
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its shape.
        dtype: Its dtype as safetensors names it.
        kind: "matrix", "conv1d", "router", "head", "embedding", or "other"; "converted" is what several were made to.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str


def build(name: str) -> tuple[Any, list[Stored]]:
    """Makes a model of the class of that name by its default configuration, with two layers where that can be.

    Returns:
        The model, without weights, and its checkpoint's tensors.
    """
    cls = getattr(transformers, name)
    try:
        model = _made(cls, shrunk=True)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        model = _made(cls, shrunk=False)
    return model, list(stored(model))


def as_role(model: Any, tensors: list[Stored], role: str = "finetuned") -> Model:
    """The model as the package knows it when it has read its headers."""
    found = {
        tensor.name: SimpleNamespace(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            file="model.safetensors",
            nbytes=1,
            encoding=None,
        )
        for tensor in tensors
    }
    config = json.loads(model.config.to_json_string())
    return Model(role, role, Path(role), Headers(found), config)  # type: ignore[arg-type]


def _made(cls: Any, *, shrunk: bool) -> Any:
    config = cls.config_class()
    if shrunk:
        _shrink(config)
    with torch.device("meta"):
        return cls(config)


def _shrink(config: Any) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value)
        elif key in _LAYERS and isinstance(value, int) and value > 2:
            setattr(config, key, 2)
        elif key in _EXPERTS and isinstance(value, int) and value > 16:
            setattr(config, key, 16)
        elif key in _KINDS and isinstance(value, list) and len(value) > 2:
            other = next((each for each in value if each != value[0]), value[0])
            setattr(config, key, [value[0], other])


def stored(model: Any) -> Iterator[Stored]:
    """The tensors of a model's checkpoint."""
    kinds = _kinds(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    live = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    names = {id(tensor): name for name, tensor in live.items()}
    for name, tensor in revert_weight_conversion(model, dict(live)).items():
        kind = kinds[names[id(tensor)]] if id(tensor) in names else "converted"
        yield Stored(name, tuple(tensor.shape), _DTYPES.get(tensor.dtype, "F32"), kind)


def _kinds(model: Any) -> dict[str, str]:
    modules = dict(model.named_modules())
    try:
        head = model.get_output_embeddings()
    except NotImplementedError:
        head = None
    kinds: dict[str, str] = {}
    for name, module in modules.items():
        path, _, own = name.rpartition(".")
        routes = own in _ROUTER_NAMES or any(
            _ROUTER.search(type(each).__name__) for each in (module, modules[path])
        )
        for parameter, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            matrix = tensor.dim() == 2 and parameter in ("weight", "in_proj_weight")
            kind = "other"
            if module is head:
                kind = "head"
            elif isinstance(module, nn.Embedding):
                kind = "embedding"
            elif matrix and routes:
                kind = "router"
            elif matrix and isinstance(module, Conv1D):
                kind = "conv1d"
            elif matrix and (
                isinstance(module, nn.Linear | nn.MultiheadAttention)
                or type(module).__name__ == "QuantLinear"
            ):
                kind = "matrix"
            kinds[f"{name}.{parameter}" if name else parameter] = kind
    return kinds
