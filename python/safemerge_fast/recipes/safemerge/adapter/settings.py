"""The adapter_config.json of a merged adapter, of the kind that PEFT, vLLM, SGLang and llama.cpp all read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ....checkpoint.adapter import Adapter
from .layout import AdapterLayout

__all__ = ["adapter_settings", "target_modules"]

# What belongs to the adapters that were merged, not to their merger, and the value that says so.
_CLEARED: Mapping[str, Any] = {
    "alpha_pattern": {},
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}
# Settings that only later versions of PEFT know are cleared where they stand and not added.
_EVERY_VERSION = frozenset(
    {
        "alpha_pattern",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "peft_type",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    }
)


def adapter_settings(
    adapters: Sequence[Adapter], layout: AdapterLayout, rank: int, modules: Iterable[str]
) -> dict[str, Any]:
    """Writes the configuration: the fine-tuned adapter's, with scale 1, one rank and no patterns.

    Args:
        adapters: The adapters that were merged, the fine-tuned one first.
        layout: What the merged adapter consists of.
        rank: The rank of all its modules.
        modules: All modules of the aligned model that have tensors.

    Returns:
        The document, by sorted names.
    """
    document = dict(adapters[0].config)
    document |= {
        name: value for name, value in _CLEARED.items() if name in document or name in _EVERY_VERSION
    }
    document |= {
        "bias": "all" if layout.has_biases else "none",
        "lora_alpha": rank,
        "modules_to_save": list(layout.saved_modules) or None,
        "r": rank,
        "target_modules": target_modules(
            [weight.module for weight in layout.weights if not weight.is_parameter], modules
        ),
    }
    if parameters := _target_parameters(adapters, layout):
        document["target_parameters"] = parameters
        if layout.stacked and adapters[0].settings.swaps_stacked:
            # What wrote it says what its factors mean, and these are in the form of the adapter that has any.
            document |= _version(adapters)
    return dict(sorted(document.items()))


def _target_parameters(adapters: Sequence[Adapter], layout: AdapterLayout) -> list[str]:
    """Names the adapted parameters so that PEFT adapts exactly these: as the adapters do, or else in full."""
    chosen = {weight.parameter for weight in layout.stacked}
    chosen |= {f"{weight.module}.weight" for weight in layout.weights if weight.is_parameter}
    names, named = set(), set()
    for target in {target for adapter in adapters for target in adapter.settings.target_parameters}:
        meant = {name for name in layout.parameters if name == target or name.endswith(f".{target}")}
        if meant and meant <= chosen:
            names.add(target)
            named |= meant
    return sorted(names | (chosen - named))


def _version(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The version of PEFT that wrote the first adapter whose experts are laid out as they are now."""
    newer = (adapter for adapter in adapters if adapter.parameters and not adapter.settings.swaps_stacked)
    found = next(newer, None)
    return {} if found is None else {"peft_version": found.config["peft_version"]}


def target_modules(adapted: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Names modules so that PEFT adapts exactly these.

    PEFT takes a name for every module that is called so or whose name ends with it, after a dot. That may be a mere
    container of others, or one that it cannot adapt.

    Args:
        adapted: Full names of the modules.
        modules: Full names of all modules that have tensors; adapted ones count in any case.

    Returns:
        For each module the last part of its name ("q_proj", …), if every module or container of that name is adapted;
        else its full name; sorted.
    """
    all_of: dict[str, set[str]] = defaultdict(set)
    for module in _with_containers({*modules, *adapted}):
        all_of[module.rpartition(".")[2]].add(module)
    chosen = set(adapted)
    return sorted(
        {
            # Lists of modules may hold some without tensors, which no name here tells of.
            leaf if not leaf.isdecimal() and all_of[leaf] <= chosen else module
            for module in chosen
            for leaf in (module.rpartition(".")[2],)
        }
    )


def _with_containers(modules: Iterable[str]) -> set[str]:
    """Modules, and all that they lie in."""
    found: set[str] = set()
    for module in modules:
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return found
