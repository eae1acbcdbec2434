"""Stage 1, checkpoint: from what the user typed to a local model with validated headers.

Resolves a directory, a .safetensors file or a repository of the Hugging Face Hub, and refuses by name what
cannot be merged exactly: adapters, pickles and quantised weights. Nothing of the tensors' data is read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import _engine
from ..documents import read_json
from ..errors import AdapterError, CheckpointError
from ..printable import printable
from .hub import download

__all__ = [
    "ANYHOW",
    "FLOATS",
    "ROLES",
    "Access",
    "ExpertLayout",
    "Model",
    "locate",
    "open_model",
    "quantization_method",
]

ROLES = ("base", "aligned", "finetuned", "safe")
"""The parts that a model can play, in the order in which reports name them."""

FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
"""Dtypes whose values can be averaged as they are stored: no scale lies elsewhere."""

_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

# Suffixes of the tensors that quantised formats store beside or in place of a weight.
_QUANTISED_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "block-wise FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
}

_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})


ExpertLayout = Literal["peft", "unsloth"]
"""Who trained LoRA of fused experts: PEFT, whose B is (out, rank, experts), or Unsloth: (out, experts, rank)."""

# What the pairing relies on; other fields of a wrong kind do no harm here.
_FIELDS = (("model_type", str, "a text"), ("tie_word_embeddings", bool, "true or false"))


@dataclass(frozen=True, slots=True)
class Access:
    """How models are found and read.

    Attributes:
        read_backend: How the engine reads their files, see `_engine.Checkpoint`.
        bars: Whether downloads show the Hub's bars on stderr.
        expert_layout: How adapters lay out B of stacked experts, where they have any.
    """

    read_backend: Literal["auto", "mmap", "pread"] = "auto"
    bars: bool = True
    expert_layout: ExpertLayout = "peft"


ANYHOW = Access()
"""What serves where nobody has asked for anything."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model, found and opened: its headers are validated, its data is mapped and not read.

    Attributes:
        role: The part it plays, one of ROLES.
        spec: What the user typed.
        path: The local directory or file.
        headers: Names, dtypes, shapes and places of its tensors.
        config: Its config.json; empty when there is none.
    """

    role: str
    spec: str
    path: Path
    headers: _engine.Checkpoint
    config: dict[str, Any]


def locate(role: str, spec: str | os.PathLike[str], *, access: Access = ANYHOW) -> Path:
    """Finds what a person typed for a role.

    Args:
        role: Error messages name it.
        spec: A path, or (only when no such path exists) `org/name[@revision]` on the Hub, which is downloaded
            into the Hub's own cache.
        access: Whether a download shows the Hub's bars.

    Returns:
        An absolute local path, which exists.

    Raises:
        CheckpointError: There is no such path or repository.
    """
    typed = os.fspath(spec)
    if not _is_utf8(typed):
        raise CheckpointError(f"{role}: the path {printable(typed)} is not UTF-8; rename what lies there")
    path = _local(role, typed)
    if path is None:
        match = _REPOSITORY.fullmatch(typed) if isinstance(spec, str) else None
        if match is None:
            raise CheckpointError(
                f"{role}: {printable(typed)} does not exist; give a checkpoint directory or org/name[@revision]"
            )
        path = download(role, match["name"], match["revision"], progress=access.bars)
    return path.absolute()


def _local(role: str, typed: str) -> Path | None:
    """The path that was typed, if there is something."""
    try:
        path = Path(typed).expanduser()
        return path if path.exists() else None
    except RuntimeError as error:
        raise CheckpointError(
            f"{role}: {printable(typed)} names a user that this machine does not have"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{role}: {printable(typed)} cannot be read: {error.strerror}") from error


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_model(
    role: str, spec: str | os.PathLike[str], path: Path | None = None, *, access: Access = ANYHOW
) -> Model:
    """Finds and opens the checkpoint of one role.

    Args:
        role: One of ROLES; error messages name it.
        spec: A directory, a .safetensors file, or a repository, as locate takes it.
        path: Where it lies, if that is known already.
        access: How it is read, and whether a download shows the Hub's bars.

    Returns:
        The model.

    Raises:
        CheckpointError: There is no such path or repository, it holds no safetensors, its headers or
            config.json are malformed, or its weights are quantised.
        AdapterError: It is a PEFT adapter.
    """
    path = locate(role, spec, access=access) if path is None else path
    _check_files(role, path)
    headers = _engine.Checkpoint(path, read_backend=access.read_backend)
    model = Model(role, os.fspath(spec), path, headers, _read_config(role, path))
    _refuse_adapter(model)
    _refuse_quantised(model)
    return model


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Names the quantisation that a configuration speaks of, or None."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or not quantization:
        return None
    return printable(str(quantization.get("quant_method") or "unnamed method"), 80)


def _check_files(role: str, path: Path) -> None:
    """Refuses what holds no safetensors weights, with the way out for the usual cases."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{role}: {path} is not a .safetensors file; give one, or the checkpoint's directory"
            )
        return
    if not path.is_dir():
        raise CheckpointError(f"{role}: {path} is neither a directory nor a regular file")
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{role}: {path} cannot be read: {error.strerror}") from error
    whole_model = "model.safetensors" in names or "model.safetensors.index.json" in names
    if "adapter_config.json" in names and not whole_model:
        raise AdapterError(
            f"{role}: {path} is a PEFT adapter; give a whole checkpoint here "
            f"(in a merge, finetuned and safe may be adapters)"
        )
    if any(name.endswith(".safetensors") for name in names):
        return
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    if others:
        raise CheckpointError(
            f"{role}: {path} has no .safetensors file, only {others[0]}; convert it to safetensors first "
            f"(load it with transformers, then save_pretrained)"
        )
    raise CheckpointError(
        f"{role}: {path} has no .safetensors file; give the directory that holds the model's weights"
    )


def _read_config(role: str, path: Path) -> dict[str, Any]:
    """Reads config.json in the directory, or beside the file."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    # Some configurations have Infinity in them.
    config = read_json(file, CheckpointError, subject=f"{role}: {file}", nonfinite=True, optional=True)
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{role}: {file} should hold a JSON object, not a {type(config).__name__}")
    text = config.get("text_config")
    for where, part in (("", config), ("text_config.", text if isinstance(text, dict) else {})):
        for name, kind, word in _FIELDS:
            value = part.get(name)
            if value is not None and not isinstance(value, kind):
                raise CheckpointError(
                    f"{role}: {file}: {where}{name} should be {word}, not {printable(repr(value), 80)}"
                )
    return config


def _refuse_adapter(model: Model) -> None:
    """Refuses an adapter that came as a bare file."""
    for tensor in model.headers.tensors:
        if ".lora_A." in tensor.name or ".lora_B." in tensor.name or ".lora_embedding_A" in tensor.name:
            raise AdapterError(
                f"{model.role}: {model.path} is a PEFT adapter (it holds {tensor.name}) without its "
                f"adapter_config.json beside it, and its scale stands there; give the adapter's directory"
            )


def _refuse_quantised(model: Model) -> None:
    """Refuses weights that mean nothing without scales stored elsewhere.

    The tensors decide, not config.json: a dequantised model often keeps its old quantization_config.
    """
    kinds = [(tensor, _quantisation(tensor)) for tensor in model.headers.tensors]
    found = [(tensor, kind) for tensor, kind in kinds if kind is not None]
    if not found:
        return
    named = next((pair for pair in found if pair[1]), found[0])
    tensor, kind = named
    name = quantization_method(model.config) or kind or tensor.dtype
    raise CheckpointError(
        f"{model.role}: {model.path} is quantised ({name}: {tensor.name} is {tensor.dtype}), and averaging its "
        f"stored numbers would be silently wrong; give the full-precision checkpoint it was made from"
    )


def _quantisation(tensor: _engine.TensorInfo) -> str | None:
    """Names the quantised format that a tensor is part of: "" if that is unnamed, None if there is none."""
    for suffix, kind in _QUANTISED_SUFFIXES.items():
        if tensor.name.endswith(suffix):
            return kind
    if tensor.name.endswith("_blocks") and tensor.dtype == "U8":
        return "MXFP4"
    integer = tensor.name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in _INTEGERS
    return "" if integer or tensor.dtype.startswith(("F8_", "F6_", "F4")) else None
