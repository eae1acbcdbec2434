"""The settings of the rule that says which modules are merged, and the file that lists them instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from ...decision import Rule
from ...decision.selection import FORMS
from ...documents import Limit, read_text
from ...errors import AnalysisError, SafemergeError, SettingError
from ...pairing.module import modules_of_rows
from ...pairing.row import Row
from ...printable import printable
from ...settings import Kind, Setting
from ...yaml_documents import parse_yaml

__all__ = [
    "Granularity",
    "Modules",
    "OnUndefined",
    "PerType",
    "Select",
    "Threshold",
    "checked_rule",
    "read_modules",
]

_LIST = Limit(64 << 20, 2_000_000)
"""A list of modules: a model has a hundred thousand of them."""


def _check_select(text: str) -> None:
    try:
        Rule(select=text)
    except SafemergeError as error:
        raise SettingError(str(error)) from error


Threshold = Annotated[
    float,
    Setting("τ: modules whose ρ is strictly below it are merged.", least=0.0, most=1.0, names=("--tau",)),
]
Select = Annotated[
    str,
    Setting(
        "Merge by the threshold; where ρ/ρ_null is below K; where z, the distance from chance in standard "
        "deviations, is below K; or the N (or the share F) of lowest ρ.",
        metavar=FORMS,
        check=_check_select,
    ),
]
PerType = Annotated[
    bool, Setting("With lowest:N and fraction:F: of each module type, instead of all modules together.")
]
Granularity = Annotated[
    Literal["module", "layer"],
    Setting("Decide for each module, or for whole layers by the mean of their modules."),
]
OnUndefined = Annotated[
    Literal["merge", "keep"],
    Setting("What to do with modules that have no ρ, because V or Δ is zero."),
]
Modules = Annotated[
    str | None,
    Setting(
        "Merge exactly the modules that this file lists, one in a line, or as a list in YAML or JSON; ρ is only "
        "reported.",
        kind=Kind.PATH,
        metavar="FILE",
    ),
]


def checked_rule(**values: Any) -> Rule:
    """The rule that settings make, by name.

    Raises:
        SettingError: Some do not go together.
    """
    try:
        return Rule(**values)
    except SafemergeError as error:
        raise SettingError(str(error)) from error


def read_modules(file: str, rows: Sequence[Row]) -> frozenset[str]:
    """Reads a list of modules.

    Args:
        file: One name in a line, where empty lines and those that begin with # do not count; or a list in YAML or
            JSON, if its name ends so.
        rows: All rows; each name must be a module of theirs that is analysed.

    Raises:
        AnalysisError: It cannot be read, holds no list of names, or a name that is no such module.
    """
    subject = f"the list of modules {file}"
    text = read_text(file, AnalysisError, limit=_LIST, subject=subject)
    if file.lower().endswith((".json", ".yml", ".yaml")):
        names = parse_yaml(text, AnalysisError, subject=subject, limit=_LIST)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AnalysisError(f"{subject} should be a list of names")
    else:
        names = [name for line in text.splitlines() if (name := line.strip()) and not name.startswith("#")]
    if not names:
        raise AnalysisError(f"{subject} names no module; leave it out, or merge nothing with --threshold 0")
    known = {module.name for module in modules_of_rows(rows)}
    for name in names:
        if name not in known:
            raise AnalysisError(f"{subject} names {printable(name, 200)}, {_why_not(name, rows)}")
    return frozenset(names)


def _why_not(name: str, rows: Sequence[Row]) -> str:
    """Why a name is no module, as the end of a sentence."""
    for row in rows:
        if row.name == name and row.analysed:
            return "which holds many experts; name their modules, as the report does"
        if row.name == name:
            return f"which is not analysed ({row.reason}); --include adds what is left out"
    return "which the fine-tuned model has no module of; names are those of the report"
