"""A method of the engine and what it is given to make one output tensor, as the plan writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..pairing.operand import Operand
from .composition import describe_operand

__all__ = ["Argument", "Invocation"]


@dataclass(frozen=True, slots=True)
class Argument:
    """One of the operands that are merged.

    Attributes:
        operand: The tensor.
        weight: Its weight, for methods that have a parameter of that name.
        parameters: Its other parameters.
    """

    operand: Operand
    weight: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def to_plan(self) -> dict[str, Any]:
        """The operand as the plan writes it; what is not there is left out."""
        document: dict[str, Any] = {"operand": self.operand.to_plan()}
        if self.weight is not None:
            document["weight"] = self.weight
        if self.parameters:
            document["parameters"] = dict(self.parameters)
        return document


@dataclass(frozen=True, slots=True)
class Invocation:
    """What one output tensor is made of.

    Attributes:
        method: Name of the engine's method; None copies the only argument.
        parameters: The parameters that all operands share.
        base: What the method takes for its base, or None.
        arguments: What is merged, in order.
    """

    method: str | None
    arguments: tuple[Argument, ...]
    base: Operand | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def to_plan(self) -> dict[str, Any]:
        """The fields "copy" or "merge" of a planned tensor."""
        if self.method is None:
            return {"copy": self.arguments[0].operand.to_plan()}
        merge: dict[str, Any] = {"method": self.method, "parameters": dict(self.parameters)}
        if self.base is not None:
            merge["base"] = self.base.to_plan()
        merge["operands"] = [argument.to_plan() for argument in self.arguments]
        return {"merge": merge}

    def describe(self) -> str:
        """The operation in one line, e.g. `ties: base; 0.5 a (density 0.3), 0.5 b (density 0.7)`."""
        if self.method is None:
            return f"copy: {self.arguments[0].operand.source}"
        shared = ", ".join(f"{name} {_show(value)}" for name, value in self.parameters.items())
        base = "" if self.base is None else f"{describe_operand(self.base)}; "
        merged = ", ".join(_describe(argument) for argument in self.arguments)
        return f"{self.method}{f' ({shared})' if shared else ''}: {base}{merged}"


def _describe(argument: Argument) -> str:
    text = describe_operand(argument.operand)
    if argument.weight is not None:
        text = f"{argument.weight:.6g} {text if argument.operand.is_plain else f'({text})'}"
    if argument.parameters:
        text += f" ({', '.join(f'{name} {_show(value)}' for name, value in argument.parameters.items())})"
    return text


def _show(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower()
