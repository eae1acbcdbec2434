"""Metrics: numbers in the JSON that a judge writes, each with the direction that is better."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import SettingError
from ..printable import printable

__all__ = ["Metric", "MetricError", "better", "read_metrics"]

# A key after a dot, a key in quotes within brackets, or a place in a list.
_STEP = re.compile(
    r"""\.?(?P<key>[^.\[\]]+) | \[(?P<place>-?\d{1,9})\] | \[(?P<quote>['"])(?P<quoted>.*?)(?P=quote)\]""",
    re.VERBOSE,
)
_NAME = re.compile(r"\w[\w.-]{0,59}")


class MetricError(Exception):
    """The JSON does not hold a metric; the message says why."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a judge's JSON.

    Attributes:
        name: What tables call it.
        path: Where it stands, as it was given: $.results.task['exact_match,none'].
        steps: The path in keys and places.
        direction: Which values are better.
    """

    name: str
    path: str
    steps: tuple[str | int, ...]
    direction: Literal["max", "min"]

    def read(self, document: Any) -> float:
        """Takes the number out of a document.

        Raises:
            MetricError: There is none at the path.
        """
        value = document
        for step in self.steps:
            try:
                value = value[step] if isinstance(step, int) == isinstance(value, list) else None
            except (KeyError, IndexError, TypeError):
                value = None
            if value is None:
                raise MetricError(
                    f"the metric {self.name} is not there: {printable(self.path)} leads to nothing"
                )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MetricError(
                f"the metric {self.name} is no finite number: at {printable(self.path)} stands "
                f"{printable(repr(value), 80)}"
            )
        return float(value)

    def gain(self, value: float) -> float:
        """The value, with its sign turned so that more is better."""
        return value if self.direction == "max" else -value


def read_metrics(given: Mapping[str, str]) -> tuple[Metric, ...]:
    """Reads metrics as they are given: a name, and `PATH:max` or `PATH:min`.

    Args:
        given: By name; a path that is empty is the name itself.

    Raises:
        SettingError: There is none, or one is malformed.
    """
    if not given:
        raise SettingError("metrics is empty; give at least one, like --metric refusals=$.refusals.rate:max")
    return tuple(_metric(name, text) for name, text in given.items())


def _metric(name: str, text: str) -> Metric:
    if not _NAME.fullmatch(name):
        raise SettingError(
            f"metrics: a name is at most 60 letters, digits, dots, - or _, which {printable(repr(name), 80)} is not"
        )
    path, _, direction = text.rpartition(":")
    if direction not in ("max", "min"):
        raise SettingError(
            f"metrics: {name} should end in :max or :min, for what is better, like $.{name}:max, "
            f"not {printable(repr(text), 80)}"
        )
    path = path or f"$['{name}']"
    return Metric(name, path, _steps(name, path), "max" if direction == "max" else "min")


def _steps(name: str, path: str) -> tuple[str | int, ...]:
    rest = path.removeprefix("$")
    steps: list[str | int] = []
    place = 0
    while place < len(rest):
        found = _STEP.match(rest, place)
        if found is None:
            raise SettingError(
                f"metrics: the path of {name} should read like $.results.task['exact_match,none'] or $.runs[0].loss, "
                f"not {printable(repr(path), 80)}"
            )
        key = found["key"] if found["key"] is not None else found["quoted"]
        steps.append(int(found["place"]) if key is None else key)
        place = found.end()
    if not steps:
        raise SettingError(f"metrics: the path of {name} names no field")
    return tuple(steps)


def better(metrics: Sequence[Metric], one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether one is better than another by the first metric in which they differ."""
    return [metric.gain(one[metric.name]) for metric in metrics] > [
        metric.gain(other[metric.name]) for metric in metrics
    ]
