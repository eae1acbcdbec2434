"""What a card that is published may say of where models lie: names on the Hub, and last parts of paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Any

from ..checkpoint.model import Model

__all__ = ["Public", "hub_name", "last_part"]

# The Hub's own rules for names: whatever else stands in a path is no name, and might be Markdown or YAML.
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*?"
_CACHED = re.compile(rf"/models--(?P<owner>{_PART})--(?P<name>{_PART})/snapshots/")

# What begins a path that says something of a machine or a person.
_LOCAL = ("/", "~", "./", "../", "file:")


def hub_name(model: Model) -> str | None:
    """The model's owner/name on the Hub, from its place in the Hub's cache; None for other directories."""
    match = _CACHED.search(f"{model.path.as_posix()}/")
    return f"{match['owner']}/{match['name']}" if match is not None else None


def last_part(path: str) -> str:
    """The last part of a path; `/` and its like are a dot."""
    return path.rstrip("/").rpartition("/")[2] or "."


class Public:
    """Writes settings and command lines without the paths of this machine."""

    def __init__(self, models: Iterable[Model], output: str) -> None:
        """Learns the models' names.

        Args:
            models: The models; what was typed for each becomes its name on the Hub or the last part of its path.
            output: The output directory.
        """
        self._output = last_part(output)
        self._names: dict[str, str] = {}
        for model in models:
            # What was typed for a model on the Hub is its name already, perhaps with a revision.
            typed_name = hub_name(model) is not None and not model.spec.startswith(_LOCAL)
            self._names[model.spec] = model.spec if typed_name else hub_name(model) or last_part(model.spec)

    def __call__(self, value: Any) -> Any:
        """The value with every text in it made public; keys stay."""
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        return self._text(value) if isinstance(value, str) else value

    def command(self, line: str) -> str:
        """A command line, each word of it made public."""
        return shlex.join(self._text(word) for word in shlex.split(line))

    def _text(self, text: str) -> str:
        if text in self._names:
            return self._names[text]
        if "+" in text:
            # mergekit's way to name a model with an adapter on it.
            model, _, adapter = text.partition("+")
            if any(part in self._names or part.startswith(_LOCAL) for part in (model, adapter)):
                return f"{self._text(model)}+{self._text(adapter)}"
        if text.startswith("--") and "=" in text:
            option, _, given = text.partition("=")
            return f"{option}={self._text(given)}"
        local = text.startswith(_LOCAL) or ("/" in text and last_part(text) == self._output)
        return last_part(text) if local else text
