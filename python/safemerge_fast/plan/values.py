"""Stage 5: what is given for a method's parameter: a value, a gradient over layers, or filters on names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import PlanError
from .methods import Method, Parameter

__all__ = ["Entry", "Parameters", "Scalar", "Value", "interpolate", "read_parameters"]

Scalar = float | int | bool | str

# Held in 8 bits while mergekit merges; results do not depend on it.
_WITHOUT_EFFECT = "int8_mask"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of filters, or the whole of what is given for a parameter.

    Attributes:
        place: Where it stands in the file.
        filter: A part of the names of the tensors that it is for; None is any name.
        value: The value; several numbers are a gradient.
    """

    place: str
    filter: str | None
    value: Scalar | tuple[float, ...]

    def at(self, t: float) -> Scalar:
        """The value at a place among the layers, from 0 to 1."""
        return interpolate(self.value, t) if isinstance(self.value, tuple) else self.value


@dataclass(frozen=True, slots=True)
class Value:
    """What is given for a parameter: the first entry whose filter matches counts."""

    entries: tuple[Entry, ...]

    def entry(self, name: str) -> Entry | None:
        """The entry for a tensor of that name, if there is one."""
        return next((entry for entry in self.entries if entry.filter is None or entry.filter in name), None)


Parameters = Mapping[str, Value]
"""What is given at one place of a configuration, by the parameter's name."""


def interpolate(gradient: Sequence[float], t: float) -> float:
    """Interpolates linearly between numbers that are spread evenly from 0 to 1."""
    place = t * (len(gradient) - 1)
    left = min(int(place), len(gradient) - 1)
    right = min(left + 1, len(gradient) - 1)
    share = place - left
    return (1.0 - share) * gradient[left] + share * gradient[right] if share else gradient[left]


def read_parameters(given: object, place: str, method: Method, *, shared: bool) -> Parameters:
    """Reads a field `parameters`.

    Args:
        given: What YAML holds there; None is nothing.
        place: Where that is, for error messages.
        method: The method that the parameters are for.
        shared: Whether shared parameters may stand there; those of operands always may.

    Raises:
        PlanError: A name or value is not one that the method has.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise PlanError(f"{place} should hold names with values, not {given!r}")
    found: dict[str, Value] = {}
    for name, value in given.items():
        if name == _WITHOUT_EFFECT:
            if not isinstance(value, bool) and value not in (0, 1):
                raise PlanError(f"{place}.{name} should be true or false, not {value!r}")
            continue
        parameter = method.parameters.get(name) if isinstance(name, str) else None
        if parameter is None:
            raise PlanError(
                f"{place}.{name}: {method.name} has no parameter {name!r}; it has {_names(method)}; take it out"
            )
        if parameter.scope == "shared" and not shared:
            raise PlanError(
                f"{place}.{name}: {name} of {method.name} is the same for all models; give it under the parameters "
                f"of the slice or of the whole configuration"
            )
        found[name] = _read_value(value, f"{place}.{name}", parameter)
    return found


def _names(method: Method) -> str:
    return ", ".join(method.parameters) or "none"


def _read_value(given: object, place: str, parameter: Parameter) -> Value:
    if isinstance(given, Mapping):
        return Value((_read_entry(given, place, parameter),))
    if isinstance(given, list) and given and all(isinstance(item, Mapping) for item in given):
        entries = [_read_entry(item, f"{place}[{index}]", parameter) for index, item in enumerate(given)]
        for entry, following in pairwise(entries):
            if entry.filter is None:
                raise PlanError(
                    f"{following.place} is never reached, since {entry.place} has no filter and is for any tensor; put "
                    f"that one last"
                )
        return Value(tuple(entries))
    return Value((Entry(place, None, _read_scalar_or_gradient(given, place, parameter)),))


def _read_entry(given: Mapping[Any, Any], place: str, parameter: Parameter) -> Entry:
    if unknown := [name for name in given if name not in ("filter", "value")]:
        raise PlanError(f"{place}.{unknown[0]}: an entry has the fields filter and value only; take it out")
    if given.get("value") is None:
        raise PlanError(f"{place} has no value; give one")
    wanted = given.get("filter")
    if wanted is not None and (not isinstance(wanted, str) or not wanted):
        raise PlanError(f"{place}.filter should be a part of tensors' names, not {wanted!r}")
    value = _read_scalar_or_gradient(given["value"], f"{place}.value", parameter)
    return Entry(place, None if wanted == "*" else wanted, value)


def _read_scalar_or_gradient(given: object, place: str, parameter: Parameter) -> Scalar | tuple[float, ...]:
    if not isinstance(given, list):
        return _read_scalar(given, place, parameter)
    if parameter.kind != "number":
        raise PlanError(f"{place} should be {_expected(parameter)}, and cannot be a gradient over the layers")
    if not given:
        raise PlanError(f"{place} is an empty list; give a number, or a list of numbers as a gradient")
    return tuple(
        float(_read_scalar(item, f"{place}[{index}]", parameter)) for index, item in enumerate(given)
    )


def _read_scalar(given: object, place: str, parameter: Parameter) -> Scalar:
    value = _READERS[parameter.kind](given, parameter)
    if value is None:
        raise PlanError(f"{place} should be {_expected(parameter)}, not {given!r}")
    return value


def _read_number(given: object, parameter: Parameter) -> float | None:
    """A finite number within the parameter's range; YAML takes numbers such as 1e-5 for text."""
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        number = float(given)
    except (ValueError, OverflowError):
        return None
    least = -math.inf if parameter.least is None else parameter.least
    most = math.inf if parameter.most is None else parameter.most
    return number if math.isfinite(number) and least <= number <= most else None


def _read_integer(given: object, parameter: Parameter) -> int | None:
    number = _read_number(given, parameter)
    if number is None or not number.is_integer():
        return None
    # A seed may have more digits than a float holds.
    return given if isinstance(given, int) else int(number)


def _read_flag(given: object, parameter: Parameter) -> bool | None:
    """Besides true and false 1 and 0, which published configurations have for flags."""
    return bool(given) if isinstance(given, bool | int | float) and given in (0, 1) else None


def _read_choice(given: object, parameter: Parameter) -> str | None:
    """A word of the choice; for rescale also true and false, which is all that mergekit has for it."""
    if parameter.name == "rescale" and isinstance(given, bool):
        meant = ("probability", "l1") if given else ("none",)
        return next((word for word in meant if word in parameter.choices), None)
    return given if isinstance(given, str) and given in parameter.choices else None


_READERS = {
    "number": _read_number,
    "integer": _read_integer,
    "flag": _read_flag,
    "choice": _read_choice,
}


def _expected(parameter: Parameter) -> str:
    if parameter.kind == "flag":
        return "true or false"
    if parameter.kind == "choice":
        words = ", ".join(parameter.choices)
        return f"one of {words}" + (", true, false" if parameter.name == "rescale" else "")
    noun = "a whole number" if parameter.kind == "integer" else "a finite number"
    if parameter.least is not None and parameter.most is not None:
        return f"{noun} from {parameter.least:g} to {parameter.most:g}"
    return noun if parameter.least is None else f"{noun} of at least {parameter.least:g}"
