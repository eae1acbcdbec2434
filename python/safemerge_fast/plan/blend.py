"""What merged tensors are made of where one rule serves all of them: a method, and each role's weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..decision import Decision
from ..errors import AdapterError, PairingError
from ..pairing.module import Module, whole
from ..pairing.operand import Operand, Term
from ..pairing.row import Row
from .operation import Argument, Operation, combine, parameters_of, weighted_sum

__all__ = ["Blend", "Blends", "Composer"]


class Composer(Protocol):
    """Says what tensors and modules are made of."""

    @property
    def kept(self) -> str:
        """The role that tensors which are not merged come from, if it has them."""

    def compose(self, subject: Row | Module, decision: Decision) -> Operation:
        """What one tensor is made of, or one module as a piece of its tensor."""

    def terms(self, subject: Row | Module, *, merge: bool) -> tuple[Term, ...]:
        """What a tensor is the sum of, for a blend that is a sum."""


@dataclass(frozen=True, slots=True)
class Blend:
    """What every merged tensor is made of.

    Attributes:
        method: Name of the engine's method.
        parameters: The method's parameters.
        weights: Weight by role, in the order in which the roles are accumulated; None where the method takes none.
        kept: The role that tensors which are not merged come from, if it has them.
        base: The role that is the method's base. None: the method is a weighted sum, in which operands that share a
            tensor are combined.
        each: Parameters that each of the roles in weights gets, by role.
    """

    method: str
    parameters: Mapping[str, Any]
    weights: Mapping[str, float | None]
    kept: str = "finetuned"
    base: str | None = None
    each: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    _shared: dict[bool, Operation] = field(default_factory=dict, compare=False, repr=False)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that merged tensors need."""
        return tuple(self.weights) if self.base is None else (*self.weights, self.base)

    def compose(self, subject: Row | Module, decision: Decision) -> Operation:
        """Says what one tensor is made of, or one module as a piece of its tensor.

        Args:
            subject: The row, or the module.
            decision: Whether it is merged.

        Returns:
            The operation; tensors that are alike share one.

        Raises:
            PairingError: It is to be merged, and one of the blend's models does not have it.
            AdapterError: It is to be merged by a method that is no sum, and an adapter makes it one.
        """
        # Another role's are few, and are not what the others share.
        roles = self.roles if decision.merge else (self.kept,)
        if not all(subject.is_plain(role) for role in roles):
            roles = self.roles if decision.merge else (self._kept(subject),)
            _require_terms(subject, roles)
            return self._composed(_module(subject), decision.merge)
        # Nearly all tensors, so that what is the same for them is made once.
        if decision.merge not in self._shared:
            module = _module(subject)
            self._shared[decision.merge] = self._composed(module, decision.merge).without_name(
                module.row.name
            )
        return self._shared[decision.merge]

    def terms(self, subject: Row | Module, *, merge: bool) -> tuple[Term, ...]:
        """What a tensor is the sum of, for a blend that is a sum; one that is not merged is the kept role's.

        Raises:
            PairingError: It is to be merged, and one of the blend's models does not have it.
        """
        weights = self.weights if merge else {self._kept(subject): 1.0}
        _require_terms(subject, weights)
        terms = _module(subject).piece_terms
        return combine((1.0 if weight is None else weight, terms[role]) for role, weight in weights.items())

    def _kept(self, subject: Row | Module) -> str:
        """The role that a tensor comes from which is not merged: another one has it if the kept one lacks it."""
        row = subject if isinstance(subject, Row) else subject.row
        return self.kept if subject.has(self.kept) else next(iter(row.names), self.kept)

    def _composed(self, module: Module, merge: bool) -> Operation:
        if self.base is None or not merge:
            terms = self.terms(module, merge=merge)
            # A tensor that is not merged is a sum, too, where an adapter adds to it.
            return weighted_sum(terms) if self.base else weighted_sum(terms, parameters_of(self.parameters))
        arguments = tuple(
            Argument(self._single(module, role), weight, parameters_of(self.each.get(role, {})))
            for role, weight in self.weights.items()
        )
        return Operation(
            arguments, self.method, parameters_of(self.parameters), self._single(module, self.base)
        )

    def _single(self, module: Module, role: str) -> Operand:
        """The one operand that a method other than a sum takes of a role."""
        terms = module.piece_terms[role]
        if len(terms) > 1 or terms[0].weight != 1.0:
            raise AdapterError(
                f"the {role} adapter adds a vector to {module.name} (lora_bias), which {self.method} cannot take as "
                f"one tensor; leave the method at its default, or fold the adapter first (recipe: fold)"
            )
        return terms[0].operand


class Blends:
    """Blends that differ in a number, such as a weight, which depends on the module."""

    def __init__(
        self, number: Callable[[Row | Module], float], make: Callable[[float], Blend], *, kept: str
    ) -> None:
        """Holds how they are made; each is made once.

        Args:
            number: The number of a module, or of a tensor that is none.
            make: The blend that a number makes.
            kept: The role that all of them keep tensors of.
        """
        self.kept = kept
        self._number = number
        self._make = make
        self._made: dict[float, Blend] = {}

    def compose(self, subject: Row | Module, decision: Decision) -> Operation:
        """As Blend.compose, by the blend of that module."""
        return self._of(self._number(subject)).compose(subject, decision)

    def terms(self, subject: Row | Module, *, merge: bool) -> tuple[Term, ...]:
        """As Blend.terms, by the blend of that module."""
        return self._of(self._number(subject)).terms(subject, merge=merge)

    def _of(self, number: float) -> Blend:
        if number not in self._made:
            self._made[number] = self._make(number)
        return self._made[number]


def _module(subject: Row | Module) -> Module:
    return subject if isinstance(subject, Module) else whole(subject)


def _require_terms(subject: Row | Module, roles: Iterable[str]) -> None:
    if missing := [role for role in roles if not subject.has(role)]:
        raise PairingError(
            f"{subject.name} is to be merged, but the {missing[0]} model has no tensor of that name and shape; "
            f"leave it out with --exclude"
        )
