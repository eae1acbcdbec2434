"""The jobs of the comparison, as data: what each reads, and the configuration that every tool gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A merge by a method that all tools know.

    Attributes:
        title: The job in words.
        method: Name of the method.
        base: The model that plays the base, if the method has one.
        models: The models that are merged.
        shared: Parameters of the method.
        each: Parameters of each model, in order.
    """

    title: str
    method: str
    base: str | None
    models: Sequence[str]
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Sequence[Mapping[str, Any]] = ()

    @property
    def inputs(self) -> list[str]:
        """The models that are read."""
        return list(dict.fromkeys([*([self.base] if self.base else []), *self.models]))

    def configuration(self, directory: Path) -> dict[str, Any]:
        """The job as mergekit's YAML has it, with models as folders of a directory."""
        each = self.each or [{} for _ in self.models]
        document: dict[str, Any] = {
            "merge_method": self.method,
            "models": [
                {"model": str(directory / model), "parameters": dict(parameters)}
                for model, parameters in zip(self.models, each, strict=True)
            ],
            "parameters": dict(self.shared),
            "dtype": "bfloat16",
        }
        if self.base is not None:
            document["base_model"] = str(directory / self.base)
        return document


_HALVES = ({"weight": 0.5, "density": 0.5}, {"weight": 0.5, "density": 0.5})

JOBS = {
    "linear": Job(
        "linear, 2 models",
        "linear",
        None,
        ["first", "second"],
        {"normalize": False},
        ({"weight": 0.8}, {"weight": 0.2}),
    ),
    "slerp": Job("slerp, 2 models", "slerp", "first", ["first", "second"], {"t": 0.5}),
    "ties": Job("ties, 2 models + base", "ties", "base", ["first", "second"], {"normalize": True}, _HALVES),
    "dare_ties": Job(
        "dare_ties, 2 models + base", "dare_ties", "base", ["first", "second"], {"normalize": False}, _HALVES
    ),
}
"""Merges that mergekit and a script can do as well."""

FINETUNED = {"base": None, "first": 1, "second": 2}
"""The models by name: the seed of their update, or None for the one that the others are fine-tuned from."""
