"""What becomes of quantised tensors: which stay so in the output, and what config.json then says of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import msgspec

from ..pairing.expert_names import single
from ..pairing.row import Row

__all__ = ["Encode", "encoded_config", "output_rows"]


class Encode(Enum):
    """How tensors of the output are stored that are quantised in the model that it is shaped like."""

    KEEP = "keep"
    TOUCHED = "bfloat16"
    ALL = "all"


# Where configurations list the modules that are not quantised. Where there is none yet, the method says how it is
# to be called.
_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
_USUAL = {"compressed-tensors": "ignore", "modelopt": "ignore"}

# Modules of one parent that servers (vLLM, SGLang) load as one, which is quantised or is not.
_ONE_WHEN_SERVED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_SERVED = {leaf: leaves[0] for leaves in _ONE_WHEN_SERVED for leaf in leaves}


def output_rows(
    rows: Sequence[Row], encode: Encode, touched: Callable[[Row], bool], host: str, config: Mapping[str, Any]
) -> list[Row]:
    """Says of each row whether its tensor stays quantised.

    Args:
        rows: All rows.
        encode: What is asked for.
        touched: Whether a row's tensor is anything else than the tensor that it describes.
        host: Role of the model that the output is shaped like.
        config: Its config.json. Where that speaks of no quantisation, tensors of other models cannot stay quantised.

    Returns:
        The rows, in their order. A module of several quantised parameters is dequantised as a whole, and so are all
        experts of a layer, stacked or not: loaders know them as one module, which is quantised or is not. So do servers
        with q, k and v of a layer, and with gate and up.
    """
    if not any(row.encoded is not None for row in rows):
        return list(rows)
    if encode is Encode.ALL:
        return [_dequantised(row) for row in rows]
    if not any(_quantisations(config)):
        rows = [
            _dequantised(row) if row.encoded is not None and row.encoded.role != host else row for row in rows
        ]
    if encode is Encode.KEEP:
        return list(rows)
    lost = {_served(row) for row in rows if row.encoded is not None and touched(row)}
    return [_dequantised(row) if _served(row) in lost else row for row in rows]


def encoded_config(config: Mapping[str, Any], rows: Sequence[Row], host: str) -> dict[str, Any] | None:
    """A configuration that tells the truth about which modules are quantised.

    Args:
        config: config.json of the model that the output is shaped like.
        rows: What output_rows returned.
        host: Role of that model.

    Returns:
        The configuration, or None if the model's own is true.
    """
    kept = [row for row in rows if row.encoded is not None and row.encoded.kept]
    lost = {_module(row) for row in rows if row.encoded is not None and not row.encoded.kept}
    # The model's own list cannot know of what another model gave.
    lost |= {_module(row) for row in rows if host not in row.names and _is_plain_matrix(row)}
    if not lost or not any(_quantisations(config)):
        return None
    written = copy.deepcopy(dict(config))
    for part in _parts(written):
        if not isinstance(part.get("quantization_config"), dict):
            continue
        if not kept:
            del part["quantization_config"]
            continue
        quantization = part["quantization_config"]
        method = str(quantization.get("quant_method") or "")
        usual = _USUAL.get(method, _LISTS[0])
        key = next((key for key in _LISTS if isinstance(quantization.get(key), list)), usual)
        listed = quantization.get(key)
        if not isinstance(listed, list):
            # Without a list loaders leave out the head; with one, only what it names.
            listed = []
            lost |= {_module(row) for row in rows if _is_plain_matrix(row)}
        quantization[key] = [
            *listed,
            *(name for name in _entries(sorted(lost), method) if name not in listed),
        ]
    return written


def _is_plain_matrix(row: Row) -> bool:
    return row.encoded is None and len(row.shape) == 2 and row.name.endswith(".weight")


def _entries(modules: Iterable[str], method: str) -> Iterator[str]:
    """What a list of modules says of these."""
    for module in modules:
        yield module
        # With other methods a name stands for what is within, too.
        if method == "compressed-tensors" and module.endswith("experts"):
            yield f"re:{re.escape(module)}\\..*"


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def _quantisations(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        part["quantization_config"]
        for part in _parts(dict(config))
        if isinstance(part.get("quantization_config"), Mapping)
    ]


def _module(row: Row) -> str:
    """The module that a loader knows a tensor as a part of: one of that name, or the experts of a layer."""
    expert = single(row.name)
    return row.name.rpartition(".")[0] if expert is None else expert.prefix


def _served(row: Row) -> str:
    """The module that servers know a tensor as a part of, by a name of its own."""
    module = _module(row)
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_SERVED.get(leaf, leaf)}"


def _dequantised(row: Row) -> Row:
    if row.encoded is None:
        return row
    return msgspec.structs.replace(row, encoded=replace(row.encoded, kept=False))
