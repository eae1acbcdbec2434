"""Formats of weights that the engine does not decode: how each is recognised, its name, and the way out.

Tensors decide, not config.json: a dequantised model often keeps its old quantization_config, which only helps to name
what the tensors show. What is neither a float, nor of an encoding of the engine, nor a known buffer, is a refusal and
not a copy: averaging stored numbers without their scales would be silently wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._engine import TensorInfo
from ..printable import printable

__all__ = ["FLOATS", "Foreign", "Format", "quantization_method", "recognise"]

FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
"""Dtypes whose values can be averaged as they are stored: no scale lies elsewhere."""

_NARROW = ("F8_", "F6_", "F4")
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_ORIGINAL = "give the full-precision checkpoint it was made from"

# Buffers of integers: positions, kinds, masks, and which expert a token goes to.
_BUFFER = re.compile(
    r"(^|\.)(\w*_ids|\w*_index|\w*_idx|\w*position_buckets?|\w*mask|\w*coords|tid2eid|num_batches_tracked)$"
)


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        name: What people call it.
        marks: Endings of names that no other model has; one is enough.
        besides: Endings of which one must be there as well, if any is given.
        without: Endings that must not be there.
        methods: What config.json calls it, where the names of tensors are anybody's.
        weights: Endings of the tensors that hold packed weights, where it is known how many values each element holds.
        bits: Bits of a value in those tensors; 0 if config.json says them.
        way_out: What to do.
    """

    name: str
    marks: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    bits: int | None = None
    way_out: str = _ORIGINAL

    def is_in(self, endings: frozenset[str], method: str | None) -> bool:
        """Whether a model is in this format.

        Args:
            endings: Endings of all names that some format knows, as far as they occur.
            method: What config.json calls its quantisation.
        """
        if method in self.methods:
            return True
        return (
            any(mark in endings for mark in self.marks)
            and (not self.besides or any(ending in endings for ending in self.besides))
            and not any(ending in endings for ending in self.without)
        )


_DEQUANTISE = "load it with transformers, call model.dequantize() and save_pretrained it, or " + _ORIGINAL

# The first that fits is the one.
_FORMATS = (
    Format("GPTQ", (".qweight",), (".g_idx",), methods=("gptq",), weights=(".qweight",), bits=0),
    Format("AWQ or GPTQ", (".qweight",), methods=("awq",), weights=(".qweight",), bits=0),
    Format("EXL2", (".q_weight",), methods=("exl2",)),
    Format("EXL3", (".trellis",), methods=("exl3",)),
    Format("AQLM", (".codes",), (".codebooks",), methods=("aqlm",)),
    Format("HQQ", (".W_q",), methods=("hqq",)),
    Format("quanto", ("._data",), ("._scale",), methods=("quanto",)),
    Format(
        "bitsandbytes, 8 bits", (".SCB",), weights=(".weight",), bits=8, way_out=_DEQUANTISE,
    ),
    Format(
        "bitsandbytes, 4 bits",
        (".absmax", ".quant_map", "__nf4", "__fp4"),
        weights=(".weight",),
        bits=4,
        way_out=_DEQUANTISE,
    ),
    Format("bitsandbytes", methods=("bitsandbytes",), way_out=_DEQUANTISE),
    Format("MLX", (".scales",), (".biases",), without=(".qweight",), weights=(".weight",), bits=0,
           way_out="give the checkpoint it was made from, or convert it with `mlx_lm.convert --dequantize`"),
    Format("torchao", ("_qdata", ":qdata"), methods=("torchao",)),
    Format("BitNet", methods=("bitnet",), weights=(".weight",), bits=2),
    Format("VPTQ", (".centroids",), methods=("vptq",)),
    Format("MXFP4", ("_blocks",), methods=("mxfp4",), weights=("_blocks",), bits=4, way_out=_DEQUANTISE),
    Format("block-wise FP8", (".weight_scale_inv",), methods=("fp8",), weights=(".weight",), bits=8,
           way_out=_DEQUANTISE),
    Format("compressed-tensors", (".weight_packed",), methods=("compressed-tensors",)),
    Format("ModelOpt", (".weight_scale_2",), methods=("modelopt",)),
    Format("FP8 or compressed-tensors", (".weight_scale",)),
)  # fmt: skip

_ENDINGS = tuple(
    dict.fromkeys(ending for known in _FORMATS for ending in (*known.marks, *known.besides, *known.without))
)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Weights in a format that the engine does not decode.

    Attributes:
        name: The format, or the dtype where it has no known name.
        way_out: What to do.
        tensor: The first such tensor.
        dtype: Its dtype.
        tensors: How many there are.
        nbytes: Their bytes.
        parameters: How many parameters the model has, float tensors included; None where that is not known.
    """

    name: str
    way_out: str
    tensor: str
    dtype: str
    tensors: int
    nbytes: int
    parameters: int | None

    def refusal(self, role: str, path: Path) -> str:
        """Why a model is not merged, and the way out, in a sentence."""
        return (
            f"{role}: {path} is quantised ({self.name}: {self.tensor} is {self.dtype}), and averaging its stored "
            f"numbers would be silently wrong; {self.way_out}"
        )


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Names the quantisation that a configuration speaks of, or None."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or not quantization:
        return None
    return _method(config) or "unnamed method"


def _method(config: Mapping[str, Any]) -> str | None:
    """The name in a configuration, if there is one."""
    quantization = config.get("quantization_config")
    name = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return printable(str(name), 80) if name else None


def recognise(tensors: Sequence[TensorInfo], config: Mapping[str, Any]) -> Foreign | None:
    """Looks for weights that the engine does not decode.

    Args:
        tensors: All tensors of a model.
        config: Its config.json.

    Returns:
        What they are; None if there are none.
    """
    foreign = [tensor for tensor in tensors if _is_foreign(tensor)]
    if not foreign:
        return None
    method = _method(config)
    endings = frozenset(_endings(tensors))
    known = next((known for known in _FORMATS if known.is_in(endings, method)), None)
    # The tensor that a person knows the format by, before one of its scales or codes.
    marks = () if known is None else (*known.weights, *known.marks)
    first = next((tensor for tensor in foreign if tensor.name.endswith(marks)), foreign[0])
    name = first.dtype if known is None else known.name
    if method is not None and method.lower() not in name.lower():
        name = f"{method}, {name}"
    return Foreign(
        name=name,
        way_out=_ORIGINAL if known is None else known.way_out,
        tensor=first.name,
        dtype=first.dtype,
        tensors=len(foreign),
        nbytes=sum(tensor.nbytes for tensor in foreign),
        parameters=_parameters(tensors, known, config),
    )


def _is_foreign(tensor: TensorInfo) -> bool:
    """Whether a tensor holds numbers that mean nothing by themselves."""
    dtype = tensor.dtype
    if dtype in FLOATS or tensor.encoding is not None:
        return False
    if dtype.startswith(_NARROW):
        return True
    shape = tensor.shape
    if dtype not in _INTEGERS or len(shape) < 2 or _BUFFER.search(tensor.name):
        return False
    # Causal masks of early GPT-2, GPT-NeoX and their like.
    return not (tensor.name.endswith(".bias") and len(shape) == 4 and shape[:2] == (1, 1))


def _endings(tensors: Iterable[TensorInfo]) -> Iterable[str]:
    for tensor in tensors:
        name = tensor.name
        yield from (ending for ending in _ENDINGS if name.endswith(ending))


def _parameters(tensors: Iterable[TensorInfo], known: Format | None, config: Mapping[str, Any]) -> int | None:
    """The parameters of packed weights and of float tensors that are no scales; None where the packing is not known."""
    if known is None or known.bits is None:
        return None
    bits = known.bits or _configured_bits(config)
    if bits is None:
        return None
    total = 0
    for tensor in tensors:
        if _is_foreign(tensor):
            total += 8 * tensor.nbytes // bits if tensor.name.endswith(known.weights) else 0
        elif tensor.dtype in FLOATS and not tensor.name.endswith((*_ENDINGS, ".scales", ".biases")):
            total += math.prod(tensor.shape)
    return total


def _configured_bits(config: Mapping[str, Any]) -> int | None:
    for place in ("quantization_config", "quantization"):
        settings = config.get(place)
        bits = settings.get("bits", settings.get("w_bit")) if isinstance(settings, Mapping) else None
        if isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 16:
            return bits
    return None
