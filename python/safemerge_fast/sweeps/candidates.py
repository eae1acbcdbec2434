"""Candidates: what is made and judged, from a grid of settings of SafeMERGE and from other recipes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..documents import RECORD, read_bytes
from ..errors import SafemergeError, SettingError
from ..printable import printable
from ..recipes import recipes
from ..recipes.safemerge.settings import SafemergeSettings
from ..settings import Field, Kind, RunSettings, fields_of
from .settings import SweepSettings, axes

__all__ = ["Candidate", "Control", "list_candidates", "make_settings", "read_axis", "safe_name"]

_LONGEST_NAME = 100
# These say which modules are merged; one candidate has one of them.
_RULES = ("threshold", "select", "modules")


class Control(Enum):
    """What a model is that stands beside the candidates."""

    ALIGNED = "aligned"
    FINETUNED = "finetuned"
    SAFE = "safe"
    NO_SAFE = "no-safe"
    SHRINK = "shrink"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model to be judged.

    Attributes:
        name: Its name, which its directory and files bear.
        what: What it is, in a few words.
        control: Which control it is; None for a candidate.
        settings: How it is made; None for a model that is judged as it is.
        model: Where that lies.
        drawn: The modules to merge, where a control names them itself.
        beside: The candidate that a control stands beside.
        merged: Of each module type, how many modules are merged and how many there are; None where all tensors are
            treated alike.
        same_as: The name of what has the same weights.
    """

    name: str
    what: str
    control: Control | None = None
    settings: RunSettings | None = None
    model: str | None = None
    drawn: tuple[str, ...] | None = None
    beside: str | None = None
    merged: Mapping[str, tuple[int, int]] | None = None
    same_as: str | None = None

    def identity(self) -> str:
        """A digest of all that makes it what it is, the inputs apart."""
        document = {
            "recipe": None if self.settings is None else self.settings.recipe,
            "settings": None if self.settings is None else _deciding(self.settings),
            "model": self.model,
            "drawn": self.drawn,
        }
        text = json.dumps(document, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def list_candidates(sweep: SweepSettings) -> list[Candidate]:
    """The candidates that a sweep asks for, none twice.

    Args:
        sweep: What was asked for.

    Raises:
        SettingError: A setting is unknown, malformed or contradicts another; or there is nothing to sweep.
    """
    found: dict[str, Candidate] = {}
    names: set[str] = set()
    for recipe, values, where in _wanted(sweep):
        name = safe_name(_name(recipe, values))
        try:
            settings = make_settings(sweep, recipe, values, name)
        except SafemergeError as error:
            raise SettingError(f"{where}: {error}") from error
        what = " ".join([recipe, *(f"{field}={value}" for field, value in values.items())])
        candidate = Candidate(name, what, settings=settings)
        identity = candidate.identity()
        if identity in found:
            continue
        if name in names:
            name = f"{name}-{identity[:6]}"
            candidate = Candidate(name, what, settings=make_settings(sweep, recipe, values, name))
        found[identity] = candidate
        names.add(name)
    if not found:
        raise SettingError(
            "there is nothing to sweep; give values for --threshold, --select, --alpha or others, or a --recipe"
        )
    return list(found.values())


def make_settings(sweep: SweepSettings, recipe: str, values: Mapping[str, Any], name: str) -> RunSettings:
    """The settings of one output of a sweep: those that all share, as far as the recipe has them, and its own.

    Args:
        sweep: The sweep.
        recipe: The recipe's name.
        values: The output's own settings.
        name: The output's name.

    Raises:
        SafemergeError: A value is not one that its setting may have.
    """
    record: type[RunSettings] = recipes()[recipe].settings
    known = {field.name for field in fields_of(record)}
    # The rest is the sweep's own.
    own = {"output", "resume", "eval", "metrics", "grid", "recipes", "controls", "keep", "timeout"}
    shared = {
        field.name: value
        for field in fields_of(SweepSettings)
        if field.name in known - own and (value := getattr(sweep, field.name)) != field.default
    }
    for field in fields_of(record):
        if field.required and field.name not in (*shared, *values, "output"):
            raise SettingError(f"{recipe} needs the setting {field.name}")
    return record(**{**shared, **values, "output": f"{sweep.output}/candidates/{name}", "resume": True})


def read_axis(field: Field, given: Any, where: str) -> list[Any]:
    """The values that a setting takes in turn: a list of them, or one.

    Raises:
        SettingError: There is none, or one is not a value of the setting.
    """
    values = list(given) if isinstance(given, list | tuple) else [given]
    if not values:
        raise SettingError(f"{where}: {field.name} has no value")
    try:
        checked = [field.checked(value) for value in values]
        if field.setting.kind is Kind.PATH:
            # They hold wherever the sweep is gone on with.
            checked = [
                value if value is None else os.path.abspath(os.path.expanduser(value)) for value in checked
            ]
        return checked
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error


def safe_name(text: str) -> str:
    """A name of a directory that no program takes for anything else: letters, digits, dots, - and _."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "candidate"
    if len(name) > _LONGEST_NAME:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        name = f"{name[: _LONGEST_NAME - 13]}-{digest}"
    return name


def _wanted(sweep: SweepSettings) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Recipe, settings of its own, and what names them in messages, of every combination."""
    if sweep.grid:
        values = _read(sweep.grid, {field.name: field for field in axes()}, "grid")
        for combination in _safemerges(values):
            yield SafemergeSettings.recipe, combination, "grid"
    named = {name: recipe for name, recipe in recipes().items() if recipe.read is None}
    for number, given in enumerate(sweep.recipes, start=1):
        where = f"recipes, number {number}"
        name = given.get("recipe")
        if name not in named:
            raise SettingError(
                f"{where} should name one of {', '.join(named)} as its recipe, not {printable(repr(name), 80)}"
            )
        known = {
            field.name: field for field in _fields(name) if field.setting.in_files and field.setting.decides
        }
        values = _read({key: value for key, value in given.items() if key != "recipe"}, known, where)
        combinations = (
            _safemerges(values) if name == SafemergeSettings.recipe else _combinations(values.items())
        )
        for combination in combinations:
            yield name, combination, where


def _read(given: Mapping[str, Any], known: Mapping[str, Field], where: str) -> dict[str, list[Any]]:
    if unknown := [name for name in given if name not in known]:
        raise SettingError(
            f"{where} has no setting {printable(repr(unknown[0]), 80)}; it may have {', '.join(known)}"
        )
    return {name: read_axis(known[name], value, where) for name, value in given.items()}


def _fields(recipe: str) -> tuple[Field, ...]:
    record: type[RunSettings] = recipes()[recipe].settings
    return fields_of(record)


def _safemerges(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Combinations of rules and other settings: a threshold goes with no count, and a count with no threshold."""
    selects = list(values.get("select", ()))
    rules: list[dict[str, Any]] = [{"threshold": value} for value in values.get("threshold", ())]
    if not rules and "threshold" in selects:
        rules.append({"select": "threshold"})
    rules += [{"select": value} for value in selects if value != "threshold"]
    rules += [{"modules": value} for value in values.get("modules", ())]
    others = [(name, value) for name, value in values.items() if name not in _RULES]
    for rule in rules or [{}]:
        for combination in _combinations((name, value) for name, value in others if _concerns(name, rule)):
            yield {**rule, **combination}


def _concerns(name: str, rule: Mapping[str, Any]) -> bool:
    """Whether a setting says anything of a rule: ranks are taken within types, and a list of modules has no layers."""
    if name == "per_type":
        return str(rule.get("select", "")).startswith(("lowest", "fraction"))
    return not (name == "granularity" and "modules" in rule)


def _combinations(values: Iterable[tuple[str, Sequence[Any]]]) -> Iterator[dict[str, Any]]:
    axes = list(values)
    names = [name for name, _ in axes]
    for combination in itertools.product(*(value for _, value in axes)):
        yield dict(zip(names, combination, strict=True))


def _deciding(settings: RunSettings) -> dict[str, Any]:
    """The settings that decide an output; of files what they hold."""
    found = settings.deciding()
    for field in fields_of(type(settings)):
        if field.setting.kind is Kind.PATH and field.name in found:
            data = read_bytes(found[field.name], SettingError, limit=RECORD)
            found[field.name] = hashlib.blake2b(data, digest_size=16).hexdigest()
    return found


def _name(recipe: str, values: Mapping[str, Any]) -> str:
    parts = [] if recipe == SafemergeSettings.recipe else [recipe]
    for field, value in values.items():
        text = Path(value).stem if isinstance(value, str) and os.path.isabs(value) else str(value)
        # lowest:10 says already what it is.
        parts.append(text if field == "select" else f"{field.replace('_', '-')}-{text}")
    return "-".join(parts) or recipe
