"""The roles that several recipes know, declared once, and how their models are opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from ..checkpoint.adapter import open_source
from ..checkpoint.model import Model, open_model
from ..settings import Kind, Setting

__all__ = ["Aligned", "Base", "Finetuned", "open_roles"]

Base = Annotated[str, Setting("The model before alignment.", kind=Kind.MODEL, metavar="MODEL")]
Aligned = Annotated[str, Setting("The aligned model that was fine-tuned.", kind=Kind.MODEL, metavar="MODEL")]
Finetuned = Annotated[
    str,
    Setting(
        "The fine-tuned model, to be repaired; or a LoRA adapter of the aligned one.",
        kind=Kind.MODEL,
        metavar="MODEL",
    ),
]

_MAY_BE_ADAPTERS = ("finetuned", "safe")


def open_roles(roles: Mapping[str, str], read_backend: str = "auto") -> dict[str, Model]:
    """Opens the model of each role; finetuned and safe may be adapters of the aligned one.

    Args:
        roles: What was given for each role.
        read_backend: How inputs are read.

    Raises:
        CheckpointError: A model cannot be found, read or trusted.
        AdapterError: An adapter cannot be merged exactly, or a role is one that may not be.
    """
    return {
        role: (open_source if role in _MAY_BE_ADAPTERS else open_model)(role, spec, read_backend=read_backend)
        for role, spec in roles.items()
    }
