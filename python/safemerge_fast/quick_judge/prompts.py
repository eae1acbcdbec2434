"""The prompts of a quick judgement, from a file or the small set that comes with the program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..documents import RECIPE
from ..errors import SettingError
from ..printable import printable
from ..yaml_documents import read_yaml

__all__ = ["Prompts", "read_prompts"]

DEFAULT = Path(__file__).with_name("prompts.yml")
"""The set that comes with the program."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a model is asked.

    Attributes:
        harmful: Requests that it should decline.
        harmless: Requests that it should answer.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]


def read_prompts(file: Path | None) -> Prompts:
    """Reads prompts.

    Args:
        file: YAML or JSON with the lists `harmful` and `harmless`, either of which may be missing; None for the set
            that comes with the program.

    Raises:
        SettingError: The file cannot be read, or is not of that form.
    """
    path = DEFAULT if file is None else file
    document = read_yaml(path, SettingError, limit=RECIPE)
    if not isinstance(document, dict) or not document or document.keys() - {"harmful", "harmless"}:
        raise SettingError(f"{path} should hold the lists harmful and harmless, and nothing else")
    return Prompts(_texts(path, document, "harmful"), _texts(path, document, "harmless"))


def _texts(path: Path, document: dict[str, object], name: str) -> tuple[str, ...]:
    values = document.get(name, [])
    if not isinstance(values, list):
        raise SettingError(f"{path}: {name} should be a list of prompts")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str) or not value.strip():
            raise SettingError(
                f"{path}: prompt {number} of {name} should be text, not {printable(repr(value), 80)}"
            )
    return tuple(values)
