"""The part of a merged adapter that is LoRA of bare parameters (target_parameters), fused experts for the most part.

Each expert's product is a sum of its own, [w₁s₁B₁ w₂s₂B₂]·[A₁; A₂] with its own weights, which are zero for the safe
adapter where an expert is kept. So experts that are decided differently have one rank nevertheless, and the parameter
one pair of factors. Gate and up of an expert are decided apart: they are rows of B, or else columns of A, which are
scaled apart then. Pure: nothing here reads a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ....checkpoint.adapter import Adapter
from ....checkpoint.model import Model
from ....decision import Decision
from ....errors import AdapterError
from ....pairing.adapter_terms import adapter_uses
from ....pairing.expert_updates import Place, StackedUpdate, Stored
from ....pairing.module import Module
from ....pairing.operand import LowRank, Term
from ....pairing.row import Row
from ....plan.blend import Composer
from ....plan.pieces import decided_modules

__all__ = ["ExpertUpdates", "Share", "StackedWeight", "require_parameters"]

_PREFIX = "base_model.model."
_WRAPPED = ".base_layer"


@dataclass(frozen=True, slots=True)
class Share:
    """What one adapter's product adds to one matrix.

    Attributes:
        product: The parts of the stored factors, and what the product is scaled by.
        place: Where it goes.
    """

    product: LowRank
    place: Place


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """A parameter that the merged adapter adds products to, one for each expert.

    Attributes:
        parameter: Its name in the model, as PEFT's keys have it.
        a: The key of A.
        b: The key of B.
        experts: How many matrices it holds.
        inputs: Columns of A.
        outputs: Rows of B.
        ranks: The adapters that add something to some expert, and the rank of what each adds.
        shares: What is added.
    """

    parameter: str
    a: str
    b: str
    experts: int
    inputs: int
    outputs: int
    ranks: Mapping[str, int]
    shares: tuple[Share, ...]

    @property
    def rank(self) -> int:
        """Rank of the concatenation, for every expert."""
        return sum(self.ranks.values())


@dataclass(frozen=True, slots=True)
class _Known:
    """One adapter's update of a parameter."""

    role: str
    module: str
    update: StackedUpdate


class ExpertUpdates:
    """What the adapters do to bare parameters, and what becomes of it."""

    def __init__(self, adapters: Mapping[str, Adapter], aligned: Model) -> None:
        """Finds the updates.

        Args:
            adapters: The adapters by role, the one whose names win first.
            aligned: The model that they adapt.

        Raises:
            AdapterError: An adapter holds such updates in a form that PEFT does not write now.
        """
        self._orders: dict[str, list[list[Stored]]] = {}
        self._known: dict[Stored, list[_Known]] = {}
        self._by_factor: dict[tuple[str, str], _Known] = {}
        self._shares: dict[Stored, list[Share]] = {}
        for role, adapter in adapters.items():
            if not adapter.parameters:
                continue
            for use in adapter_uses(adapter, aligned).parameters:
                for update in use.updates:
                    if update.is_swapped:
                        raise AdapterError(
                            f"{role}: {adapter.path} was made by PEFT before 0.19, which takes inputs of "
                            f"{update.parameter} for outputs, so that no adapter of today's PEFT holds it; "
                            f"pass --output-format checkpoint"
                        )
                    known = _Known(role, use.group.module, update)
                    self._known.setdefault(update.stored, []).append(known)
                    self._by_factor[role, update.factors.a] = known
                order = [update.stored for update in use.updates]
                self._orders.setdefault(use.group.module, []).append(order)
        self._tensors = {tensor for stored in self._known for tensor in stored.tensors}

    @property
    def parameters(self) -> list[str]:
        """The names of all parameters that some adapter adapts."""
        return [known.update.parameter for updates in self._known.values() for known in updates]

    def __contains__(self, row: Row) -> bool:
        """Whether some adapter changes a row as a bare parameter, or as a part of one."""
        return row.names.get("aligned") in self._tensors

    def add(self, row: Row, decisions: Mapping[str, Decision], composer: Composer) -> None:
        """Takes what is to be added to the matrices of a row.

        Raises:
            AdapterError: It is no sum of such updates.
        """
        for module, decision in decided_modules(row, decisions):
            for product in self._products(row, module, composer.terms(module, merge=decision.merge)):
                known = self._by_factor[product.source, product.a]
                place = known.update.place(product.a_view, product.b_view)
                self._shares.setdefault(known.update.stored, []).append(Share(product, place))

    def _products(self, row: Row, module: Module, terms: Sequence[Term]) -> Iterator[LowRank]:
        """The products that are left of a module's sum, if it is the aligned matrix and products of parameters."""
        term = terms[0]
        operand = term.operand
        plain = len(terms) == 1 and term.weight == 1.0
        if not plain or (operand.source, operand.tensor) != ("aligned", row.names["aligned"]):
            raise AdapterError(
                f"{module.name} is replaced in one adapter and adapted as a parameter in another, which PEFT cannot "
                f"store in one module; pass --output-format checkpoint"
            )
        for product in operand.low_rank:
            if (product.source, product.a) not in self._by_factor:
                raise AdapterError(
                    f"{product.source} adapts {module.name} as a module of its own, and another adapter as a parameter "
                    f"(target_parameters), which make no one adapter; pass --output-format checkpoint"
                )
            if product.scale != 0.0:
                yield product

    def weights(self) -> tuple[StackedWeight, ...]:
        """The parameters that something is added to, module by module, from the innermost wrapper to the outermost.

        Raises:
            AdapterError: Nothing says how PEFT's wrappers of a module's parameters lie in each other.
        """
        return tuple(
            self._weight(module, stored, depth)
            for module, orders in self._orders.items()
            for depth, stored in _depths(self._order(module, orders))
        )

    def _order(self, module: str, orders: Sequence[Sequence[Stored]]) -> list[Stored]:
        """A module's parameters that something is added to, as one of the adapters has them."""
        wanted = {stored for order in orders for stored in order if stored in self._shares}
        for order in orders:
            if wanted <= set(order):
                return [stored for stored in order if stored in wanted]
        raise AdapterError(
            f"the adapters adapt different parameters of {module} (target_parameters), and their keys do not say in "
            f"which order PEFT wraps all of them; pass --output-format checkpoint"
        )

    def _weight(self, module: str, stored: Stored, depth: int) -> StackedWeight:
        shares, updates = self._shares[stored], self._known[stored]
        first = updates[0].update
        for known in updates[1:]:
            if (known.update.outputs, known.update.transposed) != (first.outputs, first.transposed):
                raise AdapterError(
                    f"{updates[0].role} and {known.role} adapt {first.parameter} with inputs and outputs exchanged, "
                    f"which make no one adapter; pass --output-format checkpoint"
                )
        key = f"{_PREFIX}{module}{_WRAPPED * depth}"
        used = {share.product.source for share in shares}
        return StackedWeight(
            parameter=first.parameter,
            a=f"{key}.lora_A.weight",
            b=f"{key}.lora_B.weight",
            experts=first.experts,
            inputs=first.inputs,
            outputs=first.outputs,
            ranks={known.role: known.update.rank for known in updates if known.role in used},
            shares=tuple(shares),
        )


def _depths(innermost_first: Sequence[Stored]) -> Iterable[tuple[int, Stored]]:
    """The parameters with the number of wrappers around each."""
    return zip(reversed(range(len(innermost_first))), innermost_first, strict=True)


def require_parameters(adapters: Mapping[str, Adapter], aligned: Model, *, compat: str | None) -> None:
    """Refuses what no adapter of bare parameters can be, before any long work.

    Args:
        adapters: The adapters by role.
        aligned: The model that they adapt.
        compat: How factors are to be combined, if not exactly.

    Raises:
        AdapterError: PEFT before 0.19 made one of them, PEFT reads none beside Conv1D, or factors are to be added up.
    """
    updates = ExpertUpdates(adapters, aligned)
    if not updates.parameters:
        return
    if compat is not None:
        raise AdapterError(
            f"PEFT's linear combination of {updates.parameters[0]}, which is adapted expert by expert "
            f"(target_parameters), is not built; leave --compat out: the sum is exact then"
        )
    if (turned := next((a for a in adapters.values() if a.settings.fan_in_fan_out), None)) is not None:
        raise AdapterError(
            f"{turned.role}: {turned.path} sets fan_in_fan_out, with which PEFT adapts no parameters such as "
            f"{updates.parameters[0]}; pass --output-format checkpoint"
        )
