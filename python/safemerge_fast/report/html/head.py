"""What all pages say: title, settings, facts, roles, the rule, and which rules this program knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..._engine import __version__
from ...decision import Rule
from ...errors import SafemergeError
from ...printable import printable
from ...settings import Settings, fields_of
from .columns import ModuleColumns

__all__ = ["head", "measurement_facts", "roles", "rule_record", "sentences", "summary", "version_fact"]

_VERSION = 1

# An example of each kind of rule that the page can draw.
_KINDS = {
    "threshold": "threshold",
    "null": "null:1",
    "z": "z:0",
    "lowest": "lowest:1",
    "fraction": "fraction:0.5",
}

_MOST = 1000


def head(
    kind: str,
    title: str,
    facts: Mapping[str, Any],
    settings: Settings | None,
    public: Callable[[Any], Any] = lambda value: value,
    merge: type[Settings] | None = None,
) -> dict[str, Any]:
    """The page's data but what belongs to its kind.

    Args:
        kind: "analysis", "merge" or "sweep".
        title: The title.
        facts: Names and values; those that are None are left out.
        settings: What was asked for, if it is a record.
        public: Makes a value of a setting fit to be published.
        merge: The record of the settings of the merge that the page gives commands for.
    """
    values = {} if settings is None else settings.to_dict()
    return {
        "version": _VERSION,
        "kind": kind,
        "title": printable(title),
        "program": f"safemerge-fast {__version__}",
        "facts": [[name, printable(str(value), _MOST)] for name, value in facts.items() if value is not None],
        "settings": [
            [
                field.name,
                printable(str(public(values[field.name])), _MOST),
                values[field.name] == field.default,
            ]
            for field in ([] if settings is None else fields_of(type(settings)))
            # What belongs to one run, such as --resume, says nothing of the output.
            if field.setting.in_files and values.get(field.name) is not None
        ],
        "offered": [] if merge is None else [*_offered(merge)],
        "roles": [],
        "warnings": [],
        "notes": [],
    }


def roles(sources: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The models by role.

    Args:
        sources: By role "model", "files" with the size of each, and, if known, "sample".
    """
    return [
        {
            "role": role,
            "model": printable(str(source["model"])),
            "files": len(source["files"]),
            "bytes": sum(facts["size"] for facts in source["files"].values()),
            "sample": source.get("sample"),
        }
        for role, source in sources.items()
    ]


def rule_record(rule: Rule) -> dict[str, Any]:
    """The rule that the page begins with."""
    return {
        "select": rule.select if getattr(rule, "modules", None) is None else "list",
        "threshold": rule.threshold,
        "granularity": rule.granularity,
        "onUndefined": rule.on_undefined,
        "perType": bool(getattr(rule, "per_type", False)),
    }


def measurement_facts(
    columns: ModuleColumns, estimator: str | None, failure: float | None, seed: int | None
) -> dict[str, Any]:
    """How ρ was measured, as facts; probability and seed say nothing where all of them are exact."""
    estimated = columns.estimated
    how = f"{columns.measured - estimated:,} exact, {estimated:,} estimated from random columns"
    facts: dict[str, Any] = {"Estimator": estimator, "Values of ρ": how}
    if estimated and failure is not None:
        facts |= {"Probability that any interval misses": f"{failure:g}", "Seed": seed}
    return facts


def sentences(texts: Iterable[str]) -> list[str]:
    """Warnings and notes as a page shows them."""
    return [printable(text, _MOST) for text in texts]


def summary(columns: ModuleColumns) -> str:
    """What a reader without scripts is told."""
    share = columns.share_of_update()
    update = "" if share is None else f", which hold {share:.1%} of the squared norm of the update"
    return f"{sum(columns.merged)} of {len(columns)} modules are merged{update}."


def version_fact(found: Mapping[str, str]) -> dict[str, str]:
    """Versions as a fact."""
    return {"Versions": ", ".join(f"{name} {version}" for name, version in found.items())}


def _offered(merge: type[Settings]) -> Iterator[str]:
    """The kinds of rules that a merge knows, of those that the page can draw, and what else it takes."""
    for kind, example in _KINDS.items():
        try:
            Rule(select=example)
        except SafemergeError:
            continue
        yield kind
    known = {field.name for field in fields_of(merge)}
    yield from (name for name in ("per_type", "modules") if name in known)
