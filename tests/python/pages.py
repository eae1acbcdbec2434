"""Pages of reports made of numbers that tests make up, and what a reader without a browser finds in them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from safemerge_fast.decision import Rule
from safemerge_fast.report.html.columns import ModuleColumns
from safemerge_fast.report.html.head import head, rule_record
from safemerge_fast.report.html.page import compose, write_pieces
from safemerge_fast.report.modules import ModuleReport

ALL_RULES = ["threshold", "null", "z", "lowest", "fraction", "per_type", "modules"]

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>alert(1)</script>",
    "]]><svg onload=alert(1)>",
    "'\"`${alert(1)}`\"'",
    "{{data}}{{script}}",
    "a\u202eb\u2066c",
    "\x00\x1b[31m\x7f",
    "a\udcffb",
    "line\nbreak\u2028\u2029",
    "__proto__",
    "\U0001f600\uffff",
    "x" * 10_000,
]


def module(name: str, module_type: str, layer: str | None, rho: float | None, **numbers: Any) -> ModuleReport:
    """A module with numbers that one may leave to chance."""
    known: dict[str, Any] = {
        "rho_null": 0.5,
        "v_norm": 1.5,
        "delta_norm": 2.0,
        "weight_norm": 50.0,
        "v_rounding": 0.1,
        "cos_v_delta": -0.25,
        "rho_low": None if rho is None else max(rho - 0.01, 0.0),
        "rho_high": None if rho is None else min(rho + 0.01, 1.0),
        "columns": 96,
        "null_sd": 0.05,
        **numbers,
    }
    merged = rho is None or rho < 0.35
    return ModuleReport(name, module_type, layer, merged, f"reason of {name}", rho, **known)


def dense(layers: int, seed: int = 0, *, undefined: bool = False) -> list[ModuleReport]:
    """A decoder's modules; with undefined, some have no ρ or no ρ_null, and many are equal."""
    draw = random.Random(seed)
    found = []
    for layer in range(layers):
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            rho: float | None = draw.random()
            null: float | None = draw.uniform(0.2, 0.7)
            if undefined:
                rho = draw.choice([None, 0.0, 0.25, 0.5, rho])
                null = draw.choice([None, 0.5, null])
            found.append(
                module(
                    f"model.layers.{layer}.{kind}.weight",
                    kind,
                    f"model.layers.{layer}",
                    rho,
                    rho_null=null,
                    delta_norm=draw.uniform(0.5, 2.0),
                    null_sd=draw.uniform(0.02, 0.08),
                )
            )
    return found


def experts(layers: int, count: int, seed: int = 0) -> list[ModuleReport]:
    """A mixture's modules: so many experts in each layer."""
    draw = random.Random(seed)
    return [
        module(
            f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight",
            f"experts.{kind}",
            f"model.layers.{layer}",
            draw.random(),
            rho_null=draw.uniform(0.3, 0.6),
        )
        for layer in range(layers)
        for expert in range(count)
        for kind in ("gate_proj", "up_proj", "down_proj")
    ]


def write_page(path: Path, modules: Iterable[ModuleReport], rule: Rule | None = None, **more: Any) -> Path:
    """Writes a page of these modules."""
    columns = ModuleColumns(modules)
    document = {
        **head("analysis", more.get("title", "A page"), {"Device": "cpu"}, None),
        "reference": "aligned",
        "rule": rule_record(rule or Rule()),
        "command": ["safemerge-fast merge --base b", "-o out"],
        "offered": ALL_RULES,
        **more,
    }
    write_pieces(
        path, compose(document, title=document["title"], summary="A page.", modules=columns.pieces())
    )
    return path


class Parsed(HTMLParser):
    """A page as a parser of HTML sees it.

    Attributes:
        tags: Its tags, in order.
        handlers: Attributes that would run code or load something.
        parts: Text by the id of the element that it stands in.
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.handlers: list[tuple[str, str | None]] = []
        self.parts: dict[str, str] = {}
        self.policy = ""
        self._inside: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.handlers += [(name, value) for name, value in attrs if name.startswith("on") or name == "src"]
        if tag == "link" or (tag == "a" and not (values.get("href") or "").startswith("#")):
            self.handlers += [(name, value) for name, value in attrs if name == "href" and value != "data:,"]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        if tag in ("script", "style", "title"):
            self._inside.append(values.get("id") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "title"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.parts[self._inside[-1]] = self.parts.get(self._inside[-1], "") + data

    @property
    def data(self) -> Any:
        """What the page's script is given."""
        return json.loads(self.parts["data"])


def names_of(modules: dict[str, Any]) -> list[str]:
    """The names of a page's modules, put together again."""
    names: list[str] = []
    for shared, rest in zip(modules["shared"], modules["rest"], strict=True):
        names.append((names[-1][:shared] if names else "") + rest)
    return names


def sequence(modules: dict[str, Any], table: str, column: str) -> Sequence[str | None]:
    """A column of words."""
    return [None if index < 0 else modules[table][index] for index in modules[column]]
