"""The document: what YAML holds, as records. Every field that is there is understood or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import PlanError
from ...plan.methods import Method, known_methods
from ...plan.values import Parameters, read_parameters
from ...settings import DTYPES
from ...sizes import parse_size
from .models import Reference, read_reference

__all__ = ["Document", "Slice", "Source", "read_document"]

_FIELDS = (
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "max_shard_size",
    "allow_nonfinite",
)
_SLICE_FIELDS = ("sources", "base_model", "parameters")
_SOURCE_FIELDS = ("model", "layer_range", "parameters")
_MODEL_FIELDS = ("model", "parameters")

# Fields that mergekit has and this program has not, and what to do instead.
_REFUSED = {
    "tokenizer": "tokenizers are copied, never built: give all models one vocabulary first, and name the model whose "
    "tokenizer to copy as tokenizer_source",
    "chat_template": "take it out, and put a chat_template.jinja into the output afterwards",
    "modules": "merge the parts of such a model one by one, with models or slices",
    "residual_weight": "take it out; a method with the parameter scale weighs one model",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A model and what is taken of it.

    Attributes:
        place: Where it stands in the file.
        model: The model.
        layer_range: The first layer and the one after the last; None for all of the model.
        parameters: What is given for it.
    """

    place: str
    model: Reference
    layer_range: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output, and what they are merged from.

    Attributes:
        place: Where it stands in the file.
        sources: The models.
        base_model: Its own base, or None for the whole document's.
        parameters: What is given for it.
    """

    place: str
    sources: tuple[Source, ...]
    base_model: Reference | None
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Document:
    """A configuration.

    Attributes:
        file: Where it was read.
        method: How tensors are merged.
        form: Whether it says "models", then there is one slice that is all of them, or "slices".
        slices: The output's layers in order.
        base_model: The model that the output is shaped like, and the base of methods that have one.
        parameters: What is given for all slices.
        dtype: Output dtype of float tensors: a key of DTYPES, or "auto" for each one's own.
        tokenizer_source: The model whose tokenizer is copied, or None for that of the base or the first model.
        max_shard_size: Most bytes per output file, or None.
        allow_nonfinite: Whether NaN and infinity of the inputs may get through.
    """

    file: str
    method: Method
    form: Literal["models", "slices"]
    slices: tuple[Slice, ...]
    base_model: Reference | None
    parameters: Parameters
    dtype: str
    tokenizer_source: Reference | None
    max_shard_size: int | None
    allow_nonfinite: bool

    @property
    def has_gradients(self) -> bool:
        """Whether a parameter depends on the layer."""
        return any(
            isinstance(entry.value, tuple)
            for parameters in self.all_parameters()
            for value in parameters.values()
            for entry in value.entries
        )

    def all_parameters(self) -> list[Parameters]:
        """What is given anywhere."""
        return [
            self.parameters,
            *(slice_.parameters for slice_ in self.slices),
            *(source.parameters for slice_ in self.slices for source in slice_.sources),
        ]


def read_document(file: str, fields: Mapping[str, Any]) -> Document:
    """Reads a configuration that YAML has been read of.

    Args:
        file: Where it lies, for error messages.
        fields: Its fields; one that is null counts as left out.

    Raises:
        PlanError: A field or value is unknown, missing, unsupported or out of range; the message says where.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    _refuse_unknown(given, f"{file}: ", _FIELDS, "a configuration")
    method = _read_method(file, given.get("merge_method"))
    base = _optional_reference(given, f"{file}: base_model", "base_model")
    if ("models" in given) == ("slices" in given):
        raise PlanError(
            f"{file} should have either models or slices, not {'both' if 'models' in given else 'neither'}"
        )
    if "models" in given:
        sources = _read_sources(given["models"], f"{file}: models", method, ranges=False)
        slices: tuple[Slice, ...] = (Slice(f"{file}: models", sources, None, {}),)
    else:
        slices = _read_slices(given["slices"], f"{file}: slices", method)
    size = given.get("max_shard_size")
    return Document(
        file=file,
        method=method,
        form="models" if "models" in given else "slices",
        slices=slices,
        base_model=base,
        parameters=read_parameters(given.get("parameters"), f"{file}: parameters", method, shared=True),
        dtype=_read_dtype(file, given),
        tokenizer_source=_read_tokenizer_source(file, given, base, slices),
        max_shard_size=None if size is None else _read_size(file, size),
        allow_nonfinite=_read_flag(file, "allow_nonfinite", given.get("allow_nonfinite", False)),
    )


def _read_method(file: str, name: object) -> Method:
    methods = known_methods()
    if not isinstance(name, str) or name not in methods:
        raise PlanError(f"{file}: merge_method should be one of {', '.join(methods)}, not {name!r}")
    return methods[name]


def _read_slices(given: object, place: str, method: Method) -> tuple[Slice, ...]:
    slices = []
    for index, item in enumerate(_items(given, place, "a list of slices, each with sources")):
        where = f"{place}[{index}]"
        fields = _fields(item, where, _SLICE_FIELDS, "a slice")
        slices.append(
            Slice(
                place=where,
                sources=_read_sources(fields.get("sources"), f"{where}.sources", method, ranges=True),
                base_model=_optional_reference(fields, f"{where}.base_model", "base_model"),
                parameters=read_parameters(
                    fields.get("parameters"), f"{where}.parameters", method, shared=True
                ),
            )
        )
    return tuple(slices)


def _read_sources(given: object, place: str, method: Method, *, ranges: bool) -> tuple[Source, ...]:
    sources = []
    for index, item in enumerate(_items(given, place, "a list of models")):
        where = f"{place}[{index}]"
        fields = _fields(
            item, where, _SOURCE_FIELDS if ranges else _MODEL_FIELDS, "a source" if ranges else "a model"
        )
        sources.append(
            Source(
                place=where,
                model=read_reference(fields.get("model"), f"{where}.model"),
                layer_range=_read_range(fields.get("layer_range"), f"{where}.layer_range")
                if ranges
                else None,
                parameters=read_parameters(
                    fields.get("parameters"), f"{where}.parameters", method, shared=False
                ),
            )
        )
    return tuple(sources)


def _read_range(given: object, place: str) -> tuple[int, int]:
    whole = isinstance(given, Sequence) and all(
        isinstance(item, int) and not isinstance(item, bool) for item in given
    )
    if not isinstance(given, Sequence) or not whole or len(given) != 2 or not 0 <= given[0] < given[1]:
        raise PlanError(
            f"{place} should be the first layer and the one after the last, like [0, 8], not {given!r}"
        )
    return given[0], given[1]


def _read_dtype(file: str, given: Mapping[str, Any]) -> str:
    """The output's dtype; dtype, which mergekit computes in, counts where out_dtype does not say it."""
    found = "auto"
    for name in ("dtype", "out_dtype"):
        if (value := given.get(name)) is not None:
            found = value.removeprefix("torch.") if isinstance(value, str) else ""
            if found not in DTYPES:
                raise PlanError(f"{file}: {name} should be {', '.join(DTYPES)}, not {value!r}")
    return found


def _read_tokenizer_source(
    file: str, given: Mapping[str, Any], base: Reference | None, slices: Sequence[Slice]
) -> Reference | None:
    place = f"{file}: tokenizer_source"
    value = given.get("tokenizer_source")
    if value is None:
        return None
    if value == "union":
        raise PlanError(
            f"{place}: union makes a new vocabulary, which is not supported; give all models one vocabulary first, or "
            f"say base or the name of a model"
        )
    if value == "base":
        return base or slices[0].sources[0].model
    return read_reference(value, place)


def _read_size(file: str, given: object) -> int:
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise PlanError(f"{file}: max_shard_size should be a size like 5GB, not {given!r}")
    try:
        return parse_size(given)
    except PlanError as error:
        raise PlanError(f"{file}: max_shard_size: {error}") from error


def _read_flag(file: str, name: str, given: object) -> bool:
    if not isinstance(given, bool):
        raise PlanError(f"{file}: {name} should be true or false, not {given!r}")
    return given


def _optional_reference(fields: Mapping[str, Any], place: str, name: str) -> Reference | None:
    return read_reference(fields[name], place) if name in fields else None


def _items(given: object, place: str, expected: str) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise PlanError(f"{place} should be {expected}, not {given!r}")
    return given


def _fields(given: object, place: str, known: Sequence[str], what: str) -> dict[str, Any]:
    """The fields of a mapping that are not null, all of which must be known."""
    if not isinstance(given, Mapping):
        raise PlanError(f"{place} should be {what} with the fields {', '.join(known)}, not {given!r}")
    fields = {name: value for name, value in given.items() if value is not None or not isinstance(name, str)}
    _refuse_unknown(fields, f"{place}.", known, what)
    return fields


def _refuse_unknown(fields: Mapping[str, Any], place: str, known: Sequence[str], what: str) -> None:
    for name in fields:
        if name in _REFUSED:
            raise PlanError(f"{place}{name} is not supported: {_REFUSED[name]}")
        if name not in known:
            raise PlanError(f"{place}{name}: {what} has no field {name!r}; it has {', '.join(known)}")
