"""Quantised tensors of the model that an output is shaped like: what they are stored as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .._engine import TensorInfo
from ..checkpoint.model import Model

__all__ = ["Encoded", "encoded_of", "encoding_notes"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """How a quantised tensor is stored.

    Attributes:
        role: Role of the model that has it.
        format: Its format, in words.
        codes: Name of the stored tensor that holds its numbers.
        scales: Name of the one that holds their scales, or None.
        others: Names of further ones, which are copied with it: a global scale, its shape, scales of activations.
        nbytes: Bytes of all of them.
        kept: Whether the output's tensor is stored so, too.
    """

    role: str
    format: str
    codes: str
    scales: str | None
    others: tuple[str, ...]
    nbytes: int
    kept: bool = True

    @property
    def is_block_format(self) -> bool:
        """Whether it is stored as gpt-oss stores experts: (experts, out, in), where numbers are (experts, in, out)."""
        return self.codes.endswith("_blocks")


def encoded_of(tensor: TensorInfo, role: str) -> Encoded | None:
    """How a tensor is stored, or None if it is stored as numbers.

    Args:
        tensor: The tensor.
        role: Role of the model that has it.
    """
    if tensor.encoding is None:
        return None
    codes, *rest = tensor.stored
    scales = tensor.scales
    others = tuple(name for name in rest if name != scales)
    return Encoded(role, tensor.encoding, codes, scales, others, tensor.nbytes)


def encoding_notes(models: Mapping[str, Model]) -> list[str]:
    """Says how tensors are quantised; models that are so alike are one note.

    Args:
        models: The models by role.
    """
    alike: dict[str, list[str]] = {}
    for role, model in models.items():
        formats = Counter(tensor.encoding for tensor in model.headers.tensors if tensor.encoding is not None)
        if formats:
            words = ", ".join(f"{count} as {name}" for name, count in sorted(formats.items()))
            alike.setdefault(words, []).append(role)
    return [f"quantised tensors of {', '.join(roles)}: {words}" for words, roles in alike.items()]
