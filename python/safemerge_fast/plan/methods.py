"""The merge methods that the engine has, with their parameters, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .. import _engine

__all__ = ["Method", "Parameter", "known_methods", "weighing_methods"]


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
        base: Whether it has a base: "none", "optional" or "required".
        least_operands: The fewest models it merges, the base not counted.
        most_operands: The most, or None.
        parameters: By name.
    """

    name: str
    base: str
    least_operands: int
    most_operands: int | None
    parameters: Mapping[str, Parameter]

    def names(self, scope: str) -> list[str]:
        """Names of the parameters of a scope."""
        return [name for name, parameter in self.parameters.items() if parameter.scope == scope]


@cache
def known_methods() -> Mapping[str, Method]:
    """The engine's methods by name."""
    return {
        method.name: Method(
            name=method.name,
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
        )
        for method in _engine.methods()
    }


def weighing_methods() -> tuple[str, ...]:
    """Names of the methods that weigh two models, with or without a base: those that SafeMERGE can use."""
    return tuple(method.name for method in _engine.methods() if method.weighs)
