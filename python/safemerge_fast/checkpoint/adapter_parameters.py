"""LoRA of bare parameters (PEFT's target_parameters): fused experts, for the most part.

PEFT wraps a module once for each of its parameters that is adapted, one wrapper around the other, and the keys tell
the wrappers apart and not the parameters: `experts.base_layer.lora_A` is inside of `experts.lora_A`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .. import _engine
from ..errors import AdapterError
from .adapter_config import AdapterConfig
from .factors import require_factors

__all__ = ["AdaptedParameters", "Factors", "parameter_groups"]

_INNER = ".base_layer"
_FACTORS = {".lora_A.weight": "a", ".lora_B.weight": "b"}


@dataclass(frozen=True, slots=True)
class Factors:
    """The keys of a product's factors.

    Attributes:
        a: A, shape (experts·rank, in): the rows of an expert lie side by side.
        b: B, shape (out, rank·experts): the columns of an expert lie apart, if PEFT trained it.
    """

    a: str
    b: str


@dataclass(frozen=True, slots=True)
class AdaptedParameters:
    """What an adapter holds for the parameters of one module.

    Attributes:
        module: The module's name in the model, without `base_model.model.`.
        factors: A product for each parameter, from the innermost wrapper to the outermost.
    """

    module: str
    factors: tuple[Factors, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all factors."""
        return tuple(key for factors in self.factors for key in (factors.a, factors.b))


def parameter_groups(
    where: str, headers: _engine.Checkpoint, settings: AdapterConfig, prefix: str
) -> dict[str, AdaptedParameters]:
    """Finds the keys that are of parameters, not of modules.

    Args:
        where: Role and file, for messages.
        headers: The adapter's.
        settings: Its configuration.
        prefix: What PEFT puts before the names of modules.

    Returns:
        The parameters by the names of their modules, in the order of the file.

    Raises:
        AdapterError: A factor has no partner, or they make no matrix.
    """
    if not settings.target_parameters:
        return {}
    wrapped: dict[str, dict[int, dict[str, str]]] = {}
    for key in headers.names:
        suffix = next((suffix for suffix in _FACTORS if key.endswith(suffix)), None)
        if suffix is not None and key.startswith(prefix):
            module, depth = _unwrapped(key.removeprefix(prefix).removesuffix(suffix))
            wrapped.setdefault(module, {}).setdefault(depth, {})[_FACTORS[suffix]] = key
    return {
        module: AdaptedParameters(module, _nested(where, headers, module, depths))
        for module, depths in wrapped.items()
        if _is_of_parameters(headers, settings, module, depths)
    }


def _unwrapped(name: str) -> tuple[str, int]:
    """A module's name, and how many wrappers lie around the one that was named."""
    depth = 0
    while name.endswith(_INNER):
        name, depth = name.removesuffix(_INNER), depth + 1
    return name, depth


def _is_of_parameters(
    headers: _engine.Checkpoint,
    settings: AdapterConfig,
    module: str,
    depths: Mapping[int, Mapping[str, str]],
) -> bool:
    """Whether keys are of a module's parameters; a matrix `weight` that is adapted as one is like any module's."""
    if any(depths):
        return True
    key = depths[0].get("a")
    height = None if key is None else list(headers.tensor(key).shape[:1])
    if settings.targets_parameter(weight := f"{module}.weight"):
        return height is not None and height != [settings.rank(weight)]
    containers = [target.rpartition(".")[::2] for target in settings.target_parameters]
    if any(
        container and leaf != "weight" and (module == container or module.endswith(f".{container}"))
        for container, leaf in containers
    ):
        return True
    if all(container for container, _ in containers):
        return False
    # Names without their module, as PEFT itself writes them: a matrix of several experts is higher than its rank.
    return height is not None and height != [settings.rank(module)]


def _nested(
    where: str, headers: _engine.Checkpoint, module: str, depths: Mapping[int, Mapping[str, str]]
) -> tuple[Factors, ...]:
    """The factors of a module from the innermost to the outermost, checked."""
    found = []
    for depth in reversed(range(max(depths) + 1)):
        keys = depths.get(depth, {})
        if len(keys) < len(_FACTORS):
            name = f"{module}{_INNER * depth}"
            missing = next(suffix for suffix, attribute in _FACTORS.items() if attribute not in keys)
            raise AdapterError(f"{where}: {name}{missing} is missing; the adapter is not complete")
        a, b = headers.tensor(keys["a"]), headers.tensor(keys["b"])
        require_factors(where, a, b)
        if a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{where}: {a.name} has shape {tuple(a.shape)} and {b.name} {tuple(b.shape)}, which do not go together"
            )
        found.append(Factors(a.name, b.name))
    return tuple(found)
