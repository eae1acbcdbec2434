"""Which tensors the output has, and what they are called in each model's own counting of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...errors import PairingError
from ...pairing.rows import in_file_order
from .layers import follows_layers, share
from .references import Participant
from .slices import Section

__all__ = ["Arrangement", "Wanted", "arrange"]

# What the layers must be known for.
_WHY = "cut slices"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of the output.

    Attributes:
        name: Its name.
        asked: The name that it has in each input's own counting of layers, by label.
        layer: Whether it is in a layer that a slice names.
        place: That layer's place in the section from 0 to 1; 0 outside the layers, as with mergekit.
    """

    name: str
    asked: Mapping[str, str]
    layer: bool
    place: float


@dataclass(frozen=True, slots=True)
class Arrangement:
    """All tensors of the output.

    Attributes:
        parts: The tensors by the section that they are in; a section may come several times.
        layers: The layer of the anchor that each output layer is like, with that anchor; empty where the output has
            the layers of its host as they are.
    """

    parts: tuple[tuple[Section, tuple[Wanted, ...]], ...]
    layers: tuple[tuple[Participant, int], ...]


def arrange(host: Participant, sections: Sequence[Section], *, gradients: bool) -> Arrangement:
    """Lists the output's tensors.

    Args:
        host: The model that the output is shaped like.
        sections: The slices in order.
        gradients: Whether layers must be known even where there are no slices.

    Raises:
        PairingError: A model has other layers than the host, and there are no slices that say which to merge; or
            there are slices, and the host has a layer that none can name.
        PlanError: Layers must be known, and cannot be told.
    """
    if sections[0].layers is None:
        if gradients:
            host.layers("apply gradients")
        _check_layer_counts(host, sections[0])
        return Arrangement(((sections[0], tuple(_all_of(host, sections[0]))),), ())
    layers = [
        (section.anchor.participant, section.anchor.first_layer + index)
        for section in sections
        for index in range(section.layers or 0)
    ]
    stack = host.layers(_WHY)
    stacked = layers != [(host, index) for index in range(stack.count)]
    outside = host.names.get(None, [])
    past = [name for name in outside if name.startswith(stack.prefix)]
    if past and stacked:
        raise PairingError(
            f"{past[0]} of {host.label} is past its {stack.count} layers (it predicts further tokens), and has no "
            f"place among slices; remove such tensors from the checkpoint first"
        )
    parts = [(sections[0], _outside(sections[0], [name for name in outside if not follows_layers(name)]))]
    number = 0
    for section in sections:
        parts.append((section, tuple(_layers(section, stack.prefix, number))))
        number += section.layers or 0
    parts.append((sections[-1], _outside(sections[-1], [name for name in outside if follows_layers(name)])))
    return Arrangement(tuple(parts), tuple(layers) if stacked else ())


def _all_of(host: Participant, section: Section) -> Iterator[Wanted]:
    """All tensors of the host; layers have the same numbers everywhere."""
    labels = [item.participant.label for item in section.all_inputs]
    for tensor in in_file_order(host.model):
        place = 0.0 if host.stack is None else host.stack.place(tensor.name)
        yield Wanted(tensor.name, dict.fromkeys(labels, tensor.name), False, place)


def _outside(section: Section, names: Iterable[str]) -> tuple[Wanted, ...]:
    """Tensors outside the layers, whose names have no layer's number."""
    labels = [item.participant.label for item in section.all_inputs]
    return tuple(Wanted(name, dict.fromkeys(labels, name), False, 0.0) for name in names)


def _layers(section: Section, prefix: str, number: int) -> Iterator[Wanted]:
    """The tensors of a section's layers, which in the output have numbers from the given one on."""
    assert section.layers is not None
    anchor = section.anchor
    stack = anchor.participant.layers(_WHY)
    for index in range(section.layers):
        place = share(index, section.layers)
        for name in anchor.participant.names[anchor.first_layer + index]:
            asked = {
                item.participant.label: stack.renamed(name, item.first_layer + index)
                for item in section.all_inputs
            }
            yield Wanted(f"{prefix}{number + index}.{stack.tail(name)}", asked, True, place)


def _check_layer_counts(host: Participant, section: Section) -> None:
    """Refuses models with more layers than others, whose surplus would be left out."""
    for item in section.all_inputs:
        stack = item.participant.stack
        if stack is not None and host.stack is not None and stack.count != host.stack.count:
            raise PairingError(
                f"{item.participant.label} has {stack.count} layers but {host.label} has {host.stack.count}; say by "
                f"slices which layers to merge"
            )
