"""The output's tensors, and what each model has for them: by name, in whichever layer of it that is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..._engine import TensorInfo
from ...checkpoint.model import FLOATS, Model
from ...errors import PairingError
from ...pairing.counterparts import counterparts
from ...pairing.encoded import encoded_of
from ...pairing.modules import classify, layer_of, module_type
from ...pairing.row import Row, SameName
from ...pairing.tied import is_head, ties_head
from ...plan.methods import Method
from ...plan.operation import Operation
from .models import Participant
from .operations import Operations
from .slices import Input, Part, Section

__all__ = ["Tensors", "find_tensors"]

# Buffers that models compute from their configuration; old checkpoints hold them.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attn\.masked_bias)$")

MERGED = "merged"
"""The reason of rows whose tensors are computed; those of others begin with "copied"."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """All output tensors.

    Attributes:
        rows: In the order of the output; the reason says whether and why each is copied.
        operations: What makes each, by name.
        unused: For each model its tensors that no output tensor is made of.
        notes: What a person should know.
    """

    rows: tuple[Row, ...]
    operations: Mapping[str, Operation]
    unused: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def find_tensors(
    host: Participant,
    sections: Sequence[Section],
    parts: Iterable[Part],
    operations: Operations,
    *,
    stacked: bool,
) -> Tensors:
    """Finds out what every output tensor can be made of, from headers, and what makes it.

    Args:
        host: The model that the output is shaped like.
        sections: The slices in order.
        parts: The output's tensors.
        operations: Says what merges and what copies a tensor.
        stacked: Whether the output has other layers than its host.

    Raises:
        PairingError: A model lacks a tensor, or has it in another shape.
        PlanError: A parameter is missing for a tensor.
        AdapterError: An adapter does to a tensor what the method cannot take.
    """
    finder = _Finder(host, operations)
    for part in parts:
        finder.add(part)
    rows = finder.rows
    if not stacked and sections[0].layers is not None:
        order = {name: place for place, name in enumerate(host.tensors)}
        rows.sort(key=lambda row: order[row.name])
    unused = finder.unused(sections)
    _refuse_lost_head(host, sections[-1], unused)
    if not stacked:
        finder.notes += _unused_notes(host, unused)
    return Tensors(tuple(rows), finder.operations, unused, tuple(dict.fromkeys(finder.notes)))


class _Finder:
    """Goes through the parts of an output and collects its rows."""

    def __init__(self, host: Participant, operations: Operations) -> None:
        """Starts with no tensor.

        Args:
            host: The model that the output is shaped like.
            operations: As for find_tensors.
        """
        self.rows: list[Row] = []
        self.operations: dict[str, Operation] = {}
        self.notes: list[str] = []
        self._host = host
        self._made = operations
        self._used: dict[str, set[str]] = {}

    def add(self, part: Part) -> None:
        """Adds the tensors of a part; errors are those of find_tensors."""
        models = {item.participant.label: item.participant for item in part.section.all_inputs}
        found = [self._found(part, model) for model in models.values()]
        labels = tuple(models)
        for place, (name, *names) in enumerate(zip(part.names, *found, strict=True)):
            # Nearly all tensors have one name everywhere, and share what says so.
            stored: Mapping[str, str] = (
                SameName(name, labels)
                if names.count(name) == len(labels)
                else {
                    label: theirs for label, theirs in zip(labels, names, strict=True) if theirs is not None
                }
            )
            self._add(part, place, models, stored)
        for model, column in zip(models.values(), found, strict=True):
            used = {name for name in column if name is not None}
            self._used.setdefault(model.role, set()).update(used - model.replaced)

    def unused(self, sections: Sequence[Section]) -> dict[str, tuple[str, ...]]:
        """Names of each model's tensors that nothing is made of."""
        models = {item.participant.role: item.participant for part in sections for item in part.all_inputs}
        return {
            role: tuple(name for name in model.model.headers.names if name not in self._used[role])
            for role, model in models.items()
        }

    def _found(self, part: Part, model: Participant) -> Sequence[str | None]:
        """What a model calls each tensor of a part; None for those that it does not have."""
        asked = part.asked[model.label]
        if all(name in model.tensors for name in asked):
            return asked
        found, notes = counterparts(asked, model.model)
        self.notes += notes
        return [found.get(name) for name in asked]

    def _add(
        self, part: Part, place: int, models: Mapping[str, Participant], stored: Mapping[str, str]
    ) -> None:
        """Adds one output tensor.

        Args:
            part: The part that it is in.
            place: Its place there.
            models: All inputs by label.
            stored: The name of what each input has for it, by label.
        """
        name, section = part.names[place], part.section
        copied: str | None = None
        reason = MERGED
        if len(stored) < len(models):
            missing = next(item for item in section.all_inputs if item.participant.label not in stored)
            copied = _sole(part, place, stored, missing, self._made.method)
            reason = f"copied: missing in {missing.participant.label}"
            self.notes.append(f"{name} is copied from {copied}: it is missing in {missing.participant.label}")
        anchor = section.anchor.participant.label
        label = anchor if anchor in stored else next(iter(stored))
        owner, tensor = models[label], models[label].tensors[stored[label]]
        shape, dtype = tensor.shape, tensor.dtype
        for other in stored:
            if other != label:
                _check_alike(name, label, shape, dtype, other, models[other].tensors[stored[other]])
        if not part.layered and owner is not self._host and name in self._host.tensors:
            _check_alike(name, label, shape, dtype, self._host.label, self._host.tensors[name])
        if copied is None and (dtype not in FLOATS or 0 in shape):
            copied = label
            reason = "copied: empty" if 0 in shape else f"copied: {dtype} cannot be merged"
            self.notes += _differing(name, owner, models, stored)
        if copied is None:
            operation = self._made.merged(part, place, stored)
            if operation.is_copy:
                reason = "copied unchanged"
        else:
            operation = self._made.copied(name, models[copied], stored[copied])
        self.operations[name] = operation
        adapters = [other for other in stored if models[other].adapter is not None]
        self.rows.append(
            Row(
                name=name,
                file=tensor.file,
                dtype=dtype,
                shape=shape,
                names={other: stored[other] for other in stored if other not in adapters}
                if adapters
                else stored,
                module_type=module_type(name, classify(tensor, owner.decoder_layers)),
                layer=layer_of(name),
                analysed=False,
                transposed=False,
                reason=reason,
                adapted={other: models[other].terms(stored[other]) for other in adapters},
                encoded=encoded_of(tensor, label),
            )
        )


def _sole(part: Part, place: int, stored: Mapping[str, str], missing: Input, method: Method) -> str:
    """The model that a tensor is copied from although another one lacks it; refuses where that is no choice."""
    name = part.names[place]
    if len(stored) == 1 and method.sole:
        return next(iter(stored))
    anchor = part.section.anchor.participant.label
    if anchor in stored and _COMPUTED.search(name):
        return anchor
    label = missing.participant.label
    first = next(iter(stored), None)
    has = f"{name} of the output" if first is None else f"{part.asked[first][place]} of {first}"
    raise PairingError(
        f"{has} has no counterpart in {label} ({missing.place}; expected as {part.asked[label][place]} in "
        f"{missing.participant.model.path}); give models of one architecture, with the same tensors stored"
    )


def _check_alike(
    name: str, label: str, shape: tuple[int, ...], dtype: str, other: str, theirs: TensorInfo
) -> None:
    """Refuses a counterpart of another shape, or of a kind that cannot be averaged with this one."""
    if theirs.shape != shape:
        hint = (
            "give all models one vocabulary first (resize_token_embeddings)"
            if theirs.shape[1:] == shape[1:]
            else "give models of one architecture and size"
        )
        raise PairingError(f"{name} has shape {shape} in {label} but {theirs.shape} in {other}; {hint}")
    if (theirs.dtype in FLOATS) != (dtype in FLOATS):
        raise PairingError(
            f"{name} is {dtype} in {label} but {theirs.dtype} in {other}; give models that store it alike"
        )


def _differing(
    name: str, owner: Participant, models: Mapping[str, Participant], stored: Mapping[str, str]
) -> list[str]:
    """Says that a tensor which is not merged differs between models."""
    mine = owner.tensors[stored[owner.label]]
    for label, theirs in stored.items():
        if not _same_bytes(owner.model, mine, models[label].model, models[label].tensors[theirs]):
            return [
                f"{name} is {mine.dtype}, which cannot be merged, and differs between {owner.label} and {label}: "
                f"that of {owner.label} is copied"
            ]
    return []


def _same_bytes(model: Model, tensor: TensorInfo, other: Model, theirs: TensorInfo) -> bool:
    """Whether two tensors that are not merged are stored alike; few are, and small."""
    if model is other and tensor.name == theirs.name:
        return True
    return tensor.dtype == theirs.dtype and _bytes(model, tensor) == _bytes(other, theirs)


def _bytes(model: Model, tensor: TensorInfo) -> bytes:
    # Few models have such tensors, and numpy takes its time to load.
    import numpy as np

    rows = tensor.shape[0] if tensor.shape else 1
    return np.asarray(model.headers.rows(tensor.name, 0, rows), dtype=np.uint8).tobytes()


def _refuse_lost_head(host: Participant, section: Section, unused: Mapping[str, Sequence[str]]) -> None:
    """Refuses to leave out a head that a model was trained with, because the host has none."""
    for item in section.all_inputs:
        model = item.participant.model
        head = next((name for name in unused[model.role] if is_head(name)), None)
        if head is not None and not ties_head(model.config):
            raise PairingError(
                f"{head} of {model.role} is a head of its own, but {host.label}, which the output is shaped like, ties "
                f"its head to the embedding; make {model.role} the base_model, or give models of one kind"
            )


def _unused_notes(host: Participant, unused: Mapping[str, Sequence[str]]) -> list[str]:
    """Names what other models have and the host has not."""
    return [
        f"{len(names)} tensors of {role} have no counterpart in {host.label} and are not used, such as {names[0]}"
        for role, names in unused.items()
        if names and role != host.model.role
    ]
