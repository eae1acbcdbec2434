"""The output's tensors, and what each model has for them: by name, in whichever layer of it that is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..._engine import TensorInfo
from ...checkpoint.model import FLOATS, Model
from ...errors import PairingError
from ...pairing.modules import classify, decoder_layers, layer_of, module_type
from ...pairing.rows import Row, counterparts, in_file_order
from ...pairing.tied import is_head, ties_head
from .arrangement import Wanted, arrange
from .references import Participant
from .slices import Input, Section

__all__ = ["Target", "Targets", "find_targets"]

# Buffers that models compute from their configuration; old checkpoints hold them.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attn\.masked_bias)$")

# With one model only these give that model's tensor.
_PASS_SINGLE = frozenset({"slerp", "nuslerp"})


@dataclass(frozen=True, slots=True)
class Target:
    """One output tensor.

    Attributes:
        row: Its name, dtype and shape; its terms are by the labels of the models that have it.
        section: The section that it is in.
        place: Its layer's place in the section from 0 to 1; 0 outside the layers.
        asked: The name that it has in each input's own counting of layers, by label.
        copied: The label of the model that it is copied from, or None if it is merged.
    """

    row: Row
    section: Section
    place: float
    asked: Mapping[str, str]
    copied: str | None


@dataclass(frozen=True, slots=True)
class Targets:
    """All output tensors.

    Attributes:
        targets: In the order of the output.
        layers: The layer of the anchor that each output layer is like, with that anchor; empty where the output
            has the layers of its host as they are.
        unused: For each model its tensors that no output tensor is made of.
        notes: What a person should know.
    """

    targets: tuple[Target, ...]
    layers: tuple[tuple[Participant, int], ...]
    unused: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def find_targets(host: Participant, sections: Sequence[Section], method: str, *, gradients: bool) -> Targets:
    """Finds out what every output tensor can be made of, from headers.

    Args:
        host: The model that the output is shaped like.
        sections: The slices in order.
        method: Name of the method.
        gradients: Whether parameters depend on the layer.

    Returns:
        The output's tensors.

    Raises:
        PairingError: A model lacks a tensor, or has it in another shape.
        PlanError: A model's layers must be known, and cannot be told.
    """
    arrangement = arrange(host, sections, gradients=gradients)
    targets: list[Target] = []
    notes: list[str] = []
    for section, wanted in arrangement.parts:
        found, more = _fill(host, section, wanted, method)
        targets += found
        notes += more
    if not arrangement.layers:
        order = {tensor.name: place for place, tensor in enumerate(in_file_order(host.model))}
        targets.sort(key=lambda target: order[target.row.name])
    unused = _unused(targets, sections)
    _refuse_lost_head(host, sections[-1], unused)
    if not arrangement.layers:
        notes += _unused_notes(host, unused)
    return Targets(tuple(targets), arrangement.layers, unused, tuple(dict.fromkeys(notes)))


def _fill(
    host: Participant, section: Section, wanted: Sequence[Wanted], method: str
) -> tuple[list[Target], list[str]]:
    """Finds each wanted tensor in every input of a section."""
    notes: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for item in section.all_inputs:
        label = item.participant.label
        found[label], more = counterparts([tensor.asked[label] for tensor in wanted], item.participant.model)
        notes += more
    targets = []
    for tensor in wanted:
        stored = {
            item.participant.label: (item.participant, item.participant.model.headers.tensor(name))
            for item in section.all_inputs
            if (name := found[item.participant.label].get(tensor.asked[item.participant.label])) is not None
        }
        target, note = _target(host, section, tensor, stored, method)
        targets.append(target)
        notes += note
    return targets, notes


def _target(
    host: Participant,
    section: Section,
    wanted: Wanted,
    stored: Mapping[str, tuple[Participant, TensorInfo]],
    method: str,
) -> tuple[Target, list[str]]:
    """Makes the output tensor of what the inputs have stored for it, and says what is special of it."""
    anchor = section.anchor.participant
    notes: list[str] = []
    copied = None
    missing = [item for item in section.all_inputs if item.participant.label not in stored]
    if missing:
        copied = _sole(wanted, anchor, stored, missing[0], method)
        notes.append(
            f"{wanted.name} is copied from {copied}: it is missing in {missing[0].participant.label}"
        )
    label = anchor.label if anchor.label in stored else next(iter(stored))
    participant, tensor = stored[label]
    _check_alike(wanted.name, label, tensor, stored)
    if not wanted.layer and wanted.name in host.model.headers:
        _check_alike(wanted.name, label, tensor, {host.label: (host, host.model.headers.tensor(wanted.name))})
    if copied is None and (tensor.dtype not in FLOATS or 0 in tensor.shape):
        copied = label
        if others := [
            other for other, (_, info) in stored.items() if not _same_bytes(stored[label], stored[other])
        ]:
            notes.append(
                f"{wanted.name} is {tensor.dtype}, which cannot be merged, and differs between {label} and "
                f"{others[0]}: that of {label} is copied"
            )
    model = participant.model
    kind = classify(tensor, decoder_layers(model.config))
    row = Row(
        name=wanted.name,
        file=tensor.file,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        names={},
        module_type=module_type(wanted.name, kind),
        layer=layer_of(wanted.name),
        analysed=False,
        transposed=False,
        reason=kind,
        terms={label: participant.terms(info.name) for label, (participant, info) in stored.items()},
    )
    return Target(row, section, wanted.place, wanted.asked, copied), notes


def _sole(
    wanted: Wanted,
    anchor: Participant,
    stored: Mapping[str, tuple[Participant, TensorInfo]],
    missing: Input,
    method: str,
) -> str:
    """The model that a tensor is copied from although another one lacks it; refuses where that is no choice."""
    if len(stored) == 1 and method in _PASS_SINGLE:
        return next(iter(stored))
    if anchor.label in stored and _COMPUTED.search(wanted.name):
        return anchor.label
    label = missing.participant.label
    asked = wanted.asked[label]
    has = (
        f"{wanted.name} of the output"
        if not stored
        else f"{wanted.asked[next(iter(stored))]} of {next(iter(stored))}"
    )
    raise PairingError(
        f"{has} has no counterpart in {label} ({missing.place}; expected as {asked} in "
        f"{missing.participant.model.path}); give models of one architecture, with the same tensors stored"
    )


def _check_alike(
    name: str,
    label: str,
    tensor: TensorInfo,
    stored: Mapping[str, tuple[Participant, TensorInfo]],
) -> None:
    """Refuses counterparts of another shape, or of a kind that cannot be averaged with this one."""
    for other, (_, info) in stored.items():
        if tuple(info.shape) != tuple(tensor.shape):
            hint = (
                "give all models one vocabulary first (resize_token_embeddings)"
                if tuple(info.shape)[1:] == tuple(tensor.shape)[1:]
                else "give models of one architecture and size"
            )
            raise PairingError(
                f"{name} has shape {tuple(tensor.shape)} in {label} but {tuple(info.shape)} in {other}; {hint}"
            )
        if (info.dtype in FLOATS) != (tensor.dtype in FLOATS):
            raise PairingError(
                f"{name} is {tensor.dtype} in {label} but {info.dtype} in {other}; give models that store it alike"
            )


def _same_bytes(mine: tuple[Participant, TensorInfo], other: tuple[Participant, TensorInfo]) -> bool:
    """Whether two tensors that are not merged are stored alike; few are, and small."""
    if mine[1].dtype != other[1].dtype:
        return False
    return bool(np.array_equal(_bytes(mine[0].model, mine[1]), _bytes(other[0].model, other[1])))


def _bytes(model: Model, tensor: TensorInfo) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rows = tensor.shape[0] if tensor.shape else 1
    return np.asarray(model.headers.rows(tensor.name, 0, rows), dtype=np.uint8)


def _unused(targets: Iterable[Target], sections: Sequence[Section]) -> dict[str, tuple[str, ...]]:
    """Names of each model's tensors that nothing is made of."""
    used: dict[str, set[str]] = {}
    participants = {
        item.participant.label: item.participant for section in sections for item in section.all_inputs
    }
    for target in targets:
        for label, terms in target.row.terms.items():
            role = participants[label].model.role
            used.setdefault(role, set()).update(
                term.operand.tensor for term in terms if term.operand.source == role
            )
    return {
        participant.model.role: tuple(
            tensor.name
            for tensor in participant.model.headers.tensors
            if tensor.name not in used.get(participant.model.role, ())
        )
        for participant in participants.values()
    }


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
