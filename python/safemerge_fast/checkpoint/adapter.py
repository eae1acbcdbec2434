"""PEFT adapters of kind LoRA: what the keys of adapter_model.safetensors mean, module by module.

The keys drive everything, not target_modules: each one is `base_model.model.`, a module's name, and what of
that module it is. A key that is none of what is known here is an error, so that nothing is silently dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import _engine
from .._engine import TensorInfo
from ..errors import AdapterError
from .adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from .adapter_parameters import AdaptedParameters, parameter_groups
from .factors import require_factors
from .model import ANYHOW, FLOATS, Access, ExpertLayout, Model, locate, open_model
from .remote import address

__all__ = ["ADAPTER_WEIGHTS", "AdaptedModule", "Adapter", "is_adapter", "open_adapter", "open_source"]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """What an adapter holds for one module; each attribute is a key of its file, or None.

    Attributes:
        name: The module's name in the model, without `base_model.model.`.
        a: A of the product that is added, shape (rank, in).
        b: B of it, shape (out, rank).
        rank: Its rank; 0 where there is no product.
        scale: The factor s of s·B·A.
        is_embedding: Whether the product is an embedding's: its matrix is stored as (in, out).
        b_bias: The bias of B (lora_bias), which is added to the module's bias, s times.
        magnitude: DoRA's norms.
        token_rows: Rows that replace rows of an embedding.
        token_indices: Which ones these are.
        replaced: Keys of tensors that take the place of the module's own: by "weight", "bias", ….
    """

    name: str
    a: str | None = None
    b: str | None = None
    rank: int = 0
    scale: float = 1.0
    is_embedding: bool = False
    b_bias: str | None = None
    magnitude: str | None = None
    token_rows: str | None = None
    token_indices: tuple[int, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter(Model):
    """A LoRA adapter, found, opened and understood. Its `config` is adapter_config.json, its path a directory.

    Attributes:
        settings: What of the configuration the arithmetic needs.
        modules: What it holds, by the modules' names in the order of the file.
        parameters: What it holds for bare parameters, by the names of the modules that these belong to.
        expert_layout: How B of stacked experts is laid out: as PEFT does it, or as Unsloth did.
    """

    settings: AdapterConfig
    modules: Mapping[str, AdaptedModule]
    parameters: Mapping[str, AdaptedParameters]
    expert_layout: ExpertLayout


def is_adapter(path: Path) -> bool:
    """Whether a path is a PEFT adapter: its directory or weights, and no whole model is beside them."""
    if path.name == ADAPTER_WEIGHTS:
        return (path.parent / ADAPTER_CONFIG).is_file()
    whole = any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))
    return (path / ADAPTER_CONFIG).is_file() and not whole


def open_source(role: str, spec: str | os.PathLike[str], *, access: Access = ANYHOW) -> Model:
    """Finds and opens a checkpoint or an adapter, whichever it is; arguments and errors as for those two."""
    path = locate(role, spec, access=access)
    return (open_adapter if is_adapter(path) else open_model)(role, spec, path, access=access)


def open_adapter(
    role: str, spec: str | os.PathLike[str], path: Path | None = None, *, access: Access = ANYHOW
) -> Adapter:
    """Finds and opens a LoRA adapter.

    Args:
        role: The part it plays; error messages name it.
        spec: Its directory, or (only when no such path exists) `org/name[@revision]` on the Hub.
        path: Where it lies, if that is known already.
        access: How it is read, and whether a download shows the Hub's bars.

    Returns:
        The adapter.

    Raises:
        CheckpointError: There is no such path or repository, or its headers are malformed.
        AdapterError: It cannot be merged exactly, or a key of it is not understood.
    """
    path = locate(role, spec, access=access) if path is None else path
    if path.name == ADAPTER_WEIGHTS:
        path = path.parent
    settings = read_adapter_config(role, path)
    weights = path / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = (path / "adapter_model.bin").exists()
        raise AdapterError(
            f"{role}: {path} has no {ADAPTER_WEIGHTS}"
            + (
                ", only adapter_model.bin, a pickle that could run code; load it with PEFT where you trust it "
                "and save_pretrained(…, safe_serialization=True)"
                if pickled
                else "; give the directory that PEFT's save_pretrained wrote"
            )
        )
    headers = _engine.Checkpoint(address(weights), read_backend=access.read_backend)
    parameters = parameter_groups(f"{role}: {weights}", headers, settings, _PREFIX)
    return Adapter(
        role=role,
        spec=os.fspath(spec),
        path=path,
        headers=headers,
        config=dict(settings.document),
        settings=settings,
        modules=_modules(f"{role}: {weights}", headers, settings, parameters),
        parameters=parameters,
        expert_layout=access.expert_layout,
    )


# What follows a module's name in a key, and the attribute of AdaptedModule that it fills.
_SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "token_rows",
}


# What bias="all" stores besides of a module that is saved as a whole: its untrained original, which nothing
# reads, and its trained version once more, which PEFT stores under the module's own name as well.
_SHADOWS = (".original_module.", ".modules_to_save.")


def _modules(
    where: str,
    headers: _engine.Checkpoint,
    settings: AdapterConfig,
    parameters: Mapping[str, AdaptedParameters],
) -> dict[str, AdaptedModule]:
    """Groups the keys that are of no bare parameter by module, understands each, and checks the groups."""
    of_parameters = {key for group in parameters.values() for key in group.keys}
    groups: dict[str, _Group] = {}
    shadows: list[str] = []
    for tensor in headers.tensors:
        key = tensor.name
        if key in of_parameters and tensor.dtype in FLOATS:
            continue
        if not key.startswith(_PREFIX):
            raise AdapterError(f"{where}: the key {key} does not start with {_PREFIX}, as PEFT's do")
        if tensor.encoding is not None or tensor.dtype not in FLOATS:
            raise AdapterError(
                f"{where}: {key} is {tensor.encoding or tensor.dtype}; only {', '.join(sorted(FLOATS))} can be merged"
            )
        name = key.removeprefix(_PREFIX)
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is not None:
            module = name.removesuffix(suffix).removesuffix(".base_layer")
            group = groups.setdefault(module, _Group())
            group.is_embedding |= "_embedding_" in suffix
            _add(where, group.parts, _SUFFIXES[suffix], key)
        elif any(wrapped in name for wrapped in _SHADOWS):
            shadows.append(key)
        elif "lora_" in name or "token_adapter" in name:
            raise AdapterError(
                f"{where}: the key {key} is not one that LoRA of linear, Conv1D or embedding layers has"
            )
        else:
            module, parameter = _module_of(where, name, key)
            _add(where, groups.setdefault(module, _Group()).replaced, parameter, key)
    for key in shadows:
        _check_shadow(where, groups, key)
    if not groups and not parameters:
        raise AdapterError(f"{where} holds no tensors, so it adapts nothing")
    return {name: _checked(where, name, group, headers, settings) for name, group in groups.items()}


@dataclass(slots=True)
class _Group:
    """The keys of one module, while they are collected: by attribute of AdaptedModule, and by parameter."""

    parts: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    is_embedding: bool = False


def _add(where: str, keys: dict[str, str], name: str, key: str) -> None:
    """Adds a key, unless there is one of the same meaning already."""
    if name in keys:
        raise AdapterError(f"{where}: {keys[name]} and {key} mean the same; only one of them can be applied")
    keys[name] = key


def _module_of(where: str, name: str, key: str) -> tuple[str, str]:
    """Module and parameter of a plain tensor, which replaces the model's own (modules_to_save, bias)."""
    module, _, parameter = name.rpartition(".")
    if not module:
        raise AdapterError(f"{where}: the key {key} names no module")
    # What PEFT wraps, it calls the base layer: that is not part of the model's names.
    return f"{module}.".replace(".base_layer.", ".").rstrip("."), parameter


def _check_shadow(where: str, groups: Mapping[str, _Group], key: str) -> None:
    """Allows what is not read only where the trained version that is read is there too."""
    name = key.removeprefix(_PREFIX)
    for wrapped in _SHADOWS:
        name = name.replace(wrapped, ".")
    module, _, parameter = name.rpartition(".")
    if module not in groups or parameter not in groups[module].replaced:
        raise AdapterError(f"{where}: {key} belongs to a module whose trained version is not there")


def _checked(
    where: str, name: str, group: _Group, headers: _engine.Checkpoint, settings: AdapterConfig
) -> AdaptedModule:
    """Checks that a module's keys belong together, and adds rank, scale and indices."""
    parts = group.parts
    a, b = parts.get("a"), parts.get("b")
    rank, scale = 0, 1.0
    if a is not None and b is not None:
        # Patterns are tried on what was adapted: the module, or its weight as a parameter.
        weight = f"{name}.weight"
        pattern_name = weight if settings.targets_parameter(weight) else name
        rank = _check_factors(where, name, pattern_name, headers.tensor(a), headers.tensor(b), settings)
        scale = settings.scale(pattern_name)
    elif lonely := [key for attribute, key in parts.items() if attribute != "token_rows"]:
        missing = "lora_A" if a is None else "lora_B"
        raise AdapterError(f"{where}: {lonely[0]} has no {missing} beside it; the adapter is not complete")
    rows = parts.get("token_rows")
    if rows is not None and (a is not None or group.replaced):
        raise AdapterError(
            f"{where}: {name} is adapted otherwise too, beside {rows}; only one of them can be applied"
        )
    return AdaptedModule(
        name=name,
        a=a,
        b=b,
        rank=rank,
        scale=scale,
        is_embedding=group.is_embedding,
        b_bias=parts.get("b_bias"),
        magnitude=parts.get("magnitude"),
        token_rows=rows,
        token_indices=() if rows is None else _token_indices(where, name, headers.tensor(rows), settings),
        replaced=group.replaced,
    )


def _check_factors(
    where: str, name: str, pattern_name: str, a: TensorInfo, b: TensorInfo, settings: AdapterConfig
) -> int:
    """Checks the factors of a module and returns their rank."""
    require_factors(where, a, b)
    rank = settings.rank(pattern_name)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{where}: {name} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, but {ADAPTER_CONFIG} "
            f"says rank {rank} for it; its r or rank_pattern do not belong to these weights"
        )
    return rank


def _token_indices(where: str, name: str, rows: TensorInfo, settings: AdapterConfig) -> tuple[int, ...]:
    """The indices of replaced rows, which the configuration holds."""
    indices = settings.token_indices(name)
    if indices is None:
        raise AdapterError(
            f"{where}: {rows.name} holds rows, but trainable_token_indices names none for {name}"
        )
    shape = tuple(rows.shape)
    if len(shape) != 2 or shape[0] != len(indices) or len(set(indices)) != len(indices):
        raise AdapterError(
            f"{where}: {rows.name} has shape {shape}, but trainable_token_indices names {len(indices)} rows, "
            f"{len(set(indices))} of them different"
        )
    return indices
