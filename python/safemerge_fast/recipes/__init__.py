"""Stage 8, recipes: what is made, from settings to a report. Each is one module or package with a RECIPE.

The list below is all that command line, files, Python API and documentation know of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from .base import Recipe

__all__ = ["recipes"]

_MODULES = (
    "safemerge",
    "fold",
    "resta",
    "wise_ft",
    "shrink",
    "lox",
    "safety_vector",
    "safe_lora",
    "mergekit",
)
"""Modules of this package, in the order in which help and documentation list their recipes."""


@cache
def recipes() -> Mapping[str, Recipe[Any]]:
    """All recipes by name."""
    found = [import_module(f".{module}", __name__).RECIPE for module in _MODULES]
    return {recipe.name: recipe for recipe in found}
