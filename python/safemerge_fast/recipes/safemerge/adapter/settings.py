"""The adapter_config.json of a merged adapter, of the kind that PEFT, vLLM, SGLang and llama.cpp all read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    finetuned: Mapping[str, Any], layout: AdapterLayout, rank: int, modules: Iterable[str]
) -> dict[str, Any]:
    """Writes the configuration: the fine-tuned adapter's, with scale 1, one rank and no patterns.

    Args:
        finetuned: The fine-tuned adapter's configuration.
        layout: What the merged adapter consists of.
        rank: The rank of all its modules.
        modules: All modules of the aligned model that have a matrix.

    Returns:
        The document, by sorted names.
    """
    document = dict(finetuned)
    document |= {
        name: value for name, value in _CLEARED.items() if name in document or name in _EVERY_VERSION
    }
    document |= {
        "bias": "all" if layout.has_biases else "none",
        "lora_alpha": rank,
        "modules_to_save": list(layout.saved_modules) or None,
        "r": rank,
        "target_modules": target_modules([weight.module for weight in layout.weights], modules),
    }
    return dict(sorted(document.items()))


def target_modules(adapted: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Names modules so that PEFT adapts exactly these.

    Args:
        adapted: Full names of the modules.
        modules: Full names of all modules there are; adapted ones count in any case.

    Returns:
        The last parts of their names ("q_proj", …), if every module of these last parts is adapted; else the
        full names; sorted.
    """
    all_of: dict[str, set[str]] = defaultdict(set)
    for module in {*modules, *adapted}:
        all_of[module.rpartition(".")[2]].add(module)
    short = {module.rpartition(".")[2] for module in adapted}
    whole = all(all_of[leaf] <= set(adapted) for leaf in short)
    return sorted(short if whole else set(adapted))
