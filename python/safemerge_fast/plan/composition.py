"""How an output tensor is composed of the roles' terms, as the plan writes it and as a report tells it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..pairing.operand import Operand, Term

__all__ = ["Composition", "combine", "describe_operand"]

# Sums of weights such as 0.8 + (1 - 0.8) are meant to be whole.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Composition:
    """What one output tensor is made of.

    Attributes:
        method: Name of the engine's method.
        parameters: The method's parameters.
        terms: What the method is given.
    """

    method: str
    parameters: Mapping[str, Any]
    terms: tuple[Term, ...]

    @property
    def is_copy(self) -> bool:
        """Whether the tensor is one input tensor as it is."""
        return len(self.terms) == 1 and self.terms[0].weight == 1.0 and self.terms[0].operand.is_plain

    def to_plan(self) -> dict[str, Any]:
        """The fields "copy" or "merge" of a planned tensor."""
        if self.is_copy:
            return {"copy": self.terms[0].operand.to_plan()}
        operands = [{"operand": term.operand.to_plan(), "weight": term.weight} for term in self.terms]
        return {"merge": {"method": self.method, "parameters": dict(self.parameters), "operands": operands}}

    def describe(self) -> str:
        """The operation in one line, e.g. `linear: aligned + 1.6·B·A(finetuned) + 0.4·B·A(safe)`."""
        if self.is_copy:
            return f"copy: {self.terms[0].operand.source}"
        return f"{self.method}: {' + '.join(_describe(term) for term in self.terms)}"


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
            key = (operand.source, operand.tensor) if simple else (id(operand), len(groups))
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


def _describe(term: Term) -> str:
    text = describe_operand(term.operand)
    if term.weight == 1.0:
        return text
    return f"{term.weight:.12g} {text if term.operand.is_plain else f'({text})'}"


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
