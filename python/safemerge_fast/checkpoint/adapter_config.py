"""What adapter_config.json says of the arithmetic: scales, ranks, replaced rows; and what it rules out.

Names and meanings are those of PEFT's LoraConfig. A setting that changes the merged weight in a way that the
engine does not compute is refused by its name; so is one that this program does not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import read_json
from ..errors import AdapterError
from ..patterns import ModulePatterns
from ..printable import printable

__all__ = ["ADAPTER_CONFIG", "AdapterConfig", "read_adapter_config"]

ADAPTER_CONFIG = "adapter_config.json"

# Settings that only say which modules were adapted and how they were trained: the keys tell the former, and
# the merged weight does not depend on the latter.
_NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_bias",
        "lora_dropout",
        "lora_dtype",
        "lora_ga_config",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "megatron_core",
        "merge_weights",
        "modules_to_save",
        "peft_type",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
        "velora_config",
    }
)
_USED = frozenset(
    {
        "alpha_pattern",
        "fan_in_fan_out",
        "lora_alpha",
        "r",
        "peft_version",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_rslora",
    }
)

# Settings that change the merged weight, or leave none, and what they are.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA, which acts on part of the input only, so that no weight can hold it",
    "arrow_config": "Arrow, which chooses among adapters for each token, so that no weight can hold it",
    "enable_lora": "the merged linear layers of early PEFT versions",
    "kasa_config": "KaSA, which cut singular components off the base weights",
    "layer_replication": "layer replication, which makes a model of more layers",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA, which samples its weights",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA, which pools its input in groups",
}

_HELD_BY_NO_WEIGHT = frozenset({"alora_invocation_tokens", "arrow_config"})

# Values of init_lora_weights that leave the base weights as they are; PiSSA and its like subtract from them.
_INNOCENT_INITS = frozenset({"eva", "gaussian", "mica", "orthogonal", "true", "false", "none"})
# The version of PEFT that learnt of stacked matrices which are stored as (out, in).
_STACKED_AS_STORED = (0, 19)
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The settings of an adapter_config.json that the arithmetic needs.

    Attributes:
        where: Role and file, for messages.
        r: Rank of modules that no pattern names.
        lora_alpha: Alpha of modules that no pattern names.
        rank_pattern: Rank by regular expression on module names.
        alpha_pattern: Alpha likewise.
        use_rslora: Whether the scale is alpha/√r instead of alpha/r.
        fan_in_fan_out: Whether matrices that could be stored either way are stored as (in, out).
        tokens: The replaced rows of embeddings: by the end of their names, or by None if the configuration
            names no embedding.
        target_parameters: The ends of the names of adapted parameters that are no module's weight, such as fused
            experts.
        swaps_stacked: Whether stacked matrices are always taken for (in, out), as PEFT before 0.19 does.
        document: The whole file.
    """

    where: str
    r: int
    lora_alpha: float
    rank_pattern: ModulePatterns
    alpha_pattern: ModulePatterns
    use_rslora: bool
    fan_in_fan_out: bool
    tokens: Mapping[str | None, tuple[int, ...]]
    target_parameters: tuple[str, ...]
    swaps_stacked: bool
    document: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """The rank that the configuration gives to a module: the first pattern that matches its name wins."""
        return int(self.rank_pattern.first(module, self.r))

    def scale(self, module: str) -> float:
        """The factor s of s·B·A: alpha/r, or alpha/√r with use_rslora.

        Args:
            module: The module's name in the model, without `base_model.model.`.
        """
        rank = self.rank(module)
        alpha = self.alpha_pattern.first(module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets_parameter(self, name: str) -> bool:
        """Whether a parameter, by its full name in the model, is one of target_parameters."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def token_indices(self, module: str) -> tuple[int, ...] | None:
        """The rows of an embedding that the adapter replaces, or None if the configuration does not say."""
        for name, indices in self.tokens.items():
            if name is None or module == name or module.endswith(f".{name}"):
                return indices
        return None


def read_adapter_config(role: str, directory: Path) -> AdapterConfig:
    """Reads and judges the adapter_config.json of a directory.

    Args:
        role: The part that the adapter plays, for messages.
        directory: The adapter's directory.

    Returns:
        The settings.

    Raises:
        AdapterError: The file cannot be read, is malformed, or asks for what cannot be merged exactly.
    """
    file = directory / ADAPTER_CONFIG
    document = read_json(file, AdapterError, subject=f"{role}: {file}", nonfinite=True)
    if not isinstance(document, dict):
        raise AdapterError(f"{role}: {file} should hold a JSON object, not a {type(document).__name__}")
    where = printable(f"{role}: {file}")
    _refuse(where, document)
    return AdapterConfig(
        where=where,
        r=_rank(where, "r", document.get("r", 8)),
        lora_alpha=_number(where, "lora_alpha", document.get("lora_alpha", 8)),
        rank_pattern=_patterns(where, document, "rank_pattern", _rank),
        alpha_pattern=_patterns(where, document, "alpha_pattern", _number),
        use_rslora=_flag(where, document, "use_rslora"),
        fan_in_fan_out=_flag(where, document, "fan_in_fan_out"),
        tokens=_tokens(where, document.get("trainable_token_indices")),
        target_parameters=_parameters(where, document.get("target_parameters")),
        swaps_stacked=_is_before(document.get("peft_version"), _STACKED_AS_STORED),
        document=document,
    )


def _refuse(where: str, document: Mapping[str, Any]) -> None:
    """Refuses what cannot be merged exactly, or is not known."""
    kind = document.get("peft_type")
    if str(kind).upper() != "LORA":
        raise AdapterError(
            f"{where} is of peft_type {_shown(kind)}; only LORA adapters can be merged exactly: give one, or fold it "
            f"with merge_and_unload and give the whole model"
        )
    initial = str(document.get("init_lora_weights", True)).lower()
    if initial.startswith(_CONVERTIBLE_INITS):
        raise AdapterError(
            f"{where} has init_lora_weights {_shown(initial)}, which changed the base weights, so that the factors "
            f"do not fit the original ones; save it with PEFT's "
            f"save_pretrained(path_initial_model_for_weight_conversion=…), or fold it with merge_and_unload"
        )
    if initial == "loftq":
        raise AdapterError(
            f"{where} has init_lora_weights 'loftq', which changed the base weights; fold it with merge_and_unload "
            f"into the model that LoftQ made, and give the whole model"
        )
    if initial not in _INNOCENT_INITS:
        raise AdapterError(
            f"{where} has init_lora_weights {_shown(initial)}, which is not known, and it may have changed the base "
            f"weights; fold it with merge_and_unload and give the whole model"
        )
    for name, meaning in _REFUSED.items():
        if document.get(name):
            raise AdapterError(
                f"{where} sets {name}: {meaning}; that cannot be merged exactly{_way_out(name)}"
            )
    for name, value in document.items():
        if value and name not in _NEUTRAL and name not in _USED and name not in _REFUSED:
            raise AdapterError(
                f"{where} sets {printable(name, 80)} to {_shown(value)}, which is not known; "
                f"remove it if the weights do not depend on it"
            )


def _way_out(name: str) -> str:
    """What to do about a refused setting; some adapters no weight can hold."""
    if name in _HELD_BY_NO_WEIGHT:
        return ""
    return "; or fold it with merge_and_unload and give the whole model"


def _rank(where: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{where}: {name} should be a whole number of at least 1, not {_shown(value)}")
    return value


def _number(where: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{where}: {name} should be a finite number, not {_shown(value)}")
    return value


def _flag(where: str, document: Mapping[str, Any], name: str) -> bool:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{where}: {name} should be true or false, not {_shown(value)}")
    return bool(value)


def _patterns(
    where: str, document: Mapping[str, Any], name: str, check: Callable[[str, str, object], float]
) -> ModulePatterns:
    patterns = document.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{where}: {name} should be an object, not {_shown(patterns)}")
    values = {key: check(where, f"{name} '{printable(key, 80)}'", value) for key, value in patterns.items()}
    return ModulePatterns(f"{where}: {name}", values, AdapterError)


def _parameters(where: str, value: object) -> tuple[str, ...]:
    """Reads target_parameters: a list of names."""
    names = value or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"{where}: target_parameters should be a list of names, not {_shown(value)}")
    return tuple(names)


def _is_before(version: object, other: tuple[int, int]) -> bool:
    """Whether a version of PEFT is older than another one; versions that wrote none are."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    return match is None or (int(match[1]), int(match[2])) < other


def _shown(value: object) -> str:
    """A value of the file as messages show it: short, whatever it is."""
    return printable(repr(value), 80)


def _tokens(where: str, value: object) -> dict[str | None, tuple[int, ...]]:
    """Reads trainable_token_indices: a list, or lists by the name of an embedding."""
    lists: dict[str | None, object] = dict(value) if isinstance(value, dict) else {None: value}
    if not value:
        return {}
    tokens: dict[str | None, tuple[int, ...]] = {}
    for name, indices in lists.items():
        whole = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
        if not isinstance(indices, list) or not whole:
            raise AdapterError(
                f"{where}: trainable_token_indices should hold lists of row numbers, not {_shown(indices)}"
            )
        tokens[name] = tuple(indices)
    return tokens
