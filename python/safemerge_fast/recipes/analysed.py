"""Settings of recipes that look at matrices one by one: which ones, and where that is computed."""

from __future__ import annotations

from typing import Annotated

from ..errors import SettingError
from ..patterns import compile_pattern
from ..settings import Kind, Setting

__all__ = ["Device", "Exclude", "Include"]


def _check_pattern(text: str) -> None:
    compile_pattern("it", text, SettingError)


Include = Annotated[
    str | None,
    Setting(
        "Analyse these tensors too, if they are 2-D and float.",
        kind=Kind.PATTERN,
        metavar="REGEX",
        check=_check_pattern,
    ),
]
Exclude = Annotated[
    str | None,
    Setting(
        "Leave these tensors out of the analysis.", kind=Kind.PATTERN, metavar="REGEX", check=_check_pattern
    ),
]
Device = Annotated[
    str, Setting("Where the analysis computes.", metavar="auto|cpu|cuda[:N]|mps", decides=False)
]
