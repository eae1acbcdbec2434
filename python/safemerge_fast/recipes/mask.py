"""Masks: files that say of each element how much is taken of what is merged; the rest stays the fine-tuned model's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from .. import _engine
from ..checkpoint.model import FLOATS, Access, Model, locate
from ..checkpoint.remote import address
from ..errors import CheckpointError, PairingError
from ..pairing.row import Row
from ..settings import Kind, Setting

__all__ = ["MASK", "MASKED", "MaskFile", "MaskOf", "open_mask"]

MASK = "mask"
"""The role that plans and reports call it by."""

MaskOf = Annotated[
    str | None,
    Setting(
        "Safetensors with a share from 0 to 1 for each element (floats, U8 or BOOL), under the names of the tensors: "
        "where it is 0 the fine-tuned model's element stays.",
        kind=Kind.MODEL,
        metavar="FILE",
        default="1 everywhere",
    ),
]

MASKED = ", as far as {mask} lets each element"
"""How a card's sentence goes on."""

_SHARES = frozenset({"U8", "BOOL"})


@dataclass(frozen=True, slots=True)
class MaskFile:
    """An opened mask that fits the output's tensors.

    Attributes:
        model: Its file.
        names: Tensors that it has shares for.
        unused: What it has besides.
        notes: What a person should know.
    """

    model: Model
    names: frozenset[str]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    def without(self, names: Iterable[str]) -> tuple[str, ...]:
        """A note on tensors that would be merged and are not, since the mask does not have them."""
        absent = sorted(set(names) - self.names)
        if not absent:
            return ()
        return (
            f"{len(absent)} tensors that would be merged are kept, since the mask has no tensor of their names, such "
            f"as {absent[0]}",
        )


def open_mask(spec: str, rows: Iterable[Row], access: Access) -> MaskFile:
    """Opens a mask and compares it with the output's tensors; only headers are read.

    Args:
        spec: A .safetensors file, or a directory of them, or one on the Hub.
        rows: The output's tensors.
        access: How it is read.

    Raises:
        CheckpointError: It cannot be found, read or trusted.
        PairingError: A tensor of it has another shape than the output's, or no shares; or none is the output's.
    """
    path = locate(MASK, spec, access=access)
    try:
        headers = _engine.Checkpoint(address(path), read_backend=access.read_backend)
    except CheckpointError as error:
        raise CheckpointError(f"{MASK}: {error}") from None
    known = {row.name: row for row in rows}
    used, unused = [], []
    for tensor in headers.stored_tensors:
        row = known.get(tensor.name)
        if row is None or row.dtype not in FLOATS:
            unused.append(tensor.name)
            continue
        if tensor.dtype not in FLOATS and tensor.dtype not in _SHARES:
            raise PairingError(
                f"{MASK}: {tensor.name} of {path} has dtype {tensor.dtype}; shares are floats, U8 or BOOL"
            )
        if tuple(tensor.shape) != tuple(row.shape):
            raise PairingError(
                f"{MASK}: {tensor.name} of {path} has shape {tuple(tensor.shape)}, but the output's tensor has "
                f"{tuple(row.shape)}; a mask has a share for each element"
            )
        used.append(tensor.name)
    if not used:
        first = f", such as {unused[0]}" if unused else ""
        raise PairingError(
            f"{MASK}: {path} has no tensor that is called like one of the output's; it has {len(unused)}{first}"
        )
    notes: tuple[str, ...] = ()
    if unused:
        notes = (
            f"{len(unused)} tensors of the mask are none of the output's floats and not used, such as {unused[0]}",
        )
    return MaskFile(Model(MASK, spec, path, headers, {}), frozenset(used), tuple(unused), notes)
