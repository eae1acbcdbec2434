"""The merge methods that the engine has, with their parameters, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .. import _engine

__all__ = ["Method", "Parameter", "known_methods", "summing_method", "thinning_method", "weighing_methods"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        name: Its name.
        scope: "shared" by all that is merged, or of each "operand".
        kind: "number", "integer", "flag" or "choice".
        default: What it is if it is not given; None if it must be given.
        least: The least number, or None.
        most: The largest number, or None.
        choices: The words of a choice.
    """

    name: str
    scope: str
    kind: str
    default: float | int | bool | str | None
    least: float | None
    most: float | None
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    Attributes:
        name: Its name.
        summary: What it does, in a sentence.
        base: Whether it has a base: "none", "optional" or "required".
        least_operands: The fewest models it merges, the base not counted.
        most_operands: The most, or None.
        parameters: By name.
        weighs: Whether it weighs models, one against the other, so that SafeMERGE can use it.
        sums: Whether it is a weighted sum, so that operands which share a tensor can be combined.
        votes: Whether elements vote on signs, so that a lone update always wins.
        interpolates: The parameter that leads from the base (0) to the one model (1), if it interpolates so.
        sole: Whether with one model only it gives that model's tensor.
        copies: Whether it gives its one operand unchanged, by default.
        thins: Whether it keeps random elements of task vectors, scales them up and adds them.
    """

    name: str
    summary: str
    base: str
    least_operands: int
    most_operands: int | None
    parameters: Mapping[str, Parameter]
    weighs: bool
    sums: bool
    votes: bool
    interpolates: str | None
    sole: bool
    copies: bool
    thins: bool

    def names(self, scope: str) -> list[str]:
        """Names of the parameters of a scope."""
        return [name for name, parameter in self.parameters.items() if parameter.scope == scope]


@cache
def known_methods() -> Mapping[str, Method]:
    """The engine's methods by name."""
    return {
        method.name: Method(
            name=method.name,
            summary=method.summary,
            base=method.base,
            least_operands=method.least_operands,
            most_operands=method.most_operands,
            parameters={
                parameter.name: Parameter(
                    name=parameter.name,
                    scope=parameter.scope,
                    kind=parameter.kind,
                    default=parameter.default,
                    least=parameter.least,
                    most=parameter.most,
                    choices=tuple(parameter.choices),
                )
                for parameter in method.parameters
            },
            weighs=method.weighs,
            sums=method.sums,
            votes=method.votes,
            interpolates=method.interpolates,
            sole=method.sole,
            copies=method.copies,
            thins=method.thins,
        )
        for method in _engine.methods()
    }


def weighing_methods() -> tuple[str, ...]:
    """Names of the methods that weigh two models, with or without a base: those that SafeMERGE can use."""
    return tuple(name for name, method in known_methods().items() if method.weighs)


@cache
def summing_method() -> Method:
    """The weighted sum, which is also what adapters that add to a tensor come down to."""
    return next(method for method in known_methods().values() if method.sums)


@cache
def thinning_method() -> Method:
    """The method that keeps random elements of task vectors, scales them up and adds them (DARE)."""
    return next(method for method in known_methods().values() if method.thins)
