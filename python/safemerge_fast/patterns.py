"""Regular expressions that come from users and from files: searched in linear time, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping

from ._engine import Pattern
from .errors import SafemergeError
from .printable import printable

__all__ = ["ModulePatterns", "Pattern", "compile_pattern"]

_MOST_PATTERNS = 10_000


def compile_pattern(what: str, text: str, error: type[SafemergeError], *, within: str = "{}") -> Pattern:
    """Compiles a regular expression.

    Args:
        what: What it is, as the beginning of messages: "--include" or "…/adapter_config.json: rank_pattern".
        text: The expression, in Python's syntax but for look-around and backreferences, which cannot be searched in
            linear time.
        error: What to raise.
        within: A larger expression, and `{}` where the text stands in it; messages show the text alone.

    Returns:
        The pattern, with `search(name)` and `fullmatch(name)`, each returning a bool.

    Raises:
        SafemergeError: Of the class given: the expression is malformed, too large, or uses what is not supported.
    """
    try:
        return Pattern(within.replace("{}", text))
    except ValueError as problem:
        raise error(
            f"{what}: '{printable(text, 80)}' is not a regular expression that can be used: {printable(str(problem))}"
        ) from problem


class ModulePatterns:
    """Values by regular expressions on the ends of modules' names; the first one that matches wins, as in PEFT."""

    def __init__(self, what: str, values: Mapping[str, float], error: type[SafemergeError]) -> None:
        """Compiles the expressions.

        Args:
            what: What they are, as for compile_pattern.
            values: The values by expression, in the order in which they are tried.
            error: What to raise.

        Raises:
            SafemergeError: Of the class given: as compile_pattern, or there are too many.
        """
        if len(values) > _MOST_PATTERNS:
            raise error(f"{what} holds {len(values)} expressions; at most {_MOST_PATTERNS} are tried")
        # PEFT's own expression, with the dot before the name optional, at the beginning of the module's name.
        self._values = [
            (compile_pattern(what, text, error, within=r"\A(?:(.*\.)?({})$)"), value)
            for text, value in values.items()
        ]
        self._found: dict[str, float | None] = {}

    def first(self, module: str, default: float) -> float:
        """The value of the first expression that matches a module's name, or the default."""
        if module not in self._found:
            self._found[module] = next(
                (value for pattern, value in self._values if pattern.search(module)), None
            )
        value = self._found[module]
        return default if value is None else value
