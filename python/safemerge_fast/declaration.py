"""What is declared of one setting: its kind, range, default and help, and how a value is checked against them."""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import msgspec

from .addresses import is_url, shown_url
from .errors import PlanError, SettingError
from .sizes import parse_size

__all__ = ["Field", "Kind", "Setting"]

# What is no object of its own; Any is what callbacks are declared as.
_PLAIN = frozenset({str, int, float, bool, type(None), Any})


class Kind(Enum):
    """What a value is, where its type does not say it."""

    TEXT = "text"
    PATH = "a path"
    MODEL = "a model"
    SIZE = "a size like 5GB"
    PATTERN = "a regular expression"
    DOCUMENT = "fields with values"
    CALLBACK = "a function"
    WEIGHTS = "a finite number from 0 to 1, also by module type as in 0.8,v_proj=0.5"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is declared of a field beside its type and default.

    Attributes:
        help: One sentence or two for a person, which serve option, docstring and documentation.
        kind: What a text is.
        least: The least number.
        most: The largest number.
        choices: Gives the words that may be chosen from, where the type does not list them.
        metavar: What stands for the value in the command line's help.
        default: The default in words, where None stands for something.
        names: Further names on the command line, such as "-o".
        decides: Whether the output's weights depend on it.
        check: Raises a SafemergeError if a value is malformed.
        repeats: Whether the command that makes the output again needs it, although no weight depends on it.
        in_files: Whether it may stand in a file; what belongs to one run may not.
        on_command_line: Whether it is an option.
    """

    help: str
    kind: Kind = Kind.TEXT
    least: float | None = None
    most: float | None = None
    choices: Callable[[], Sequence[str]] | None = None
    metavar: str | None = None
    default: str | None = None
    names: tuple[str, ...] = ()
    decides: bool = True
    repeats: bool = False
    check: Callable[[Any], object] | None = None
    in_files: bool = True
    on_command_line: bool = True


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record of settings.

    Attributes:
        name: Its name.
        type: Its Python type.
        default: Its default; msgspec.NODEFAULT where it must be given.
        setting: What is declared of it.
        choices: The words that may be chosen from; empty if any may.
    """

    name: str
    type: Any
    default: Any
    setting: Setting
    choices: tuple[str, ...]

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is msgspec.NODEFAULT

    @property
    def types(self) -> frozenset[Any]:
        """The types of its values; choices are str."""
        members = typing.get_args(self.type) if typing.get_origin(self.type) not in (None, Literal) else ()
        return frozenset(
            str if typing.get_origin(member) is Literal else member for member in members or (self.type,)
        )

    @property
    def is_flag(self) -> bool:
        """Whether it is switched on by its name alone."""
        return bool in self.types

    def holds_object(self, value: Any) -> bool:
        """Whether a value is an object that only Python can give, and no file or command line."""
        return any(isinstance(value, kind) for kind in self.types - _PLAIN if isinstance(kind, type))

    def expected(self) -> str:
        """What a value should be, in words that follow "should be"."""
        setting = self.setting
        if self.choices:
            words = ", ".join(self.choices)
            return f"true, false or {words}" if self.is_flag else f"one of {words}"
        if self.is_flag:
            return "true or false"
        if setting.kind is not Kind.TEXT:
            return str(setting.kind.value)
        if not self.types & {int, float}:
            return "text"
        noun = "a finite number" if float in self.types else "a whole number"
        if setting.least is not None and setting.most is not None:
            return f"{noun} from {setting.least:g} to {setting.most:g}"
        return noun if setting.least is None else f"{noun} of at least {setting.least:g}"

    def checked(self, value: Any) -> Any:
        """The value as the record holds it: paths as text, sizes as bytes.

        Raises:
            SettingError: It is not one that the setting may have.
        """
        if value is None and type(None) in self.types:
            return None
        if self.holds_object(value):
            return value
        setting = self.setting
        if setting.kind in (Kind.PATH, Kind.MODEL) and isinstance(value, os.PathLike):
            value = os.fspath(value)
        try:
            if setting.kind is not Kind.CALLBACK:
                value = msgspec.convert(value, self.type)
            if setting.kind is Kind.SIZE:
                value = parse_size(value)
            if setting.check is not None:
                setting.check(value)
        except msgspec.ValidationError:
            raise SettingError(f"{self.name} should be {self.expected()}, not {_shown(value)}") from None
        except PlanError as error:
            raise SettingError(f"{self.name}: {error}") from error
        if setting.kind is Kind.PATH and isinstance(value, str) and is_url(value):
            raise SettingError(
                f"{self.name} should be a path on this machine, not {shown_url(value)}: nothing but models is read "
                f"from stores, and nothing is written there; give a path, and copy the result"
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (number and not self._in_range(value)) or (
            self.choices and not isinstance(value, bool) and value not in self.choices
        ):
            raise SettingError(f"{self.name} should be {self.expected()}, not {_shown(value)}")
        return value

    def parsed(self, text: str) -> Any:
        """Reads a value as a person types it; errors as those of checked."""
        value: Any = text
        try:
            if self.types >= {float, str}:
                value = _number_or_text(text)
            elif float in self.types:
                value = float(text)
            elif int in self.types and str not in self.types:
                value = int(text)
        except ValueError:
            raise SettingError(f"{self.name} should be {self.expected()}, not {_shown(text)}") from None
        return self.checked(value)

    def _in_range(self, number: float) -> bool:
        least = -math.inf if self.setting.least is None else self.setting.least
        most = math.inf if self.setting.most is None else self.setting.most
        return (isinstance(number, int) or math.isfinite(number)) and least <= number <= most


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _shown(value: object) -> str:
    """A value as messages show it, not longer than a line can be."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
