"""Recipes in files: YAML whose field `recipe` says which, and whose other fields are its settings.

A document with `merge_method` in place of `recipe` is a configuration in mergekit's format, see `mergekit/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..errors import PlanError
from .fold import FoldConfiguration
from .mergekit.document import read_document
from .mergekit.execution import MergekitConfiguration
from .safemerge.configuration import MergeConfiguration

__all__ = ["RECIPES", "read_recipe"]

RECIPES: Mapping[str, type[MergeConfiguration] | type[FoldConfiguration]] = {
    "fold": FoldConfiguration,
    "safemerge": MergeConfiguration,
}
"""Recipes by name, and the configuration that the fields of each are those of."""

# These belong to one run, not to what is made: the command line gives them.
_OF_THE_RUN = frozenset({"output", "resume", "overwrite"})


def read_recipe(
    file: str | Path, *, output: str, **run: Any
) -> MergeConfiguration | FoldConfiguration | MergekitConfiguration:
    """Reads a recipe.

    Args:
        file: YAML, or JSON, which is YAML too. Paths in it are relative to the working directory, as on the
            command line.
        output: The output directory.
        run: Further fields that win over the file's, where they are not None.

    Returns:
        The configuration of the recipe.

    Raises:
        PlanError: The file cannot be read, names no known recipe, or has a field that is unknown, missing or
            out of range.
        AnalysisError: A field of the decision's rule is out of range.
    """
    document = _read(Path(file))
    given = {name: value for name, value in run.items() if value is not None}
    if "merge_method" in document and "recipe" not in document:
        return MergekitConfiguration(document=read_document(str(file), document), output=output, **given)
    recipe = document.pop("recipe", None)
    if not isinstance(recipe, str) or recipe not in RECIPES:
        known = " or ".join(RECIPES)
        raise PlanError(
            f"{file} should say `recipe: {known}`"
            + (", or have a merge_method" if recipe is None else f", not {recipe!r}")
        )
    configuration = RECIPES[recipe]
    accepted = {field.name: field for field in fields(configuration)}
    for name, value in document.items():
        if name in _OF_THE_RUN:
            raise PlanError(f"{file} sets {name}, which is given on the command line (see run --help)")
        if name not in accepted:
            raise PlanError(
                f"{file}: the recipe {recipe} has no field {name!r}; it has "
                f"{', '.join(name for name in accepted if name not in _OF_THE_RUN)}"
            )
        _check_type(str(file), name, value, str(accepted[name].type))
    for name, field in accepted.items():
        if field.default is MISSING and name not in document and name != "output":
            raise PlanError(f"{file}: the recipe {recipe} needs the field {name}")
    return configuration(**{**document, **given, "output": output})


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.load(file.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the recipe {file}: {error}") from error
    except yaml.YAMLError as error:
        raise PlanError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise PlanError(f"{file} should hold fields with values, like `recipe: fold`")
    return document


def _loader() -> Any:
    """PyYAML's safe loader, which takes no field twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if twice := sorted({str(name) for name in names if names.count(name) > 1}):
                raise yaml.YAMLError(f"the field {twice[0]} stands there twice")
            return super().construct_mapping(node, deep)

    return Loader


def _check_type(file: str, name: str, value: object, annotation: str) -> None:
    """Checks a value against the annotation of its field, of the few kinds that configurations have."""
    kinds = {kind.strip() for kind in annotation.split("|")}
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": whole,
        "float": whole or (isinstance(value, float) and math.isfinite(value)),
        "None": value is None,
    }
    if not any(fits[kind] for kind in kinds):
        words = {"str": "text", "bool": "true or false", "int": "a whole number", "float": "a finite number"}
        expected = " or ".join(words[kind] for kind in words if kind in kinds)
        raise PlanError(f"{file}: {name} should be {expected}, not {value!r}")
