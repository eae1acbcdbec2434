"""PEFT adapters of kind LoRA: what the keys of adapter_model.safetensors mean, module by module.

The keys drive everything, not target_modules: each one is `base_model.model.`, a module's name, and what of
that module it is. A key that is none of what is known here is an error, so that nothing is silently dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import _engine
from .adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from .checkpoint import FLOATS, Model, locate, open_model
from .errors import AdapterError

__all__ = ["AdaptedModule", "Adapter", "is_adapter", "open_adapter", "open_source"]

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
    """

    settings: AdapterConfig
    modules: Mapping[str, AdaptedModule]


def is_adapter(path: Path) -> bool:
    """Whether a path is a PEFT adapter: its directory or weights, and no whole model is beside them."""
    if path.name == ADAPTER_WEIGHTS:
        return (path.parent / ADAPTER_CONFIG).is_file()
    whole = any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))
    return (path / ADAPTER_CONFIG).is_file() and not whole


def open_source(role: str, spec: str | os.PathLike[str]) -> Model:
    """Finds and opens a checkpoint or an adapter, whichever it is; arguments and errors as for those two."""
    path = locate(role, spec)
    return open_adapter(role, spec, path) if is_adapter(path) else open_model(role, spec, path)


def open_adapter(role: str, spec: str | os.PathLike[str], path: Path | None = None) -> Adapter:
    """Finds and opens a LoRA adapter.

    Args:
        role: The part it plays; error messages name it.
        spec: Its directory, or (only when no such path exists) `org/name[@revision]` on the Hub.
        path: Where it lies, if that is known already.

    Returns:
        The adapter.

    Raises:
        CheckpointError: There is no such path or repository, or its headers are malformed.
        AdapterError: It cannot be merged exactly, or a key of it is not understood.
    """
    path = locate(role, spec) if path is None else path
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
    headers = _engine.Checkpoint(weights)
    return Adapter(
        role=role,
        spec=os.fspath(spec),
        path=path,
        headers=headers,
        config=dict(settings.document),
        settings=settings,
        modules=_modules(f"{role}: {weights}", headers, settings),
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
# Between the name of a module that PEFT wraps and that of its own tensor.
_WRAPPERS = (".base_layer", ".modules_to_save")


def _modules(where: str, headers: _engine.Checkpoint, settings: AdapterConfig) -> dict[str, AdaptedModule]:
    """Groups the keys by module, understands each, and checks the groups."""
    modules: dict[str, AdaptedModule] = {}
    originals: list[str] = []
    for tensor in headers.tensors:
        key = tensor.name
        if not key.startswith(_PREFIX):
            raise AdapterError(f"{where}: the key {key} does not start with {_PREFIX}, as PEFT's do")
        if tensor.dtype not in FLOATS:
            raise AdapterError(
                f"{where}: {key} is {tensor.dtype}; only {', '.join(sorted(FLOATS))} can be merged"
            )
        name = key.removeprefix(_PREFIX)
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is not None:
            module = name.removesuffix(suffix).removesuffix(".base_layer")
            known = modules.setdefault(module, AdaptedModule(module))
            attribute = _SUFFIXES[suffix]
            if getattr(known, attribute) is not None:
                raise AdapterError(f"{where}: {key} and {getattr(known, attribute)} are the same of {module}")
            modules[module] = replace(
                known, **{attribute: key}, is_embedding=known.is_embedding or "_embedding_" in suffix
            )
        elif ".original_module." in name:
            originals.append(key)
        elif "lora_" in name or "token_adapter" in name or name.endswith((".weight_format", ".g_idx")):
            raise AdapterError(
                f"{where}: the key {key} is not one that a LoRA adapter of linear or embedding layers has"
            )
        else:
            _add_replaced(where, modules, name, key)
    for key in originals:
        _check_original(where, modules, key)
    if not modules:
        raise AdapterError(f"{where} holds no tensors, so it adapts nothing")
    return {name: _checked(where, module, headers, settings) for name, module in modules.items()}


def _add_replaced(where: str, modules: dict[str, AdaptedModule], name: str, key: str) -> None:
    """Takes a plain tensor for one that replaces the model's own (modules_to_save, bias)."""
    module, _, parameter = name.rpartition(".")
    if not module:
        raise AdapterError(f"{where}: the key {key} names no module")
    for wrapper in _WRAPPERS:
        # A module_to_save may have modules of its own behind the wrapper.
        head, found, tail = f"{module}.".partition(f"{wrapper}.")
        if found:
            module = f"{head}.{tail}".rstrip(".")
    known = modules.setdefault(module, AdaptedModule(module))
    # bias="all" and modules_to_save can both store one and the same tensor; the wrapped one is what PEFT loads last.
    modules[module] = replace(known, replaced={**known.replaced, parameter: key})


def _check_original(where: str, modules: Mapping[str, AdaptedModule], key: str) -> None:
    """Allows the untrained original of a module only where its trained version is there too."""
    module, _, parameter = key.removeprefix(_PREFIX).replace(".original_module.", ".").rpartition(".")
    if module not in modules or parameter not in modules[module].replaced:
        raise AdapterError(f"{where}: {key} is the original of a module whose trained version is not there")


def _checked(
    where: str, module: AdaptedModule, headers: _engine.Checkpoint, settings: AdapterConfig
) -> AdaptedModule:
    """Checks that a module's keys belong together, and adds rank, scale and indices."""
    if module.token_rows is not None:
        module = _with_tokens(where, module, module.token_rows, headers, settings)
    if module.a is None or module.b is None:
        lonely = module.a or module.b or module.b_bias or module.magnitude
        if lonely is not None:
            missing = "lora_B" if module.a else "lora_A"
            raise AdapterError(f"{where}: {lonely} has no {missing} beside it; the adapter is not complete")
        return module
    a, b = headers.tensor(module.a), headers.tensor(module.b)
    for factor in (a, b):
        if 0 in factor.shape:
            raise AdapterError(
                f"{where}: {factor.name} is empty, of shape {tuple(factor.shape)}: the adapter was saved without "
                f"gathering its shards (DeepSpeed ZeRO-3, FSDP); save it again from gathered weights"
            )
        if len(factor.shape) != 2:
            raise AdapterError(
                f"{where}: {factor.name} has shape {tuple(factor.shape)}; only LoRA of linear, Conv1D and embedding "
                f"layers, whose factors are matrices, can be merged"
            )
    rank = settings.rank(module.name)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{where}: {module.name} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, but {ADAPTER_CONFIG} "
            f"says rank {rank} for it; its r or rank_pattern do not belong to these weights"
        )
    return replace(module, rank=rank, scale=settings.scale(module.name))


def _with_tokens(
    where: str, module: AdaptedModule, key: str, headers: _engine.Checkpoint, settings: AdapterConfig
) -> AdaptedModule:
    """Adds the indices of replaced rows, which the configuration holds."""
    indices = settings.token_indices(module.name)
    if indices is None:
        raise AdapterError(
            f"{where}: {key} holds rows, but trainable_token_indices names none for {module.name}"
        )
    shape = tuple(headers.tensor(key).shape)
    if len(shape) != 2 or shape[0] != len(indices) or len(set(indices)) != len(indices):
        raise AdapterError(
            f"{where}: {key} has shape {shape}, but trainable_token_indices names {len(indices)} rows, "
            f"{len(set(indices))} of them different"
        )
    if module.a is not None or module.replaced:
        raise AdapterError(
            f"{where}: {module.name} has trainable tokens and is adapted otherwise too; give one of them"
        )
    return replace(module, token_indices=indices)
