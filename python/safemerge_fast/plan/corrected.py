"""What matrices are made of that a recipe adds a derived product to: the tensor as it is, and scale·B·A."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..decision import Decision
from ..pairing.module import Module, whole
from ..pairing.operand import LowRank, Term
from ..pairing.row import Row
from .blend import Blend
from .methods import summing_method
from .operation import Operation, weighted_sum

__all__ = ["Corrected", "factor_names", "with_product"]


def factor_names(module: str) -> tuple[str, str]:
    """The names of A and B of a module among derived tensors."""
    return f"{module}.A", f"{module}.B"


@dataclass(frozen=True, slots=True)
class Corrected:
    """One role's tensors, with a product added to those that are changed.

    Attributes:
        kept: The role.
        source: The role that has the factors, named as factor_names does; B is (d_out, rank), A (rank, d_in).
        scale: The factor of each product.
        ranks: By module name, the rank of each product.
        plain: A role whose stored matrix stands in where a product cannot be added to what the kept role has, since
            an adapter gives that other norms: W + (P + s·B·A) - P.
    """

    kept: str
    source: str
    scale: float
    ranks: Mapping[str, int]
    plain: str
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
        a, b = factor_names(module.name)
        rank = self.ranks[module.name]
        product = LowRank(self.source, a, b, self.scale, rank, transpose=module.transposed)
        terms = module.piece_terms
        return weighted_sum(with_product(terms[self.kept], product, terms[self.plain]))


def with_product(terms: Sequence[Term], product: LowRank, plain: Sequence[Term]) -> tuple[Term, ...]:
    """Adds a product to a sum of terms.

    Args:
        terms: What a matrix is the sum of.
        product: What is added.
        plain: A matrix of that shape, without an adapter's changes.
    """
    first = terms[0].operand
    if terms[0].weight == 1.0 and first.magnitude is None and first.rows is None:
        return (Term(replace(first, low_rank=(*first.low_rank, product))), *terms[1:])
    other = plain[0].operand
    return (
        *terms,
        Term(replace(other, low_rank=(*other.low_rank, product)), plain[0].weight),
        Term(other, -plain[0].weight),
    )
