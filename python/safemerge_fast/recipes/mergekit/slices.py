"""The slices of the output, models opened: what each is merged from, its layers, and which tensors it gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...errors import PairingError, PlanError
from ...plan.methods import Method
from ...plan.values import Parameters
from .document import Document, Slice, Source
from .models import Participant, Participants, Stack, follows_layers, share

__all__ = ["Input", "Part", "Section", "list_parts", "open_sections", "stacked_layers"]

# What the layers must be known for.
_WHY = "cut slices"


@dataclass(frozen=True, slots=True)
class Input:
    """A model of a section.

    Attributes:
        place: Where it stands in the configuration.
        participant: The model.
        first_layer: The first of its layers that the section is made of.
        parameters: What is given for it.
    """

    place: str
    participant: Participant
    first_layer: int
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Section:
    """A slice of the output; there is one for all of it where the configuration names models.

    Attributes:
        place: Where it stands in the configuration.
        inputs: What is merged, in order, the base not among them.
        base: What it is merged on, or None for a method without.
        anchor: The base, or else the first input, or that of them which is the whole document's base: dtypes and
            shapes are its own.
        layers: How many layers there are; None for all of the models.
        parameters: What is given for the slice.
    """

    place: str
    inputs: tuple[Input, ...]
    base: Input | None
    anchor: Input
    layers: int | None
    parameters: Parameters

    @property
    def all_inputs(self) -> tuple[Input, ...]:
        """The base, if there is one, and what is merged."""
        return self.inputs if self.base is None else (self.base, *self.inputs)


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of the output that one section gives.

    Attributes:
        section: The section.
        names: Their names.
        asked: The names that they have in each input's own counting of layers, by label.
        places: Their layers' places in the section from 0 to 1; 0 outside the layers, as with mergekit.
        layered: Whether they are in layers that a slice names.
    """

    section: Section
    names: Sequence[str]
    asked: Mapping[str, Sequence[str]]
    places: Sequence[float]
    layered: bool


def open_sections(document: Document, participants: Participants) -> tuple[Participant, tuple[Section, ...]]:
    """Opens all models of a configuration and finds out what part each plays.

    Args:
        document: The configuration.
        participants: Opens the models.

    Returns:
        The host, which is the model that the output is shaped like: the base, or else the first model; and the
        sections in the order of the output.

    Raises:
        CheckpointError: A model cannot be found or merged.
        AdapterError: An adapter cannot be added to its model.
        PlanError: The method has no use for so many models, a base is missing, or layers are not there.
    """
    base = None if document.base_model is None else participants.open(document.base_model)
    sections = tuple(_open_section(document, slice_, base, participants) for slice_ in document.slices)
    host = base or sections[0].anchor.participant
    return host, sections


def _open_section(
    document: Document, slice_: Slice, whole_base: Participant | None, participants: Participants
) -> Section:
    method = document.method
    inputs = [_open_input(source, participants) for source in slice_.sources]
    base = whole_base if slice_.base_model is None else participants.open(slice_.base_model)
    if slice_.base_model is not None and method.base == "none":
        raise PlanError(f"{slice_.place}.base_model: {method.name} has no base; take it out")
    _refuse_twice(inputs)
    if (
        document.form == "models"
        and base is not None
        and all(item.participant is not base for item in inputs)
    ):
        assert document.base_model is not None
        # As with mergekit, a base that is not listed joins the models, for a method without base as one of them.
        inputs.append(Input(document.base_model.place, base, 0, {}))
    found = next((item for item in inputs if item.participant is base), None)
    if method.base == "none" or base is None:
        if method.base == "required":
            raise PlanError(f"{document.file}: {method.name} needs a base; add base_model")
        chosen, merged = None, inputs
    else:
        if found is None:
            raise PlanError(
                f"{slice_.place} has no source for its base {base.label}, so that its layers are not known; add it to "
                f"the sources with a layer_range"
            )
        if found.parameters:
            raise PlanError(
                f"{found.place}.parameters: {base.label} is the base, and {method.name} has no parameters for that; "
                f"take them out"
            )
        chosen, merged = found, [item for item in inputs if item is not found]
    _check_count(slice_.place, method, len(merged), chosen)
    return Section(
        place=slice_.place,
        inputs=tuple(merged),
        base=chosen,
        anchor=found or inputs[0],
        layers=_check_layers(slice_.sources, inputs),
        parameters=slice_.parameters,
    )


def _open_input(source: Source, participants: Participants) -> Input:
    participant = participants.open(source.model)
    first = 0 if source.layer_range is None else source.layer_range[0]
    return Input(source.place, participant, first, source.parameters)


def _refuse_twice(inputs: Sequence[Input]) -> None:
    for index, item in enumerate(inputs):
        for earlier in inputs[:index]:
            if earlier.participant is item.participant:
                raise PlanError(f"{item.place} is the same model as {earlier.place}; take one of them out")


def _check_count(place: str, method: Method, count: int, base: Input | None) -> None:
    least, most = method.least_operands, method.most_operands
    if least <= count and (most is None or count <= most):
        return
    number = (
        f"exactly {least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
    )
    raise PlanError(
        f"{place}: {method.name} merges {number} model(s){'' if base is None else ' besides the base'}, but there "
        f"are {count}"
    )


def _check_layers(sources: Sequence[Source], inputs: Sequence[Input]) -> int | None:
    """How many layers the sources of a slice have, all of them the same number."""
    count = None
    for source, item in zip(sources, inputs, strict=False):
        if source.layer_range is None:
            continue
        first, end = source.layer_range
        stack = item.participant.layers(f"cut slices ({source.place})")
        if end > stack.count:
            raise PlanError(
                f"{source.place}.layer_range ends at {end}, but {item.participant.label} has {stack.count} layers; "
                f"give an end of at most {stack.count}"
            )
        if count is not None and end - first != count:
            raise PlanError(
                f"{source.place}.layer_range has {end - first} layers, but {sources[0].place}.layer_range has {count}; "
                f"all sources of a slice need the same number"
            )
        count = end - first
    return count


def stacked_layers(host: Participant, sections: Sequence[Section]) -> tuple[tuple[Participant, int], ...]:
    """The layer of the anchor that each output layer is like, with that anchor.

    Returns:
        The layers in order; none where the output has the layers of its host as they are.
    """
    if sections[0].layers is None:
        return ()
    layers = [
        (section.anchor.participant, section.anchor.first_layer + index)
        for section in sections
        for index in range(section.layers or 0)
    ]
    in_place = layers == [(host, index) for index in range(host.layers(_WHY).count)]
    return () if in_place else tuple(layers)


def list_parts(
    host: Participant, sections: Sequence[Section], *, stacked: bool, gradients: bool
) -> list[Part]:
    """Lists the output's tensors; a section may give several parts.

    Args:
        host: The model that the output is shaped like.
        sections: The slices in order.
        stacked: Whether the output has other layers than its host.
        gradients: Whether parameters depend on the layer.

    Raises:
        PairingError: A model has other layers than the host, and there are no slices that say which to merge; or
            there are slices, and the host has a layer that none can name.
        PlanError: Layers must be known, and cannot be told.
    """
    if sections[0].layers is None:
        return [_whole(host, sections[0], gradients)]
    stack = host.layers(_WHY)
    outside = host.names.get(None, [])
    past = [name for name in outside if name.startswith(stack.prefix)]
    if past and stacked:
        raise PairingError(
            f"{past[0]} of {host.label} is past its {stack.count} layers (it predicts further tokens), and has no "
            f"place among slices; remove such tensors from the checkpoint first"
        )
    parts = [_outside(sections[0], [name for name in outside if not follows_layers(name)])]
    number = 0
    for section in sections:
        parts.append(_layers(section, stack, number))
        number += section.layers or 0
    parts.append(_outside(sections[-1], [name for name in outside if follows_layers(name)]))
    return parts


def _whole(host: Participant, section: Section, gradients: bool) -> Part:
    """All tensors of the host; layers have the same numbers everywhere."""
    stack = host.layers("apply gradients") if gradients else None
    for item in section.all_inputs:
        other = item.participant
        if other.stack is not None and host.stack is not None and other.stack.count != host.stack.count:
            raise PairingError(
                f"{other.label} has {other.stack.count} layers but {host.label} has {host.stack.count}; say by "
                f"slices which layers to merge"
            )
    names = list(host.tensors)
    places = [0.0] * len(names) if stack is None else [stack.place(name) for name in names]
    asked = dict.fromkeys((item.participant.label for item in section.all_inputs), names)
    return Part(section, names, asked, places, False)


def _outside(section: Section, names: Sequence[str]) -> Part:
    """Tensors outside the layers, whose names have no layer's number."""
    asked = dict.fromkeys((item.participant.label for item in section.all_inputs), names)
    return Part(section, names, asked, [0.0] * len(names), False)


def _layers(section: Section, stack: Stack, number: int) -> Part:
    """The tensors of a section's layers, which in the output have numbers from the given one on.

    Args:
        section: The section.
        stack: The host's layers, whose names begin the output's.
        number: The number of the first of them.
    """
    names: list[str] = []
    places: list[float] = []
    asked: dict[str, list[str]] = {item.participant.label: [] for item in section.all_inputs}
    for index, name in _anchored(section):
        # The inputs' layers are called as the anchor calls its own; pairing finds other spellings.
        own = section.anchor.participant.layers(_WHY)
        names.append(f"{stack.prefix}{number + index}.{own.tail(name)}")
        places.append(share(index, section.layers or 1))
        for item in section.all_inputs:
            asked[item.participant.label].append(own.renamed(name, item.first_layer + index))
    return Part(section, names, asked, places, True)


def _anchored(section: Section) -> Iterator[tuple[int, str]]:
    """The anchor's tensors in a section's layers, each with the layer's number in the section."""
    anchor = section.anchor
    for index in range(section.layers or 0):
        for name in anchor.participant.names[anchor.first_layer + index]:
            yield index, name
