"""The adapters among the roles: what they make of the aligned model's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .._engine import TensorInfo
from ..checkpoint.adapter import Adapter
from ..checkpoint.model import Model
from ..errors import PairingError
from .adapted_stack import AdaptedStack, slices_of
from .adapter_terms import AdapterTerms, adapter_notes, adapter_terms
from .modules import EMBEDDING, HEAD, PROJECTION, is_float_matrix
from .operand import Operand, Term
from .orientation import Orientations
from .row import NOT_ADAPTED, Row
from .stack import Slices

__all__ = ["Adapted"]


class Adapted:
    """What adapters make of the aligned model's tensors.

    Attributes:
        terms: By role; a role is there if it is an adapter.
        notes: What a person should know of them.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        """Finds out what the adapters among the models do.

        Raises:
            PairingError: There is one, and no aligned model.
            AdapterError: One does not fit the aligned model.
        """
        self.terms: dict[str, AdapterTerms] = {}
        self.notes: list[str] = []
        for role, model in models.items():
            if not isinstance(model, Adapter):
                continue
            if "aligned" not in models:
                raise PairingError(
                    f"{role} is an adapter, which needs the model it was trained on; give --aligned"
                )
            self._model = models["aligned"]
            self.terms[role] = adapter_terms(model, self._model)
            self.notes += adapter_notes(model, self._model, self.terms[role].terms)

    def __contains__(self, role: object) -> bool:
        return role in self.terms

    def slices(self, name: str) -> Slices | None:
        """How the experts of a tensor of the aligned model lie that an adapter adapts, if nothing else says it."""
        updates = (terms.stacks[name] for terms in self.terms.values() if name in terms.stacks)
        update = next(updates, None)
        return None if update is None else slices_of(update)

    def stacks(self, name: str, slices: Slices | None) -> dict[str, AdaptedStack]:
        """What each adapter that adapts them makes of the experts of a tensor of the aligned model, by role.

        Args:
            name: The tensor.
            slices: How its experts lie; None if it holds none, or nobody adapts them.
        """
        if slices is None:
            return {}
        return {
            role: AdaptedStack(role, self._model.role, name, slices.stack, terms.stacks[name])
            for role, terms in self.terms.items()
            if name in terms.stacks
        }

    def made(
        self, aligned: str | None, parts: Mapping[str, tuple[Term, ...]]
    ) -> Mapping[str, tuple[Term, ...]]:
        """What a tensor is in the roles that have it as something else than a tensor of theirs.

        Args:
            aligned: The aligned model's tensor; adapters that do not adapt it leave it as it is.
            parts: What it is in roles that have it as a part of another tensor.
        """
        if not self.terms and not parts:
            return NOT_ADAPTED
        if aligned is None:
            return parts
        plain = (Term(Operand("aligned", aligned)),)
        made = {
            role: of_adapter.terms.get(aligned, plain)
            for role, of_adapter in self.terms.items()
            if aligned not in of_adapter.stacks
        }
        return {**made, **parts}

    def why_not(self, name: str) -> str | None:
        """Why a projection is not analysed that the fine-tuned adapter leaves alone: its update is zero."""
        if "finetuned" not in self.terms or name in self.terms["finetuned"]:
            return None
        safe = self.terms.get("safe")
        return "only the safe adapter changes it" if safe is not None and name in safe else "not adapted"

    def is_matrix(self, tensor: TensorInfo, kind: str) -> bool:
        """Whether the fine-tuned adapter adds to a matrix that is no table and no head: such a one is analysed."""
        if kind in (PROJECTION, HEAD, EMBEDDING) or not is_float_matrix(tensor):
            return False
        return any(term.operand.low_rank for term in self._finetuned(tensor.name))

    def is_transposed(self, tensor: TensorInfo, orientations: Orientations) -> bool:
        """Whether a tensor is stored as (in, out), as the shapes of adapters' factors say or those of the model."""
        products = [product for term in self._finetuned(tensor.name) for product in term.operand.low_rank]
        return products[0].transpose if products else orientations.is_stored_transposed(tensor)

    def unused(self, rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
        """Lists the aligned model's tensors that an adapter changes and no row is made of, by role."""
        used = {row.names.get("aligned") for row in rows}
        return {
            role: tuple(name for name in (*terms.terms, *terms.stacks) if name not in used)
            for role, terms in self.terms.items()
        }

    def _finetuned(self, name: str) -> tuple[Term, ...]:
        terms = self.terms.get("finetuned")
        return () if terms is None else terms.terms.get(name, ())
