"""Regular expressions that come from users and from files: searched in linear time, whatever they are."""

from __future__ import annotations

from ._engine import Pattern
from .errors import SafemergeError
from .printable import printable

__all__ = ["Pattern", "compile_pattern"]


def compile_pattern(what: str, text: str, error: type[SafemergeError]) -> Pattern:
    """Compiles a regular expression.

    Args:
        what: What it is, as the beginning of messages: "--include" or "…/adapter_config.json: rank_pattern".
        text: The expression, in Python's syntax but for look-around and backreferences, which cannot be searched in
            linear time.
        error: What to raise.

    Returns:
        The pattern, with `search(name)` and `fullmatch(name)`, each returning a bool.

    Raises:
        SafemergeError: Of the class given: the expression is malformed, too large, or uses what is not supported.
    """
    try:
        return Pattern(text)
    except ValueError as problem:
        raise error(
            f"{what}: '{printable(text, 80)}' is not a regular expression that can be used: {printable(str(problem))}"
        ) from problem
