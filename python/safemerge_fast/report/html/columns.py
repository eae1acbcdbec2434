"""Modules in columns, as the page reads them: a hundred thousand of them are a few megabytes of JSON."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence

from ..modules import ModuleReport
from ..order import natural, ordered_types

__all__ = ["ModuleColumns", "front_coded"]

# Numbers that a rule compares are written to the last bit, so that the page decides as Python does.
_EXACT = ("rho", "rho_null", "z")
_ROUNDED = (
    "rho_low",
    "rho_high",
    "null_sd",
    "v_norm",
    "delta_norm",
    "weight_norm",
    "v_rounding",
    "cos_v_delta",
)
_NAN = math.nan


class ModuleColumns:
    """Modules, one after the other, as columns of numbers and indices into tables of words.

    Attributes:
        names: Their names.
        merged: Whether each was merged.
    """

    def __init__(self, modules: Iterable[ModuleReport]) -> None:
        """Takes the modules in."""
        self.names: list[str] = []
        self.merged = array("b")
        self._reasons: list[str] = []
        self._types = _Words()
        self._layers = _Words()
        self._columns = array("l")
        self._numbers = {field: array("d") for field in (*_EXACT, *_ROUNDED)}
        for module in modules:
            self._add(module)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def measured(self) -> int:
        """How many have ρ."""
        return sum(not math.isnan(rho) for rho in self._numbers["rho"])

    @property
    def estimated(self) -> int:
        """How many have a ρ that is an estimate."""
        ends = zip(self._numbers["rho_low"], self._numbers["rho_high"], strict=True)
        return sum(low < high for low, high in ends)

    def share_of_update(self) -> float | None:
        """The share of Σ‖Δ‖² that lies in merged modules; None if nothing is known of Δ."""
        squares = [0.0 if math.isnan(norm) else norm * norm for norm in self._numbers["delta_norm"]]
        total = math.fsum(squares)
        if not total or not math.isfinite(total):
            return None
        return (
            math.fsum(square for square, merged in zip(squares, self.merged, strict=True) if merged) / total
        )

    def pieces(self) -> Iterator[str]:
        """The object's JSON, in ASCII, column by column."""
        shared, rest = front_coded(self.names)
        layers = sorted(self._layers.words, key=natural)
        types = ordered_types(self._types.words)
        yield f'{{"count":{len(self)},"shared":{_integers(shared)},"rest":{json.dumps(rest)}'
        yield f',"types":{json.dumps(types)},"type":{_integers(self._types.places(types))}'
        yield f',"layers":{json.dumps(layers)},"layer":{_integers(self._layers.places(layers))}'
        yield f',"merged":{_integers(self.merged)},"columns":{_integers(self._columns)}'
        yield f',"reason":{json.dumps(self._reasons)}'
        for field in _EXACT:
            yield f',"{field}":{_exact(self._numbers[field])}'
        for field in _ROUNDED:
            yield f',"{field}":{_rounded(self._numbers[field])}'
        yield "}"

    def _add(self, module: ModuleReport) -> None:
        self.names.append(module.name)
        self.merged.append(module.merged)
        self._reasons.append(module.reason)
        self._types.add(module.module_type)
        self._layers.add(module.layer)
        self._columns.append(-1 if module.columns is None else module.columns)
        for field, column in self._numbers.items():
            value = _z(module) if field == "z" else getattr(module, field)
            column.append(_NAN if value is None else value)


class _Words:
    """A table of words, and for each entry its place there; -1 for None."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.indices = array("l")
        self._places: dict[str, int] = {}

    def add(self, word: str | None) -> None:
        if word is None:
            self.indices.append(-1)
            return
        place = self._places.setdefault(word, len(self.words))
        if place == len(self.words):
            self.words.append(word)
        self.indices.append(place)

    def places(self, ordered: Sequence[str]) -> Iterator[int]:
        """The entries as places among the same words in another order."""
        place = {word: number for number, word in enumerate(ordered)}
        moved = [place[word] for word in self.words]
        return (-1 if index < 0 else moved[index] for index in self.indices)


def front_coded(names: Iterable[str]) -> tuple[array[int], list[str]]:
    """Names as the number of characters that each shares with the one before, and the rest of it.

    Characters are counted as JavaScript does, in units of UTF-16, and no pair of them is torn apart.
    """
    shared, rest, before = array("l"), [], ""
    for name in names:
        count = 0
        # Most neighbours differ near their ends; comparing halves would not pay for names this short.
        for left, right in zip(before, name, strict=False):
            if left != right or left > "\uffff":
                break
            count += 1
        shared.append(count)
        rest.append(name[count:])
        before = name
    return shared, rest


def _z(module: ModuleReport) -> float | None:
    """As Score.z."""
    if not module.rho or not module.rho_null or not module.null_sd:
        return None
    return math.log(module.rho / module.rho_null) / module.null_sd


def _integers(numbers: Iterable[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"


def _exact(numbers: Iterable[float]) -> str:
    return f"[{','.join(repr(number) if math.isfinite(number) else 'null' for number in numbers)}]"


def _rounded(numbers: Iterable[float]) -> str:
    return f"[{','.join(f'{number:.6g}' if math.isfinite(number) else 'null' for number in numbers)}]"
