"""The operation that makes each output tensor: its method, its operands and their parameters for this tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import AdapterError, PlanError
from ...pairing.operand import Operand, Term
from ...plan.composition import combine
from ...plan.invocation import Argument, Invocation
from ...plan.shards import Shard, output_dtype
from .document import Document
from .settings import Settings
from .slices import Input
from .targets import Target

__all__ = ["Planner"]


class Planner:
    """Says what the output's tensors are made of, for one configuration."""

    def __init__(self, document: Document) -> None:
        """Starts with no tensor planned.

        Args:
            document: The configuration.
        """
        self._document = document
        self._settings = Settings(document.method)

    def plan(self, target: Target) -> Invocation:
        """Says what one tensor is made of.

        Raises:
            PlanError: A parameter is missing for it.
            AdapterError: An adapter does to it what the method cannot take.
        """
        if target.copied is not None:
            return _as_it_is(target.row.terms[target.copied])
        section = target.section
        shared = self._settings.look_up(
            "shared",
            (section.parameters, self._document.parameters),
            name=target.row.name,
            t=target.place,
            where=f"{self._document.file}: parameters",
        )
        own = [self._own(target, item) for item in section.inputs]
        terms = [target.row.terms[item.participant.label] for item in section.inputs]
        method = self._document.method.name
        if method == "passthrough":
            return _passthrough(terms[0], float(own[0]["scale"]))
        if method == "linear":
            return self._linear(target, shared, [float(values["weight"]) for values in own], terms)
        arguments = []
        for item, values, parts in zip(section.inputs, own, terms, strict=True):
            weight = values.pop("weight", None)
            operand = self._single(target, item, parts)
            arguments.append(Argument(operand, None if weight is None else float(weight), values))
        base = None
        if section.base is not None:
            base = self._single(target, section.base, target.row.terms[section.base.participant.label])
        return Invocation(method, tuple(arguments), base, shared)

    def _own(self, target: Target, item: Input) -> dict[str, Any]:
        """An input's own parameters for a tensor; filters see the name that it has in that model."""
        return self._settings.look_up(
            "operand",
            (item.parameters, target.section.parameters, self._document.parameters),
            name=target.asked[item.participant.label],
            t=target.place,
            where=self._place_of_parameters(item),
        )

    def _place_of_parameters(self, item: Input) -> str:
        base = self._document.base_model
        if base is None or item.place != base.place:
            return f"{item.place}.parameters"
        method = self._document.method.name
        return f"{base.place} is merged like the models, since {method} has no base, so list it there"

    def _linear(
        self,
        target: Target,
        shared: dict[str, Any],
        weights: Sequence[float],
        terms: Sequence[tuple[Term, ...]],
    ) -> Invocation:
        """A weighted sum, in which a checkpoint that adapters share is read once."""
        normalize = bool(shared["normalize"])
        if all(len(parts) == 1 and parts[0].operand.is_plain for parts in terms):
            operands = [parts[0].operand for parts in terms]
            if len(operands) == 1 and (weights[0] == 1.0 or (normalize and weights[0] != 0.0)):
                return Invocation(None, (Argument(operands[0]),))
            arguments = tuple(
                Argument(operand, weight) for operand, weight in zip(operands, weights, strict=True)
            )
            return Invocation("linear", arguments, parameters=shared)
        total = sum(weights) if normalize else 1.0
        if total == 0.0:
            raise PlanError(
                f"{self._document.file}: the weights for {target.row.name} sum to zero, so that they cannot be "
                f"normalized; change one, or say normalize: false"
            )
        return _sum(combine((weight / total, parts) for weight, parts in zip(weights, terms, strict=True)))

    def _single(self, target: Target, item: Input, terms: Sequence[Term]) -> Operand:
        """The one operand that a method other than a sum takes of an input."""
        if len(terms) > 1 or terms[0].weight != 1.0:
            raise AdapterError(
                f"{item.place}: the adapter adds a vector to {target.row.name} (lora_bias), which "
                f"{self._document.method.name} cannot take as one tensor; fold the adapter first (recipe: fold)"
            )
        return terms[0].operand

    def notes(self) -> list[str]:
        """What of the configuration decided nothing; to be asked when all is planned."""
        return [
            f"{entry.place.rpartition(': ')[2]}"
            + ("" if entry.filter is None else f" (filter {entry.filter!r})")
            + " decides nothing: no tensor matches it, or what is nearer comes first"
            for entry in self._settings.unused(self._document.all_parameters())
        ]


def plan_file(shard: Shard, operations: dict[str, Invocation], dtype: str) -> dict[str, Any]:
    """One entry of a plan's "shards".

    Args:
        shard: The output file.
        operations: What its tensors are made of, by name.
        dtype: Output dtype of float tensors, as output_dtype takes it.
    """
    return {
        "file": shard.file,
        "metadata": {"format": "pt"},
        "tensors": [
            {
                "name": row.name,
                "dtype": output_dtype(row, dtype),
                "shape": list(row.shape),
                **operations[row.name].to_plan(),
            }
            for row in shard.rows
        ],
    }


def _as_it_is(terms: Sequence[Term]) -> Invocation:
    if len(terms) == 1 and terms[0].weight == 1.0 and terms[0].operand.is_plain:
        return Invocation(None, (Argument(terms[0].operand),))
    return _sum(terms)


def _passthrough(terms: Sequence[Term], scale: float) -> Invocation:
    if scale == 1.0:
        return _as_it_is(terms)
    if len(terms) == 1 and terms[0].weight == 1.0:
        return Invocation("passthrough", (Argument(terms[0].operand, parameters={"scale": scale}),))
    return _sum([Term(term.operand, scale * term.weight) for term in terms])


def _sum(terms: Sequence[Term]) -> Invocation:
    """A sum with weights that are final."""
    arguments = tuple(Argument(term.operand, term.weight) for term in terms)
    return Invocation("linear", arguments, parameters={"normalize": False})
