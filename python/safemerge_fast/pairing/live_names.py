"""Names of a loaded model's parameters, where transformers gives them others than the checkpoint has.

transformers 5 renames tensors when it loads a checkpoint, and back when it saves one; adapters are saved under the
names of the loaded model. Its own table says which is which, so that none is kept here: the checkpoint's names go
through what loading does to them. That takes the model without its weights, and imports torch, so that nothing asks
but what found a name nowhere else.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..printable import printable

__all__ = ["LiveNames", "Made", "live_names"]

_OLDEST = (5, 0)
_MOST_LAYERS = 2000
# What becomes of a tensor that holds several parameters' rows: one after the other, or in turn.
_CHUNKS = ("Chunk(dim=0)",)
_ALTERNATING = ("Interleave(dim=0)", *_CHUNKS)
_INSTALL = (
    "its keys are probably those of a model that transformers 5 loaded, which names tensors in its own way; "
    "pip install 'transformers>=5', whose table says which is which"
)


@dataclass(frozen=True, slots=True)
class Made:
    """A parameter that loading makes from tensors, not by a new name alone.

    Attributes:
        sources: The tensors it is made of; those of one pattern in one tuple, in the order of the experts.
        operations: The operations by transformers' names, such as "Concatenate(dim=1)".
        index: Which of the results it is, where one tensor becomes several.
        results: How many they are.
    """

    sources: tuple[tuple[str, ...], ...]
    operations: tuple[str, ...]
    index: int = 0
    results: int = 1

    @property
    def rows(self) -> tuple[int, int] | None:
        """(which, of how many) where it is rows of one tensor: every so manieth; None otherwise."""
        return self._share if self.operations == _ALTERNATING and self.results == 2 else None

    @property
    def part(self) -> tuple[int, int] | None:
        """(which, of how many) where it is one of equal parts of the rows of one tensor; None otherwise."""
        return self._share if self.operations == _CHUNKS else None

    @property
    def _share(self) -> tuple[int, int] | None:
        single = len(self.sources) == 1 and len(self.sources[0]) == 1
        return (self.index, self.results) if single and self.results > 1 else None

    def describe(self) -> str:
        """What it is made of, for messages."""
        names = [name for group in self.sources for name in group]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{names[0]}{more} by {', '.join(self.operations)}"


@dataclass(frozen=True, slots=True)
class LiveNames:
    """Which parameter of the loaded model is which tensor of a checkpoint.

    Attributes:
        tensors: The tensor by the parameter's name, where loading gives it another name and does no more.
        made: The others that loading makes.
        parameters: All parameters of the model, in its own order.
        problem: Why nothing is known, in a clause; None if all is.
    """

    tensors: Mapping[str, str]
    made: Mapping[str, Made]
    parameters: tuple[str, ...] = ()
    problem: str | None = None


def live_names(config: Mapping[str, Any], names: Sequence[str]) -> LiveNames:
    """Asks transformers, if it is installed, how it names the tensors of a checkpoint.

    Args:
        config: The checkpoint's config.json.
        names: The names of its tensors.
    """
    return _cached(json.dumps(config, sort_keys=True, default=str), tuple(names))


@lru_cache(maxsize=4)
def _cached(config: str, names: tuple[str, ...]) -> LiveNames:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return _unknown(f"transformers is not installed: {_INSTALL}")
    version = str(transformers.__version__)
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < _OLDEST:
        return _unknown(f"transformers {version} has no table of names: {_INSTALL}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _ask(transformers, json.loads(config, object_hook=_number), names)
    except Exception as error:
        # Code of many models, none of which is ours; whatever it raises, the names are not known.
        what = printable(f"{type(error).__name__}: {error}", 200)
        return _unknown(f"transformers {version} could not say how it names tensors of this model ({what})")
    finally:
        transformers.logging.set_verbosity(verbosity)
        # Models may import triton, which complains on stderr if nobody collects what it leaves at the exit.
        atexit.unregister(gc.freeze)


def _number(found: dict[str, Any]) -> Any:
    """Numbers that JSON does not have, as transformers writes them."""
    tag = found.get("__float__")
    return float(tag) if len(found) == 1 and tag in ("Infinity", "-Infinity", "NaN") else found


def _unknown(problem: str) -> LiveNames:
    return LiveNames({}, {}, problem=problem)


def _ask(transformers: Any, config: dict[str, Any], names: tuple[str, ...]) -> LiveNames:
    """Renames as transformers' loading does."""
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping")
    model = _without_weights(transformers, config)
    if isinstance(model, str):
        return _unknown(model)
    parameters = model.state_dict()
    transforms = mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    tensors: dict[str, str] = {}
    made: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(names, key=loading.dot_natural_key):
        live, pattern = loading.rename_source_key(name, renamings, converters, prefix, parameters)
        if live not in parameters and name in parameters:
            live, pattern = loading.rename_source_key(name, [], [], prefix, parameters)
        if pattern is None:
            tensors.setdefault(live, name)
        else:
            made.setdefault(live, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(name)
    return LiveNames(tensors, _made(made), tuple(parameters))


def _made(
    collected: Mapping[str, tuple[Any, Mapping[str, Sequence[str]]]],
) -> dict[str, Made]:
    """What converters make, all of their results included."""
    made = {}
    for live, (converter, groups) in collected.items():
        sources = tuple(tuple(groups[pattern]) for pattern in converter.source_patterns if pattern in groups)
        operations = tuple(map(_described, converter.operations))
        # Where one tensor becomes several, loading collects it under the first of them.
        targets = converter.target_patterns
        for index, target in enumerate(targets):
            made[live.replace(targets[0], target, 1)] = Made(sources, operations, index, len(targets))
    return made


def _described(operation: Any) -> str:
    """An operation by its name and what it is told."""
    name = type(operation).__name__
    if not hasattr(operation, "dim"):
        return name
    return f"{name}(dim={operation.dim}{', inverse' if getattr(operation, 'inverse', False) else ''})"


def _without_weights(transformers: Any, config: dict[str, Any]) -> Any:
    """The model on no device, or why there is none."""
    kind = config.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        return f"transformers {transformers.__version__} does not know model_type {printable(repr(kind), 80)}"
    if (layers := _most_layers(config)) > _MOST_LAYERS:
        return f"config.json speaks of {layers} layers or experts"
    torch = importlib.import_module("torch")
    settings = known[kind].from_dict({**config, "quantization_config": None})
    architectures = config.get("architectures")
    wanted = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class = getattr(transformers, wanted, None) if isinstance(wanted, str) else None
    with torch.device("meta"):
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class(settings)
        return transformers.AutoModel.from_config(settings)


def _most_layers(config: Mapping[str, Any]) -> int:
    """The largest number of layers, blocks or experts that a configuration and its parts state."""
    most = 0
    for field, value in config.items():
        if isinstance(value, Mapping):
            most = max(most, _most_layers(value))
        elif isinstance(value, int) and field.endswith(("layers", "n_layer", "depth", "blocks", "experts")):
            most = max(most, value)
    return most
