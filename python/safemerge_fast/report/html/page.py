"""Puts the page together: template, style, script and data in one file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...printable import printable

__all__ = ["compose", "write_pieces"]

_SCRIPTS = ("data", "rules", "format", "charts", "heatmap", "figures", "table", "pareto", "page")
_PLACE = re.compile(r"\{\{(\w+)\}\}")

# Text of a script element ends at `</script`; without these three no text of a name can end or open anything.
_ESCAPES = (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"))


def compose(
    document: Mapping[str, Any], *, title: str, summary: str, modules: Iterable[str] = ("null",)
) -> Iterator[bytes]:
    """The page in pieces.

    Args:
        document: What the page shows but the modules; JSON can hold it.
        title: The page's title.
        summary: What a reader without scripts is told.
        modules: JSON of the modules, in pieces.
    """
    script = "\n".join(_text(f"scripts/{name}.js") for name in _SCRIPTS)
    script = f'(() => {{\n"use strict";\n{script}}})();\n'
    style = _text("report.css")
    policy = (
        f"default-src 'none'; script-src 'sha256-{_digest(script)}'; style-src 'sha256-{_digest(style)}'; "
        f"img-src data:; base-uri 'none'; form-action 'none'"
    )
    parts: dict[str, Iterable[str]] = {
        "title": (escape(printable(title)),),
        "summary": (escape(printable(summary)),),
        "policy": (policy,),
        "style": (style,),
        "script": (script,),
        "data": _data(document, modules),
    }
    # Split once: what is put in is not looked through again.
    for place, text in enumerate(_PLACE.split(_text("template.html"))):
        for piece in parts[text] if place % 2 else (text,):
            yield piece.encode()


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a page to a file.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _data(document: Mapping[str, Any], modules: Iterable[str]) -> Iterator[str]:
    """The JSON, in ASCII: lone surrogates of names are escapes, too."""
    head = json.dumps(document, allow_nan=False)
    yield _harmless(head[:-1] + (',"modules":' if len(document) else '"modules":'))
    for piece in modules:
        yield _harmless(piece)
    yield "}"


def _harmless(text: str) -> str:
    for character, escaped in _ESCAPES:
        text = text.replace(character, escaped)
    return text


@cache
def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
