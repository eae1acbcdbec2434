"""Models as configurations name them: a path, `org/name[@revision]`, or one of these with `+` and an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.adapter import Adapter, is_adapter, open_adapter
from ...checkpoint.model import Model, locate, open_model
from ...errors import AdapterError, PlanError, SafemergeError
from ...pairing.adapter_terms import adapter_notes, adapter_terms
from ...pairing.operand import Operand, Term
from ...pairing.rows import in_file_order
from .layers import Stack, find_stack

__all__ = ["Participant", "Participants", "Reference", "read_reference"]


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
            f"{place} should be a model: a directory, org/name[@revision], or one of these with +adapter; not {given!r}"
        )
    if "+" not in given or Path(given).expanduser().exists():
        return Reference(place, given, given, None)
    splits = [
        (given[:index], given[index + 1 :]) for index, character in enumerate(given) if character == "+"
    ]
    if len(splits) > 1:
        splits = [split for split in splits if Path(split[0]).expanduser().exists()]
    if len(splits) != 1 or not all(splits[0]):
        raise PlanError(
            f"{place}: {given} does not exist, and is not model+adapter with one +; to add several adapters, fold all "
            f"but one first (recipe: fold)"
        )
    model, adapter = splits[0]
    return Reference(place, given, model, adapter)


@dataclass(frozen=True, slots=True, eq=False)
class Participant:
    """A model that takes part in a merge, opened.

    Attributes:
        label: A short name, unlike that of any other.
        model: The checkpoint.
        adapter: The adapter that is added to it, or None.
        adapted: What the adapter makes of tensors of the checkpoint, by their names.
        stack: The checkpoint's layers, or None if they cannot be told.
        names: The names of its tensors by layer, in the order of its files; None for those outside the layers.
    """

    label: str
    model: Model
    adapter: Adapter | None
    adapted: dict[str, tuple[Term, ...]]
    stack: Stack | None
    names: dict[int | None, list[str]]

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


class Participants:
    """Opens the models of a configuration, each once."""

    def __init__(self) -> None:
        self._opened: dict[tuple[Path, bool], Model] = {}
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
                self._participants[key] = _participant(label, model, adapter)
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
        path = locate("adapter" if wanted_adapter else "model", spec)
        if not wanted_adapter and is_adapter(path):
            raise AdapterError(
                f"{path} is a PEFT adapter; write the model that it was trained on in front of it, as model+adapter"
            )
        key = (path.resolve(), wanted_adapter)
        if key not in self._opened:
            role = self._role(spec, path)
            self._opened[key] = (
                open_adapter(role, spec, path) if wanted_adapter else open_model(role, spec, path)
            )
        return self._opened[key]

    def _role(self, spec: str, path: Path) -> str:
        """A short name: the last part of the path, or the repository's."""
        if Path(spec).expanduser().exists():
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


def _participant(label: str, model: Model, adapter: Adapter | None) -> Participant:
    ordered = [tensor.name for tensor in in_file_order(model)]
    stack = find_stack(ordered, model.config)
    names: dict[int | None, list[str]] = {}
    for name in ordered:
        names.setdefault(None if stack is None else stack.layer(name), []).append(name)
    return Participant(
        label=label,
        model=model,
        adapter=adapter,
        adapted={} if adapter is None else adapter_terms(adapter, model),
        stack=stack,
        names=names,
    )
