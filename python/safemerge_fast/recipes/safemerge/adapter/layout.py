"""What a merged adapter consists of: which modules get which products, and which tensors are stored whole.

Low-rank updates of one weight add up by concatenation, Σ w·s·B·A = [w₁s₁B₁ w₂s₂B₂]·[A₁; A₂], exactly. All other
changes (modules_to_save, biases) become full tensors. Pure: nothing here reads a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ....checkpoint.adapter import Adapter
from ....checkpoint.model import Model
from ....decision import Decision
from ....errors import AdapterError
from ....pairing.operand import LowRank, Operand, Term
from ....pairing.row import Row
from ....plan.blend import Composer
from .experts import ExpertUpdates, StackedWeight

__all__ = ["AdapterLayout", "FullTensor", "LowRankWeight", "lay_out_adapter", "require_linear"]

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LowRankWeight:
    """A weight that the merged adapter adds a product to.

    Attributes:
        row: The weight's row.
        module: Its module's name, as PEFT's keys have it.
        a: The key of A.
        b: The key of B.
        products: What the update is the sum of, scaled.
        merged: Whether it is merged, not kept from the fine-tuned adapter.
        is_parameter: Whether PEFT adapts it as a bare parameter (target_parameters), not as its module's.
    """

    row: Row
    module: str
    a: str
    b: str
    products: tuple[LowRank, ...]
    merged: bool
    is_parameter: bool = False

    @property
    def rank(self) -> int:
        """Rank of the concatenation."""
        return sum(product.rank for product in self.products)


@dataclass(frozen=True, slots=True)
class FullTensor:
    """A tensor that the merged adapter stores whole.

    Attributes:
        row: The tensor's row.
        module: Its module's name, as PEFT's keys have it.
        key: Its key.
        terms: What it is the sum of.
    """

    row: Row
    module: str
    key: str
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """A merged adapter.

    Attributes:
        composer: What merged tensors are made of, and where the others come from.
        weights: The weights with a product, in the order of the rows.
        stacked: The parameters with a product for each expert.
        tensors: The tensors that are stored whole, likewise.
        saved_modules: Modules of which all tensors are stored (modules_to_save), sorted.
        has_biases: Whether biases of other modules are stored (bias="all").
        parameters: All bare parameters that some of the adapters adapts.
    """

    composer: Composer
    weights: tuple[LowRankWeight, ...]
    stacked: tuple[StackedWeight, ...]
    tensors: tuple[FullTensor, ...]
    saved_modules: tuple[str, ...]
    has_biases: bool
    parameters: frozenset[str]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that the adapter changes, but for those of stacked parameters."""
        return (*(weight.row for weight in self.weights), *(tensor.row for tensor in self.tensors))


def require_linear(rows: Iterable[Row]) -> None:
    """Refuses adapters whose updates do not add up as factors do.

    Args:
        rows: All rows of the pairing.

    Raises:
        AdapterError: One of them replaces rows or sets norms.
    """
    for row in rows:
        for role, terms in row.terms.items():
            for term in terms:
                what = None
                if term.operand.magnitude is not None:
                    what = "norms (DoRA)"
                elif term.operand.rows is not None:
                    what = "single rows (trainable tokens)"
                if what is not None:
                    raise AdapterError(
                        f"{role} sets {what} of {row.name}, which no concatenation of factors can express exactly; "
                        f"pass --output-format checkpoint"
                    )


def lay_out_adapter(
    rows: Sequence[Row],
    decisions: Mapping[str, Decision],
    composer: Composer,
    adapters: Mapping[str, Adapter],
    aligned: Model,
) -> AdapterLayout:
    """Distributes the merged updates over products and full tensors.

    Args:
        rows: All rows of the pairing, which are the aligned model's tensors.
        decisions: The decision for every module, and for every row that has none.
        composer: What merged tensors are made of, and where the others come from.
        adapters: The adapters by role, the one whose names win first.
        aligned: The model that they adapt.

    Returns:
        The layout.

    Raises:
        AdapterError: Nothing is left of the adapters, or something cannot be expressed.
    """
    require_linear(rows)
    module_of_key = {
        key: module.name
        for adapter in adapters.values()
        for module in adapter.modules.values()
        for key in (module.a, module.b_bias, *module.replaced.values())
        if key is not None
    }
    weights: list[LowRankWeight] = []
    whole: list[tuple[Row, tuple[Term, ...]]] = []
    modules: dict[str, str] = {}
    experts = ExpertUpdates(adapters, aligned)
    parameters = _bare_weights(adapters)
    for row in rows:
        if row in experts:
            experts.add(row, decisions, composer)
            continue
        if row.slices is not None:
            # No adapter changes its experts.
            continue
        if (module := _module(row, adapters, module_of_key)) is not None:
            modules.setdefault(_parent(row), module)
        terms = composer.terms(row, merge=decisions[row.name].merge)
        operand = terms[0].operand
        if len(terms) > 1 or terms[0].weight != 1.0 or operand.source != "aligned":
            whole.append((row, terms))
        elif operand.tensor != row.names["aligned"]:
            # A tied head that is stored beside its embedding, which is what PEFT adapts.
            continue
        elif products := tuple(product for product in operand.low_rank if product.scale != 0.0):
            assert module is not None
            first = products[0]
            merged, is_parameter = decisions[row.name].merge, module in parameters
            weights.append(LowRankWeight(row, module, first.a, first.b, products, merged, is_parameter))
    names = {*experts.parameters, *(f"{module}.weight" for module in parameters)}
    layout = _with_whole_modules(rows, composer, weights, experts, whole, modules, names)
    if not layout.weights and not layout.stacked:
        raise AdapterError(
            "no low-rank update is left to put into an adapter; pass --output-format checkpoint"
        )
    return layout


def _with_whole_modules(
    rows: Sequence[Row],
    composer: Composer,
    weights: Sequence[LowRankWeight],
    experts: ExpertUpdates,
    whole: Sequence[tuple[Row, tuple[Term, ...]]],
    modules: Mapping[str, str],
    parameters: Iterable[str],
) -> AdapterLayout:
    """Gives full tensors their keys, and adds the unchanged tensors of modules that PEFT stores whole."""
    saved = {_parent(row) for row, _ in whole if not row.name.endswith(".bias")}
    low_rank = {_parent(weight.row) for weight in weights}
    stacked = {_parent(row) for row in rows if row in experts}
    for parent in sorted(saved & (low_rank | stacked)):
        raise AdapterError(
            f"{parent} is both adapted and replaced, which PEFT cannot store in one module; "
            f"pass --output-format checkpoint"
        )
    changed = {row.name: terms for row, terms in whole}
    tensors = []
    for row in rows:
        parent = _parent(row)
        if row.name in changed:
            terms = changed[row.name]
        elif parent in saved:
            terms = (Term(Operand("aligned", row.names["aligned"])),)
        else:
            continue
        module = modules[parent]
        # PEFT finds the bias of a module that it adapts behind the wrapper.
        wrapper = ".base_layer" if parent in low_rank else ""
        parameter = row.name.rpartition(".")[2]
        tensors.append(FullTensor(row, module, f"{_PREFIX}{module}{wrapper}.{parameter}", terms))
    return AdapterLayout(
        composer=composer,
        weights=tuple(weights),
        stacked=experts.weights(),
        tensors=tuple(tensors),
        saved_modules=tuple(sorted(modules[parent] for parent in saved)),
        has_biases=any(_parent(tensor.row) not in saved for tensor in tensors),
        parameters=frozenset(parameters),
    )


def _module(row: Row, adapters: Mapping[str, Adapter], module_of_key: Mapping[str, str]) -> str | None:
    """The module that a row belongs to, by the names of the first adapter that changes it."""
    for role in adapters:
        for term in row.terms[role]:
            operand = term.operand
            keys = [product.a for product in operand.low_rank]
            keys += [operand.tensor] if operand.source == role else []
            for key in keys:
                if key in module_of_key:
                    return module_of_key[key]
    return None


def _bare_weights(adapters: Mapping[str, Adapter]) -> set[str]:
    """Modules whose weight some adapter adapts as a bare parameter, as PEFT must where a module is no Linear."""
    return {
        module.name
        for adapter in adapters.values()
        for module in adapter.modules.values()
        if module.a is not None and adapter.settings.targets_parameter(f"{module.name}.weight")
    }


def _parent(row: Row) -> str:
    return row.name.rpartition(".")[0]
