"""What one output tensor is made of: a method and what it is given, as plans write it and reports tell it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..pairing.operand import OWN_NAME, Operand, Term
from .methods import summing_method

__all__ = [
    "Argument",
    "Mask",
    "Operation",
    "Parameters",
    "combine",
    "copy_of",
    "describe_operand",
    "parameters_of",
    "weighted_sum",
]

Parameters = tuple[tuple[str, Any], ...]
"""Values of a method's parameters by name, in order; hashable, since many tensors share an operation."""

# Sums of weights such as 0.8 + (1 - 0.8) are meant to be whole.
_ROUNDING = 1e-12


def parameters_of(values: Mapping[str, Any]) -> Parameters:
    """Values by name as operations hold them."""
    return tuple(values.items())


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
    parameters: Parameters = ()

    def to_plan(self) -> dict[str, Any]:
        """The operand as the plan writes it; what is not there is left out."""
        document: dict[str, Any] = {"operand": self.operand.to_plan()}
        if self.weight is not None:
            document["weight"] = self.weight
        if self.parameters:
            document["parameters"] = dict(self.parameters)
        return document


@dataclass(frozen=True, slots=True)
class Mask:
    """Shares of what is merged, one for each element: kept + share·(merged - kept).

    Attributes:
        shares: The tensor that holds them.
        kept: What stays where a share is 0.
    """

    shares: Operand
    kept: Operand

    def to_plan(self) -> dict[str, Any]:
        """The mask as the plan writes it."""
        return {"shares": self.shares.to_plan(), "kept": self.kept.to_plan()}


@dataclass(frozen=True, slots=True)
class Operation:
    """What an output tensor is made of. One operation may serve many tensors, see OWN_NAME.

    Attributes:
        arguments: What is merged, in order.
        method: Name of the engine's method; None copies the only argument.
        parameters: The parameters that all operands share.
        base: What the method takes for its base, or None.
        mask: How much of each element is taken of what the method makes; None for all of it.
    """

    arguments: tuple[Argument, ...]
    method: str | None = None
    parameters: Parameters = ()
    base: Operand | None = None
    mask: Mask | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the tensor is one input tensor as it is."""
        return self.method is None

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All that is read: what is merged, the base, and the mask with what it keeps."""
        merged = tuple(argument.operand for argument in self.arguments)
        if self.base is not None:
            merged = (*merged, self.base)
        return merged if self.mask is None else (*merged, self.mask.shares, self.mask.kept)

    def without_name(self, name: str) -> Operation:
        """The same for a tensor of this name, with OWN_NAME in its place, so that other tensors can share it."""

        def own(operand: Operand) -> Operand:
            return replace(operand, tensor=OWN_NAME) if operand.tensor == name else operand

        return replace(
            self,
            arguments=tuple(replace(argument, operand=own(argument.operand)) for argument in self.arguments),
            base=None if self.base is None else own(self.base),
            mask=None if self.mask is None else Mask(own(self.mask.shares), own(self.mask.kept)),
        )

    def to_plan(self) -> dict[str, Any]:
        """An entry of the plan's table of operations."""
        if self.method is None:
            return {"copy": self.arguments[0].operand.to_plan()}
        merge: dict[str, Any] = {"method": self.method, "parameters": dict(self.parameters)}
        if self.base is not None:
            merge["base"] = self.base.to_plan()
        merge["operands"] = [argument.to_plan() for argument in self.arguments]
        if self.mask is not None:
            merge["mask"] = self.mask.to_plan()
        return {"merge": merge}

    def describe(self) -> str:
        """The operation in one line.

        E.g. `linear: aligned + 1.6·B·A(finetuned) + 0.4·B·A(safe)` for sums, and
        `ties: base; 0.5 a (density 0.3), 0.5 b (density 0.7)` for what has a base or further parameters.
        """
        if self.method is None:
            return f"copy: {self.arguments[0].operand.source}"
        shared = ", ".join(f"{name} {_show(value)}" for name, value in self.parameters if value is not False)
        base = "" if self.base is None else f"{describe_operand(self.base)}; "
        sums = self.base is None and not any(argument.parameters for argument in self.arguments)
        merged = (" + " if sums else ", ").join(_describe(argument) for argument in self.arguments)
        masked = ""
        if self.mask is not None:
            masked = f"; by {self.mask.shares.source}, else {describe_operand(self.mask.kept)}"
        return f"{self.method}{f' ({shared})' if shared else ''}: {base}{merged}{masked}"


def copy_of(operand: Operand) -> Operation:
    """One tensor as it is stored."""
    return Operation((Argument(operand),))


def weighted_sum(terms: Sequence[Term], parameters: Parameters = (("normalize", False),)) -> Operation:
    """A sum of terms with weights; what comes down to one stored tensor is a copy of it."""
    if len(terms) == 1 and terms[0].weight == 1.0 and terms[0].operand.is_plain:
        return copy_of(terms[0].operand)
    arguments = tuple(Argument(term.operand, term.weight) for term in terms)
    return Operation(arguments, summing_method().name, parameters)


def combine(weighted: Iterable[tuple[float, Sequence[Term]]]) -> tuple[Term, ...]:
    """Adds up weighted sums of terms; operands that are the same tensor plus products become one.

    So the aligned matrix is read once where two adapters change it: with weights that sum to one,
    α (W + s_f B_f A_f) + (1-α) (W + s_s B_s A_s) = W + α s_f B_f A_f + (1-α) s_s B_s A_s.

    Args:
        weighted: (weight, the terms it applies to) of each role, in the order of accumulation.

    Returns:
        Terms of the same sum.
    """
    groups: dict[object, list[Term]] = {}
    for weight, terms in weighted:
        for term in terms:
            operand = term.operand
            scaled = Term(operand, weight * term.weight)
            # Replaced rows and norms are not linear in what is added.
            simple = operand.rows is None and operand.magnitude is None
            key = (operand.source, operand.tensor, operand.view) if simple else (id(operand), len(groups))
            groups.setdefault(key, []).append(scaled)
    return tuple(combined for group in groups.values() for combined in _sum(group))


def _sum(terms: Sequence[Term]) -> Sequence[Term]:
    """Makes one term of several whose operands are the same tensor, but for the products added to it."""
    total = sum(term.weight for term in terms)
    if len(terms) == 1 or abs(total) < _ROUNDING:
        return terms
    if abs(total - 1.0) < _ROUNDING:
        total = 1.0
    products = tuple(
        replace(product, scale=product.scale * term.weight / total)
        for term in terms
        for product in term.operand.low_rank
    )
    return [Term(replace(terms[0].operand, low_rank=products), total)]


def _describe(argument: Argument) -> str:
    text = describe_operand(argument.operand)
    if argument.weight is not None and argument.weight != 1.0:
        text = f"{argument.weight:.12g} {text if argument.operand.is_plain else f'({text})'}"
    if argument.parameters:
        text += f" ({', '.join(f'{name} {_show(value)}' for name, value in argument.parameters)})"
    return text


def describe_operand(operand: Operand) -> str:
    """An operand in a few words, e.g. `model + 2·B·A(adapter)`."""
    text = operand.source
    if operand.rows is not None:
        text += f" with {len(operand.rows.indices)} rows of {operand.rows.source}"
    for product in operand.low_rank:
        text += f" + {product.scale:.6g}·B·A({product.source})"
    if operand.magnitude is not None:
        text = f"({text}) with the norms of {operand.magnitude.source}"
    return text


def _show(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower()
