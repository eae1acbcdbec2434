"""The three matrices of a module, opened in the engine. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import _engine
from .score import Undefined

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.module import Module
    from ..pairing.operand import Term

__all__ = ["OpenedModule", "open_terms", "rounded_dtype", "tensor_name"]


@dataclass(frozen=True, slots=True)
class OpenedModule:
    """What V and Δ of a module are read from.

    Attributes:
        module: The module.
        roles: The engine's matrices of base, aligned and finetuned, by role; each belongs to one thread.
        dtypes: What the numbers of each were rounded to.
        delta_reference: What Δ is taken against, "aligned" or "base".
    """

    module: Module
    roles: Mapping[str, _engine.Matrix]
    dtypes: Mapping[str, str]
    delta_reference: str

    @classmethod
    def of(cls, models: Mapping[str, Model], module: Module, delta_reference: str) -> OpenedModule:
        """Opens a module of the pairing; reads nothing of it."""
        terms = module.terms
        roles, dtypes = {}, {}
        for role in ("base", "aligned", "finetuned"):
            roles[role] = open_terms(models, module.name, terms[role])
            dtypes[role] = rounded_dtype(models, terms[role], roles[role])
        return cls(module, roles, dtypes, delta_reference)

    @property
    def reference(self) -> _engine.Matrix:
        """The matrix that Δ is taken against."""
        return self.roles[self.delta_reference]

    def undefined(self, v_squares: float, delta_squares: float, weight_squares: float) -> Undefined | None:
        """Why there is no ρ, by sums over all elements; None if they say nothing against one."""
        aligned, name = self.roles["aligned"], self.module.name
        if not all(square < float("inf") for square in (v_squares, delta_squares, weight_squares)):
            for role, matrix in self.roles.items():
                if not matrix.is_finite():
                    tensor = tensor_name(self.module.terms[role], name)
                    return Undefined(f"non-finite values in {role} tensor {tensor}", nonfinite=True)
            return Undefined(f"non-finite values in float32 arithmetic on tensor {name}", nonfinite=True)
        # Squares of the smallest numbers vanish, but not the numbers.
        if v_squares == 0.0 and aligned.equals(self.roles["base"]):
            return Undefined("V is zero")
        if delta_squares == 0.0 and self.roles["finetuned"].equals(self.reference):
            return Undefined("Δ is zero")
        return None

    def release(self) -> None:
        """Gives mapped pages back."""
        for matrix in self.roles.values():
            matrix.release()


def open_terms(models: Mapping[str, Model], name: str, terms: Sequence[Term]) -> _engine.Matrix:
    """The engine's matrix of a sum of terms.

    Args:
        models: The models by role; sources of the operands.
        name: The module's name, for messages.
        terms: What it is the sum of; all of one shape.
    """
    operand = terms[0].operand
    if _is_whole(terms):
        headers = models[operand.source].headers
        if headers.tensor(operand.tensor).encoding is None:
            return _engine.Matrix.stored(headers, operand.tensor)
    sources = {source: model.headers for source, model in models.items()}
    planned = [{"operand": term.operand.to_plan(), "weight": term.weight} for term in terms]
    return _engine.Matrix(name, sources=sources, terms=planned)


def _is_whole(terms: Sequence[Term]) -> bool:
    """Whether a sum is one tensor as its model has it."""
    operand = terms[0].operand
    return len(terms) == 1 and terms[0].weight == 1.0 and operand.is_plain and operand.view is None


def tensor_name(terms: Sequence[Term], module: str) -> str:
    """What a sum of terms is called in messages: its tensor if it is one, else the module."""
    return terms[0].operand.tensor if _is_whole(terms) else module


def rounded_dtype(models: Mapping[str, Model], terms: Sequence[Term], matrix: _engine.Matrix) -> str:
    """What the numbers of a matrix were rounded to, though they are read as float32."""
    operand = terms[0].operand
    if len(terms) > 1 or terms[0].weight != 1.0 or not operand.is_plain:
        return matrix.dtype
    stored = models[operand.source].headers.tensor(operand.tensor)
    return stored.dtype if stored.encoding is None else stored.encoding.split()[0]
