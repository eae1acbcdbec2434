"""The roles that several recipes know, declared once, and how their models are opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Protocol

from ..checkpoint.adapter import Adapter, open_source
from ..checkpoint.model import Access, ExpertLayout, Model, open_model
from ..progress import ProgressCallback
from ..settings import Kind, Setting

__all__ = ["Aligned", "Base", "Finetuned", "access_of", "open_roles", "shape_of_repair"]

Base = Annotated[str, Setting("The model before alignment.", kind=Kind.MODEL, metavar="MODEL")]
Aligned = Annotated[str, Setting("The aligned model that was fine-tuned.", kind=Kind.MODEL, metavar="MODEL")]
Finetuned = Annotated[
    str,
    Setting(
        "The fine-tuned model, whose modules are merged; or a LoRA adapter of the aligned one.",
        kind=Kind.MODEL,
        metavar="MODEL",
    ),
]

_MAY_BE_ADAPTERS = ("finetuned", "safe")


class _Reading(Protocol):
    """Settings that say how models are read."""

    @property
    def read_backend(self) -> Literal["auto", "mmap", "pread"]:
        """How inputs are read."""

    @property
    def expert_lora_layout(self) -> ExpertLayout:
        """How adapters lay out LoRA of fused experts."""

    @property
    def progress(self) -> ProgressCallback | None:
        """Who is told of progress."""


def access_of(settings: _Reading) -> Access:
    """How models are opened; the Hub's bars are for those who are told of progress."""
    return Access(settings.read_backend, settings.progress is not None, settings.expert_lora_layout)


def open_roles(roles: Mapping[str, str], access: Access) -> dict[str, Model]:
    """Opens the model of each role; finetuned and safe may be adapters of the aligned one.

    Args:
        roles: What was given for each role.
        access: How they are read.

    Raises:
        CheckpointError: A model cannot be found, read or trusted.
        AdapterError: An adapter cannot be merged exactly, or a role is one that may not be.
    """
    return {
        role: (open_source if role in _MAY_BE_ADAPTERS else open_model)(role, spec, access=access)
        for role, spec in roles.items()
    }


def shape_of_repair(models: Mapping[str, Model]) -> Model:
    """The checkpoint that the output is shaped like: the fine-tuned, or the aligned one for an adapter."""
    finetuned = models["finetuned"]
    return models["aligned"] if isinstance(finetuned, Adapter) else finetuned
