"""What matrices are made of whose update is projected: the aligned tensor, and the projected update on top of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..decision import Decision
from ..pairing.module import Module, whole
from ..pairing.operand import LowRank, Operand, Term
from ..pairing.row import Row
from ..pairing.view import View
from .blend import Blend
from .corrected import with_product
from .methods import summing_method
from .operation import Operation, weighted_sum

__all__ = ["Projected", "product_names", "update_name", "update_operand"]


def product_names(module: str, number: int) -> tuple[str, str]:
    """The names of A and C·B of a module's products among derived tensors."""
    return f"{module}.{number}.A", f"{module}.{number}.B"


def update_name(module: str) -> str:
    """The name of C·Δ of a module whose update is no sum of products."""
    return f"{module}.update"


def update_operand(source: str, module: Module, *, turned: bool) -> Operand:
    """C·Δ as a piece of the output tensor is made of it.

    Args:
        source: The role that has it.
        module: The module.
        turned: Whether its transpose is what is there.
    """
    rows, columns = module.stored
    straight = turned == module.transposed
    view = View(0, (rows, columns), (columns, 1) if straight else (1, rows))
    return Operand(source, update_name(module.name), view=view)


@dataclass(frozen=True, slots=True)
class Projected:
    """The fine-tuned model's tensors, with the update of some projected.

    Attributes:
        aligned: The role that updates are of.
        products: By module, the projected products that its update is the sum of.
        updates: By module, its projected update, if it is none of those.
        kept: The role that all else comes from.
    """

    aligned: str
    products: Mapping[str, Sequence[LowRank]]
    updates: Mapping[str, Operand]
    kept: str = "finetuned"
    _copies: list[Blend] = field(default_factory=list, compare=False, repr=False)

    def compose(self, subject: Row | Module, decision: Decision) -> Operation:
        """Says what one tensor is made of, or one module as a piece of its tensor.

        Raises:
            PairingError: The kept role does not have it.
        """
        if not decision.merge:
            if not self._copies:
                self._copies.append(
                    Blend(summing_method().name, {"normalize": False}, {self.kept: 1.0}, kept=self.kept)
                )
            return self._copies[0].compose(subject, decision)
        module = subject if isinstance(subject, Module) else whole(subject)
        plain = module.piece_terms[self.aligned]
        if module.name in self.updates:
            return weighted_sum((*plain, Term(self.updates[module.name])))
        terms: Sequence[Term] = plain
        for product in self.products[module.name]:
            terms = with_product(terms, product, plain)
        return weighted_sum(terms)
