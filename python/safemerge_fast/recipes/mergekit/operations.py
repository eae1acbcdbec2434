"""The operation that makes each output tensor: its method, its operands and their parameters for this tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import AdapterError, PlanError
from ...pairing.operand import OWN_NAME, Operand, Term
from ...plan.methods import Method, Parameter
from ...plan.operation import Argument, Operation, Parameters, combine, copy_of, weighted_sum
from ...plan.values import Entry, Scalar
from ...plan.values import Parameters as Given
from .document import Document
from .models import Participant
from .slices import Input, Part, Section

__all__ = ["Operations"]

Values = tuple[Scalar, ...]
"""Values of parameters, in the order in which the method lists those of their scope."""


class _Lookup:
    """Finds the values of all parameters of a scope at one place: the nearest that gives one counts."""

    def __init__(self, method: Method, scope: str, places: Sequence[Given], where: str) -> None:
        """Lays out what is given.

        Args:
            method: The method whose parameters are looked up.
            scope: "shared" or "operand".
            places: What is given where, the nearest place first.
            where: Where a parameter that is missing should be given, for error messages.
        """
        self.names = tuple(method.names(scope))
        self._method = method
        self._where = where
        self._given: list[tuple[Parameter, tuple[Entry, ...]]] = [
            (
                method.parameters[name],
                tuple(entry for given in places if name in given for entry in given[name].entries),
            )
            for name in self.names
        ]
        self.used: set[str] = set()
        self.varies = any(
            isinstance(entry.value, tuple) or entry.filter is not None
            for _, entries in self._given
            for entry in entries
        )

    def values(self, name: str, t: float) -> Values:
        """The values for one tensor.

        Args:
            name: Its name, which filters are compared with.
            t: Its place among the layers, from 0 to 1.

        Raises:
            PlanError: A parameter must be given, and is not.
        """
        return tuple(self._value(parameter, entries, name, t) for parameter, entries in self._given)

    def _value(self, parameter: Parameter, entries: Sequence[Entry], name: str, t: float) -> Scalar:
        for entry in entries:
            if entry.filter is None or entry.filter in name:
                self.used.add(entry.place)
                return entry.at(t)
        if parameter.default is not None:
            return parameter.default
        problem = (
            f"no filter of {parameter.name} matches {name}, and {self._method.name} has no default for it; add an "
            f"entry without filter"
            if entries
            else f"{self._method.name} needs the parameter {parameter.name}; add it"
        )
        raise PlanError(f"{self._where}: {problem}")


@dataclass(frozen=True, slots=True)
class _Merge:
    """How the tensors of one section are merged.

    Attributes:
        section: The section.
        models: Its inputs and its base.
        shared: Finds the parameters that all of its inputs share.
        own: Finds those of each input.
        varies: Whether values depend on the tensor.
        made: Operations of tensors that have one name everywhere and are stored as they are, by their values.
    """

    section: Section
    models: tuple[Participant, ...]
    shared: _Lookup
    own: tuple[_Lookup, ...]
    varies: bool
    made: dict[tuple[Values, ...], Operation] = field(default_factory=dict)


class Operations:
    """Says what the output's tensors are made of; tensors that are alike share an operation."""

    def __init__(self, document: Document) -> None:
        """Starts with no tensor.

        Args:
            document: The configuration.
        """
        self.method = document.method
        self._document = document
        self._merges: dict[int, _Merge] = {}
        self._copies: dict[str, Operation] = {}

    def copied(self, name: str, model: Participant, stored: str) -> Operation:
        """What a model has for an output tensor, as it is.

        Args:
            name: The output tensor's name.
            model: The model.
            stored: What the model calls it.
        """
        if stored != name or stored in model.adapted:
            return weighted_sum(model.terms(stored))
        if model.role not in self._copies:
            self._copies[model.role] = copy_of(Operand(model.role, OWN_NAME))
        return self._copies[model.role]

    def merged(self, part: Part, place: int, stored: Mapping[str, str]) -> Operation:
        """What all inputs of a section have for an output tensor, merged.

        Args:
            part: The part that the tensor is in.
            place: Its place there.
            stored: What each input and the base call it, by label.

        Raises:
            PlanError: A parameter is missing for it.
            AdapterError: An adapter does to it what the method cannot take.
        """
        section, name, t = part.section, part.names[place], part.places[place]
        merge = self._merges.get(id(section)) or self._begin(section)
        models = merge.models
        plain = all(stored[model.label] == name and name not in model.adapted for model in models)
        if plain and not merge.varies and merge.made:
            return next(iter(merge.made.values()))
        # Filters see the name that a tensor has in each model's own counting of layers.
        values = (
            merge.shared.values(name, t),
            *(
                lookup.values(part.asked[item.participant.label][place], t)
                for lookup, item in zip(merge.own, section.inputs, strict=True)
            ),
        )
        if not plain:
            terms = {model.label: model.terms(stored[model.label]) for model in models}
            return self._compose(merge, name, values, terms)
        if values not in merge.made:
            terms = {model.label: (Term(Operand(model.role, OWN_NAME)),) for model in models}
            merge.made[values] = self._compose(merge, name, values, terms)
        return merge.made[values]

    def notes(self) -> list[str]:
        """What of the configuration decided nothing; to be asked when all tensors are made."""
        used = {
            place
            for merge in self._merges.values()
            for lookup in (merge.shared, *merge.own)
            for place in lookup.used
        }
        return [
            f"{entry.place.rpartition(': ')[2]}"
            + ("" if entry.filter is None else f" (filter {entry.filter!r})")
            + " decides nothing: no tensor matches it, or what is nearer comes first"
            for given in self._document.all_parameters()
            for value in given.values()
            for entry in value.entries
            if entry.place not in used
        ]

    def _begin(self, section: Section) -> _Merge:
        document = self._document
        outer = (section.parameters, document.parameters)
        shared = _Lookup(self.method, "shared", outer, f"{document.file}: parameters")
        own = tuple(
            _Lookup(self.method, "operand", (item.parameters, *outer), self._place_of_parameters(item))
            for item in section.inputs
        )
        models = tuple(item.participant for item in section.all_inputs)
        merge = _Merge(section, models, shared, own, any(lookup.varies for lookup in (shared, *own)))
        self._merges[id(section)] = merge
        return merge

    def _place_of_parameters(self, item: Input) -> str:
        base = self._document.base_model
        if base is None or item.place != base.place:
            return f"{item.place}.parameters"
        return (
            f"{base.place} is merged like the models, since {self.method.name} has no base, so list it there"
        )

    def _compose(
        self, merge: _Merge, name: str, values: Sequence[Values], terms: Mapping[str, tuple[Term, ...]]
    ) -> Operation:
        """Makes the operation of one tensor, whose terms are by the inputs' labels."""
        section = merge.section
        shared = tuple(zip(merge.shared.names, values[0], strict=True))
        own = [
            tuple(zip(lookup.names, given, strict=True))
            for lookup, given in zip(merge.own, values[1:], strict=True)
        ]
        inputs = [terms[item.participant.label] for item in section.inputs]
        if self.method.copies:
            return self._scaled(inputs[0], own[0])
        if self.method.sums:
            return self._summed(name, shared, [float(dict(given)["weight"]) for given in own], inputs)
        arguments = []
        for item, given, parts in zip(section.inputs, own, inputs, strict=True):
            weight = next((float(value) for key, value in given if key == "weight"), None)
            rest = tuple((key, value) for key, value in given if key != "weight")
            arguments.append(Argument(self._single(name, item, parts), weight, rest))
        base = section.base
        return Operation(
            tuple(arguments),
            self.method.name,
            shared,
            None if base is None else self._single(name, base, terms[base.participant.label]),
        )

    def _scaled(self, terms: Sequence[Term], own: Parameters) -> Operation:
        """A tensor as it is, or times the only parameter of a method that copies by default."""
        ((parameter, factor),) = own
        if factor == self.method.parameters[parameter].default:
            return weighted_sum(terms)
        if len(terms) == 1 and terms[0].weight == 1.0:
            return Operation((Argument(terms[0].operand, parameters=own),), self.method.name)
        return weighted_sum([Term(term.operand, float(factor) * term.weight) for term in terms])

    def _summed(
        self, name: str, shared: Parameters, weights: Sequence[float], inputs: Sequence[tuple[Term, ...]]
    ) -> Operation:
        """A weighted sum, in which a checkpoint that adapters share is read once."""
        normalize = bool(dict(shared)["normalize"])
        if all(len(parts) == 1 and parts[0].operand.is_plain for parts in inputs):
            operands = [parts[0].operand for parts in inputs]
            if len(operands) == 1 and (weights[0] == 1.0 or (normalize and weights[0] != 0.0)):
                return copy_of(operands[0])
            arguments = tuple(map(Argument, operands, weights))
            return Operation(arguments, self.method.name, shared)
        total = sum(weights) if normalize else 1.0
        if total == 0.0:
            raise PlanError(
                f"{self._document.file}: the weights for {name} sum to zero, so that they cannot be normalized; change "
                f"one, or say normalize: false"
            )
        weighted: Iterable[tuple[float, tuple[Term, ...]]] = (
            (weight / total, parts) for weight, parts in zip(weights, inputs, strict=True)
        )
        return weighted_sum(combine(weighted))

    def _single(self, name: str, item: Input, terms: Sequence[Term]) -> Operand:
        """The one operand that a method other than a sum takes of an input."""
        if len(terms) > 1 or terms[0].weight != 1.0:
            raise AdapterError(
                f"{item.place}: the adapter adds a vector to {name} (lora_bias), which {self.method.name} cannot take "
                f"as one tensor; fold the adapter first (recipe: fold)"
            )
        return terms[0].operand
