"""The inputs of a job: which files they are, whether they hold still, and what tells one job from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import _engine
from ..addresses import is_url
from ..checkpoint.model import Model

__all__ = ["describe_inputs", "input_paths", "job_identity", "require_unchanged", "source_identity"]


def describe_inputs(models: Mapping[str, Model]) -> dict[str, dict[str, Any]]:
    """What was read, by role: "spec", "path", and "files" with the identity of each."""
    return {
        role: {
            "spec": model.spec,
            "path": model.location,
            "files": {file: facts.to_dict() for file, facts in model.headers.identity().items()},
        }
        for role, model in models.items()
    }


def require_unchanged(models: Mapping[str, Model]) -> None:
    """Raises PlanError if a file of any role is not the one that was opened: size, times or inode differ."""
    for model in models.values():
        model.headers.check_unchanged()


def input_paths(models: Mapping[str, Model]) -> list[str]:
    """Directories and files of all inputs, none of which an output may touch."""
    return list(dict.fromkeys(str(path) for model in models.values() for path in _paths(model)))


def _paths(model: Model) -> Iterator[Path]:
    if model.path.is_dir():
        yield model.path
    if is_url(model.headers.path):
        return
    directory = Path(model.headers.path)
    if directory.is_dir() and (model.path.is_dir() or directory != model.path.parent):
        yield directory
    for file in model.headers.files:
        yield directory / file
    # Small files that decide how weights are read.
    for name in ("config.json", "adapter_config.json"):
        if (directory / name).is_file():
            yield directory / name


def job_identity(
    recipe: str, settings: Mapping[str, Any], models: Mapping[str, Model], extra: object = None
) -> str:
    """A digest of all that decides an output: what was asked for, the inputs and this program's version.

    Args:
        recipe: The recipe's name.
        settings: The settings that decide the weights; paths of models do not count, their files do.
        models: The models by role.
        extra: What else decides, as JSON can hold it.
    """
    roles = set(models)
    document = {
        "version": _engine.__version__,
        "recipe": recipe,
        "settings": {name: value for name, value in settings.items() if name not in roles},
        "inputs": {role: source_identity(model) for role, model in models.items()},
        "extra": extra,
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def source_identity(model: Model) -> dict[str, Any]:
    """What tells one model from another without reading its weights: its files' identities and its configuration."""
    return {
        "files": {file: facts.to_dict() for file, facts in model.headers.identity().items()},
        "config": model.config,
    }
