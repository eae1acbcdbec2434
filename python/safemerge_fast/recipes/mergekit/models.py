"""Models as configurations name them, found and opened, and which of their tensors are in which decoder layer.

A model is a path, `org/name[@revision]`, or one of these with `+` and an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..._engine import TensorInfo
from ...addresses import is_url
from ...checkpoint.adapter import Adapter, is_adapter, open_adapter
from ...checkpoint.model import Access, Model, locate, open_model
from ...checkpoint.remote import address
from ...errors import AdapterError, PlanError, SafemergeError
from ...pairing.adapter_terms import adapter_notes, adapter_terms
from ...pairing.modules import decoder_layers, layer_of
from ...pairing.operand import Operand, Term
from ...pairing.rows import in_file_order

__all__ = ["Participant", "Participants", "Reference", "Stack", "follows_layers", "read_reference", "share"]

# Towers beside the language model, whose layers are none of it.
_TOWER = re.compile(r"vision|visual|image|audio|speech|(^|\.)mtp")
# The last norm and the head, with its bias.
_FOLLOWS = re.compile(r"^(.*norm(_f)?|ln_f|lm_head|embed_out|score|classifier|output|project_out)$")
_PRECEDES = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe)\.")


@dataclass(frozen=True, slots=True)
class Reference:
    """A model as it is written.

    Attributes:
        place: Where it stands in the configuration, for error messages.
        text: The whole of it.
        model: The checkpoint.
        adapter: The adapter that is added to it, or None.
    """

    place: str
    text: str
    model: str
    adapter: str | None


def read_reference(given: object, place: str) -> Reference:
    """Reads the name of a model.

    Args:
        given: What YAML holds there.
        place: Where that is.

    Raises:
        PlanError: It is no text, or has several `+` of which any could be meant.
    """
    if not isinstance(given, str) or not given.strip():
        raise PlanError(
            f"{place} should be a model: a directory, an address, org/name[@revision], or one of these with +adapter; "
            f"not {given!r}"
        )
    if "+" not in given or Path(given).expanduser().exists():
        return Reference(place, given, given, None)
    splits = [
        (given[:index], given[index + 1 :]) for index, character in enumerate(given) if character == "+"
    ]
    if len(splits) > 1:
        splits = [split for split in splits if is_url(split[0]) or Path(split[0]).expanduser().exists()]
    if len(splits) != 1 or not all(splits[0]):
        raise PlanError(
            f"{place}: {given} does not exist, and is not model+adapter with one +; to add several adapters, fold all "
            f"but one first (recipe: fold)"
        )
    model, adapter = splits[0]
    return Reference(place, given, model, adapter)


class Participant:
    """A model that takes part in a merge, opened.

    Attributes:
        label: A short name, unlike that of any other.
        model: The checkpoint.
        adapter: The adapter that is added to it, or None.
        adapted: What the adapter makes of tensors of the checkpoint, by their names.
        replaced: Names of those that nothing is left of.
        tensors: The checkpoint's tensors by name, in the order of its files.
        stack: The checkpoint's layers, or None if they cannot be told.
        decoder_layers: How many config.json states, see pairing.modules.
    """

    def __init__(self, label: str, model: Model, adapter: Adapter | None, like: Participant | None) -> None:
        """Looks at the names of the model's tensors.

        Args:
            label: As the attribute.
            model: As the attribute.
            adapter: As the attribute.
            like: Another model, which may have the same names.

        Raises:
            AdapterError: The adapter does not fit the checkpoint.
        """
        self.label = label
        self.model = model
        self.adapter = adapter
        self.adapted = {} if adapter is None else _whole_tensors(adapter, model)
        self.replaced = {
            name
            for name, terms in self.adapted.items()
            if all(term.operand.source != model.role for term in terms)
        }
        self.decoder_layers = decoder_layers(model.config)
        self.tensors: dict[str, TensorInfo] = {tensor.name: tensor for tensor in in_file_order(model)}
        self._stated = _stated_layers(model.config)
        same = (
            like is not None and like._stated == self._stated and like.tensors.keys() == self.tensors.keys()
        )
        self.stack: Stack | None = (
            like.stack if like is not None and same else _find_stack(self.tensors, self._stated)
        )

    @property
    def role(self) -> str:
        """The checkpoint's role, which operands name."""
        return self.model.role

    @cached_property
    def names(self) -> dict[int | None, list[str]]:
        """The names of its tensors by layer, in the order of its files; None for those outside the layers."""
        names: dict[int | None, list[str]] = {}
        for name in self.tensors:
            names.setdefault(None if self.stack is None else self.stack.layer(name), []).append(name)
        return names

    def terms(self, name: str) -> tuple[Term, ...]:
        """What a tensor of the checkpoint is made of here."""
        return self.adapted.get(name) or (Term(Operand(self.model.role, name)),)

    def layers(self, why: str) -> Stack:
        """The checkpoint's layers.

        Args:
            why: What they are needed for, in words that follow "to".

        Raises:
            PlanError: They cannot be told from other numbered modules.
        """
        if self.stack is None:
            raise PlanError(
                f"the layers of {self.label} ({self.model.path}) cannot be told from its tensors' names and the "
                f"num_hidden_layers of its config.json, which is needed to {why}; leave that out of the configuration"
            )
        return self.stack

    def notes(self) -> list[str]:
        """What a person should know of the adapter."""
        return [] if self.adapter is None else adapter_notes(self.adapter, self.model, self.adapted)


def _whole_tensors(adapter: Adapter, model: Model) -> Mapping[str, tuple[Term, ...]]:
    """What an adapter makes of the tensors of a checkpoint.

    Raises:
        AdapterError: It does not fit, or adapts stacked experts one by one.
    """
    found = adapter_terms(adapter, model)
    if found.stacks:
        raise AdapterError(
            f"{adapter.path} adapts the experts of {next(iter(found.stacks))} one by one, which files in mergekit's "
            f"format cannot name; fold it into its checkpoint first (recipe: fold)"
        )
    return found.terms


class Participants:
    """Opens the models of a configuration, each once."""

    def __init__(self, access: Access) -> None:
        """Starts with none opened.

        Args:
            access: How models are found and read.
        """
        self._access = access
        self._opened: dict[tuple[str, bool], Model] = {}
        self._participants: dict[tuple[str, str | None], Participant] = {}

    def open(self, reference: Reference) -> Participant:
        """Finds and opens what a reference names; the same files give the same object.

        Raises:
            CheckpointError: There is no such model, or it cannot be merged.
            AdapterError: The adapter cannot be added to it, or the model is an adapter.
        """
        try:
            model = self._open(reference.model, wanted_adapter=False)
            adapter = (
                None if reference.adapter is None else self._open(reference.adapter, wanted_adapter=True)
            )
            assert adapter is None or isinstance(adapter, Adapter)
            key = (model.role, None if adapter is None else adapter.role)
            if key not in self._participants:
                label = model.role if adapter is None else self._free(f"{model.role}+{adapter.role}")
                like = next(iter(self._participants.values()), None)
                self._participants[key] = Participant(label, model, adapter, like)
        except SafemergeError as error:
            raise type(error)(f"{reference.place}: {error}") from error
        return self._participants[key]

    @property
    def models(self) -> dict[str, Model]:
        """All checkpoints and adapters that were opened, by role, which is how a plan's operands name them."""
        return {model.role: model for model in self._opened.values()}

    def __iter__(self) -> Iterator[Participant]:
        return iter(self._participants.values())

    def _open(self, spec: str, *, wanted_adapter: bool) -> Model:
        path = locate("adapter" if wanted_adapter else "model", spec, access=self._access)
        if not wanted_adapter and is_adapter(path):
            raise AdapterError(
                f"{path} is a PEFT adapter; write the model that it was trained on in front of it, as model+adapter"
            )
        key = (address(path.resolve()), wanted_adapter)
        if key not in self._opened:
            role = self._role(spec, path)
            opens = open_adapter if wanted_adapter else open_model
            self._opened[key] = opens(role, spec, path, access=self._access)
        return self._opened[key]

    def _role(self, spec: str, path: Path) -> str:
        """A short name: the last part of the path, or the repository's."""
        if is_url(spec):
            name = path.stem if path.is_file() else path.name
        elif Path(spec).expanduser().exists():
            name = path.stem if path.is_file() else path.resolve().name
        else:
            name = spec.partition("@")[0].rpartition("/")[2]
        return self._free(name)

    def _free(self, name: str) -> str:
        """The name, with a number if a model or adapter has it already, or a model with an adapter."""
        taken = {model.role for model in self._opened.values()}
        taken |= {participant.label for participant in self._participants.values()}
        numbered = (f"{name} ({number})" for number in range(2, len(taken) + 3))
        return name if name not in taken else next(free for free in numbered if free not in taken)


@dataclass(frozen=True, slots=True)
class Stack:
    """The decoder layers of a checkpoint.

    Attributes:
        prefix: What names of tensors in it begin with, e.g. "model.layers."; the layer's number follows.
        count: How many layers there are.
    """

    prefix: str
    count: int

    def layer(self, name: str) -> int | None:
        """The layer that a tensor is in, or None for what is no part of the stack."""
        number, dot, _ = name.removeprefix(self.prefix).partition(".")
        index = _index(number) if name.startswith(self.prefix) and dot else None
        # Past the last layer lie those that predict further tokens.
        return index if index is not None and index < self.count else None

    def tail(self, name: str) -> str:
        """What follows the layer's number in the name of a tensor of the stack."""
        return name.removeprefix(self.prefix).partition(".")[2]

    def renamed(self, name: str, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.prefix}{layer}.{self.tail(name)}"

    def place(self, name: str) -> float:
        """The layer's place from 0 to 1; what is outside the layers is at 0, as with mergekit."""
        layer = self.layer(name)
        return 0.0 if layer is None else share(layer, self.count)


def share(index: int, count: int) -> float:
    """The place of one of several layers, from 0 to 1; a single one is at 1, as with mergekit."""
    return index / (count - 1) if count > 1 else 1.0


def _find_stack(names: Iterable[str], stated: int | None) -> Stack | None:
    """Finds the decoder layers: the only numbered modules that there are as many of as config.json says.

    Args:
        names: Names of all tensors.
        stated: The number of layers; if it is not known, all numbered modules count.

    Returns:
        The layers, or None if there are none, or several that may be meant.
    """
    indices: dict[str, set[int]] = {}
    # Names of a layer begin alike, and there may be thousands.
    for layer in {
        layer for name in names if (layer := layer_of(name)) is not None and not _TOWER.search(name)
    }:
        prefix, _, number = layer.rpartition(".")
        if (index := _index(number)) is not None:
            indices.setdefault(f"{prefix}.", set()).add(index)
    stacks = []
    for prefix, found in indices.items():
        count = stated or len(found)
        # A configuration may state more than a range can hold.
        if count <= len(found) and found >= set(range(count)):
            stacks.append(Stack(prefix, count))
    return stacks[0] if len(stacks) == 1 else None


def follows_layers(name: str) -> bool:
    """Whether a tensor outside the layers comes after them: the last norm, and the head."""
    module = name.rpartition(".")[0] or name
    return _PRECEDES.search(name) is None and _FOLLOWS.match(module.rpartition(".")[2]) is not None


def _index(number: str) -> int | None:
    """A layer's number; None for what is none: names come from anywhere."""
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 10 else None


def _stated_layers(config: Mapping[str, Any]) -> int | None:
    """The number of layers that a configuration states, by whichever name."""
    if (count := decoder_layers(config)) is not None:
        return count
    for key in ("n_layer", "num_layers", "n_layers"):
        if isinstance(count := config.get(key), int) and not isinstance(count, bool) and count > 0:
            return count
    return None
