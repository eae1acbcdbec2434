"""α, the weight of the fine-tuned update: one number, or others for some module types or modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...errors import PlanError, SettingError
from ...pairing.module import Module, slices_of
from ...pairing.row import Row
from ...patterns import Pattern, compile_pattern
from ...printable import printable
from ...yaml_documents import read_yaml

__all__ = ["Alphas", "check_alpha", "open_alphas"]


@dataclass(frozen=True, slots=True)
class _Other:
    """Another α for some modules.

    Attributes:
        key: As it was written.
        alpha: α.
        pattern: What is searched in modules' names; None where the key is a module type.
    """

    key: str
    alpha: float
    pattern: Pattern | None

    def applies(self, subject: Row | Module) -> bool:
        return subject.module_type == self.key if self.pattern is None else self.pattern.search(subject.name)


@dataclass(frozen=True, slots=True)
class Alphas:
    """α of every module.

    Attributes:
        usual: α where nothing else is said.
        others: What else is said; the first that applies counts.
    """

    usual: float
    others: tuple[_Other, ...] = ()

    def of(self, subject: Row | Module) -> float:
        """α of a module, or of a tensor that is none."""
        return next((other.alpha for other in self.others if other.applies(subject)), self.usual)

    def describe(self) -> str:
        """All of them in a few words."""
        others = ", ".join(f"{printable(other.key, 80)} {other.alpha:g}" for other in self.others[:8])
        if more := len(self.others) - 8:
            others += f" and {more} more" if more > 0 else ""
        return f"{self.usual:g} ({others})" if self.others else f"{self.usual:g}"

    def to_json(self) -> object:
        """All that decides, as JSON can hold it."""
        return [self.usual, *([other.key, other.alpha] for other in self.others)]


def check_alpha(text: float | str) -> None:
    """Refuses a text that no α can be read from.

    Raises:
        SettingError: It is no number from 0 to 1, followed by others with their module types.
    """
    if isinstance(text, str):
        _parse(text)


def open_alphas(alpha: float | str, file: str | None, rows: Sequence[Row]) -> Alphas:
    """Finds out which modules each α is for.

    Args:
        alpha: α, and others by module type.
        file: A file of further ones: module types, or regular expressions on names, with their α, as YAML or JSON.
        rows: All rows.

    Raises:
        SettingError: A type in the setting is none of the model's.
        PlanError: The file cannot be read, or holds something else, or a key that is for no module.
    """
    given: Mapping[str, float]
    usual, given = _parse(alpha) if isinstance(alpha, str) else (float(alpha), {})
    error: type[PlanError] = SettingError
    where = "alpha"
    if file is not None:
        error, where = PlanError, f"alpha_file {file}"
        given = _read(file, where)
    if not given:
        return Alphas(usual)
    subjects = list(_subjects(rows))
    types = {subject.module_type for subject in subjects}
    others = []
    for key, value in given.items():
        other = _Other(key, value, None if key in types else compile_pattern(where, key, error))
        if other.pattern is not None and not any(other.applies(subject) for subject in subjects):
            analysed = sorted({subject.module_type for subject in subjects if _is_analysed(subject)})
            raise error(
                f"{where}: {printable(key, 80)} is no module type and matches no name; analysed are "
                f"{printable(', '.join(analysed), 300)}"
            )
        others.append(other)
    return Alphas(usual, tuple(others))


def _subjects(rows: Sequence[Row]) -> Iterator[Row | Module]:
    """All that may be merged: modules, and tensors that are none."""
    for row in rows:
        if row.slices is None:
            yield row
        else:
            yield from slices_of(row)


def _is_analysed(subject: Row | Module) -> bool:
    return subject.analysed if isinstance(subject, Row) else subject.row.analysed


def _read(file: str, where: str) -> Mapping[str, float]:
    document = read_yaml(file, PlanError, subject=where)
    if not isinstance(document, dict) or not document:
        raise PlanError(
            f"{where} should hold module types, or regular expressions on names, like `v_proj: 0.5`"
        )
    for key, value in document.items():
        if not isinstance(key, str):
            raise PlanError(f"{where}: {key!r} is no text")
        if not _is_share(value):
            raise PlanError(
                f"{where}: α of {printable(key, 80)} should be a number from 0 to 1, not {value!r}"
            )
    return {key: float(value) for key, value in document.items()}


def _parse(text: str) -> tuple[float, dict[str, float]]:
    """The usual α, and others by key."""
    first, *rest = (part.strip() for part in text.split(","))
    others: dict[str, float] = {}
    for part in rest:
        key, _, value = (word.strip() for word in part.partition("="))
        if not key or key in others:
            raise _malformed(text)
        others[key] = _share(value, text)
    return _share(first, text), others


def _share(word: str, text: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise _malformed(text) from None
    if not _is_share(value):
        raise _malformed(text)
    return value


def _is_share(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0.0 <= value <= 1.0
    )


def _malformed(text: str) -> SettingError:
    return SettingError(
        f"it should be a number from 0 to 1, also by module type as in 0.8,v_proj=0.5, not {printable(repr(text), 80)}"
    )
