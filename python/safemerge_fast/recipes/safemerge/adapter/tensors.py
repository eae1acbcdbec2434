"""The tensors of a merged adapter: factors side by side, truncated, or combined as PEFT's "linear" does it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ....analysis.blocks import Composed, read_tensor
from ....checkpoint.model import Model
from ....errors import AdapterError
from ....pairing.operand import LowRank, Term
from .expert_tensors import ExpertFactors, make_factors, stacked, truncated
from .experts import StackedWeight
from .layout import AdapterLayout, FullTensor, LowRankWeight

__all__ = ["AdapterTensors", "make_tensors", "relative_error"]

_DTYPES = {
    "auto": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_FLOATS = frozenset(_DTYPES.values()) | {torch.float64}


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """A merged adapter's tensors.

    Attributes:
        rank: The rank of all its products, of which the smaller ones are padded with zeros.
        tensors: The tensors by key.
        errors: ‖B·A - Σ w·s·B·A‖ / ‖Σ w·s·B·A‖ (Frobenius) by the weight's name, of a stacked parameter that of all
            experts together, where it is not just rounding: for truncated products and for those of PEFT's linear
            combination.
    """

    rank: int
    tensors: Mapping[str, torch.Tensor]
    errors: Mapping[str, float]


def make_tensors(
    models: Mapping[str, Model],
    layout: AdapterLayout,
    *,
    dtype: str = "auto",
    adapter_rank: int | None = None,
    compat: str | None = None,
    allow_nonfinite: bool = False,
) -> AdapterTensors:
    """Makes all tensors of a merged adapter.

    Args:
        models: The models by role.
        layout: What the adapter consists of.
        dtype: "auto" is float32, in which the products are those of the checkpoint output up to rounding; or
            "bfloat16", "float16" or "float32".
        adapter_rank: Highest rank; products of a higher one are truncated to it.
        compat: "peft-linear" combines factors as PEFT does, or None.
        allow_nonfinite: Let NaN and infinity through.

    Returns:
        The tensors.

    Raises:
        AdapterError: A factor holds values that are not finite, or the ranks do not suit PEFT's combination.
    """
    made: list[tuple[LowRankWeight, torch.Tensor, torch.Tensor]] = []
    errors: dict[str, float] = {}
    for weight in layout.weights:
        factors = [_read_factors(models, product, allow_nonfinite) for product in weight.products]
        a, b = _concatenate(weight.products, factors)
        if compat is not None and weight.merged:
            exact = a, b
            a, b = _peft_linear(weight, factors)
            errors[weight.row.name] = relative_error((a, b), exact)
        elif adapter_rank is not None and a.shape[0] > adapter_rank:
            exact = a, b
            a, b = _truncate(weight.row.name, a, b, adapter_rank)
            errors[weight.row.name] = relative_error((a, b), exact)
        made.append((weight, a, b))
    experts: list[tuple[StackedWeight, ExpertFactors]] = []
    for parameter in layout.stacked:
        factors_of_all = make_factors(
            models, parameter, lambda model, key, values: _check_finite(model, key, values, allow_nonfinite)
        )
        if adapter_rank is not None and parameter.rank > adapter_rank:
            exact_of_all = factors_of_all
            factors_of_all = _truncate_experts(parameter, exact_of_all, adapter_rank)
            errors[parameter.parameter] = _error_of_experts(factors_of_all, exact_of_all)
        experts.append((parameter, factors_of_all))
    rank = max([a.shape[0] for _, a, _ in made] + [factors[0].shape[1] for _, factors in experts])
    stored = _DTYPES[dtype]
    tensors: dict[str, torch.Tensor] = {}
    for weight, a, b in made:
        missing = rank - a.shape[0]
        tensors[weight.a] = torch.nn.functional.pad(a, (0, 0, 0, missing)).to(stored)
        tensors[weight.b] = torch.nn.functional.pad(b, (0, missing)).to(stored)
    for parameter, factors_of_all in experts:
        tensors[parameter.a], tensors[parameter.b] = (
            factor.to(stored) for factor in stacked(factors_of_all, rank)
        )
    for tensor in layout.tensors:
        tensors[tensor.key] = _full(models, tensor, None if dtype == "auto" else stored, allow_nonfinite)
    return AdapterTensors(rank, tensors, errors)


_Factors = tuple[torch.Tensor, torch.Tensor]


def _read_factors(models: Mapping[str, Model], product: LowRank, allow_nonfinite: bool) -> _Factors:
    """A (r, d_in) and B (d_out, r) as they are stored."""
    model = models[product.source]
    a, b = read_tensor(model, product.a), read_tensor(model, product.b)
    for name, values in ((product.a, a), (product.b, b)):
        _check_finite(model, name, values, allow_nonfinite)
    return a, b


def _concatenate(products: Sequence[LowRank], factors: Sequence[_Factors]) -> _Factors:
    """[A₁; A₂] and [s₁B₁ s₂B₂] in float32; the scaled B are rounded once."""
    a = torch.cat([a.float() for a, _ in factors])
    scaled = [(b.double() * product.scale).float() for product, (_, b) in zip(products, factors, strict=True)]
    return a, torch.cat(scaled, dim=1)


def _peft_linear(weight: LowRankWeight, factors: Sequence[_Factors]) -> _Factors:
    """Σ √(w·s)·A and Σ √(w·s)·B, bit for bit as PEFT's add_weighted_adapter(…, "linear") computes them.

    The product of these sums has cross terms √(w₁s₁w₂s₂)(B₁A₂ + B₂A₁) that the sum of the products has not.
    """
    ranks = [product.rank for product in weight.products]
    if len(set(ranks)) > 1:
        raise AdapterError(
            f"PEFT's linear combination adds up factors, which needs equal ranks, but those of {weight.row.name} "
            f"are {' and '.join(map(str, ranks))}; leave --compat out"
        )
    roots = [math.sqrt(abs(product.scale)) for product in weight.products]
    signed = [
        root if product.scale >= 0.0 else -root for root, product in zip(roots, weight.products, strict=True)
    ]
    # PEFT holds adapters in float32, and its weights in a tensor of that dtype too.
    a = torch.stack([a.float() for a, _ in factors]) * torch.tensor(signed)[:, None, None]
    b = torch.stack([b.float() for _, b in factors]) * torch.tensor(roots)[:, None, None]
    return a.sum(dim=0), b.sum(dim=0)


def _truncate(name: str, a: torch.Tensor, b: torch.Tensor, rank: int) -> _Factors:
    """The best approximation of B·A of a lower rank: QR of both factors, then SVD of a matrix of their rank."""
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{name} cannot be truncated: its factors hold NaN or infinity")
    left, left_triangle = torch.linalg.qr(b.double())
    right, right_triangle = torch.linalg.qr(a.double().T)
    u, values, vt = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    root = values[:rank].sqrt()
    return ((vt[:rank].T * root).T @ right.T).float(), (left @ (u[:, :rank] * root)).float()


def _truncate_experts(weight: StackedWeight, factors: ExpertFactors, rank: int) -> ExpertFactors:
    """Every expert's product, truncated where its rank is higher."""
    return truncated(factors, rank, lambda a, b: _truncate(weight.parameter, a, b, rank))


def _error_of_experts(found: ExpertFactors, exact: ExpertFactors) -> float:
    """relative_error of all experts' products as one vector."""
    pairs = [zip(*factors, strict=True) for factors in (found, exact)]
    differences, norms = zip(
        *(_difference(one, other) for one, other in zip(*pairs, strict=True)), strict=True
    )
    norm = math.hypot(*norms)
    return math.hypot(*differences) / norm if norm > 0.0 else 0.0


def relative_error(found: _Factors, exact: _Factors) -> float:
    """Computes ‖B'A' - BA‖ / ‖BA‖ (Frobenius) without either product.

    The norm of B·A is that of the product of both factors' triangles.

    Args:
        found: A' (r', d_in) and B' (d_out, r').
        exact: A (r, d_in) and B (d_out, r).
    """
    difference, norm = _difference(found, exact)
    return difference / norm if norm > 0.0 else 0.0


def _difference(found: _Factors, exact: _Factors) -> tuple[float, float]:
    """‖B'A' - BA‖ and ‖BA‖ in float64."""
    difference = _product_norm(
        torch.cat([found[0].double(), exact[0].double()]),
        torch.cat([found[1].double(), -exact[1].double()], dim=1),
    )
    return difference, _product_norm(exact[0].double(), exact[1].double())


def _product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖B·A‖ in float64."""
    left, right = torch.linalg.qr(b, mode="r")[1], torch.linalg.qr(a.T, mode="r")[1]
    return float(torch.linalg.matrix_norm(left @ right.T))


def _full(
    models: Mapping[str, Model], tensor: FullTensor, stored: torch.dtype | None, allow_nonfinite: bool
) -> torch.Tensor:
    """A tensor that is stored whole: as it is where it is one input tensor, else a float32 sum."""
    values = _sum(models, tensor.row.name, tensor.terms)
    _check_finite(models[tensor.terms[0].operand.source], tensor.row.name, values, allow_nonfinite)
    return values if stored is None or values.dtype not in _FLOATS else values.to(stored)


def _sum(models: Mapping[str, Model], name: str, terms: Sequence[Term]) -> torch.Tensor:
    if not all(term.operand.is_plain for term in terms):
        composed = Composed(models, terms[0].operand.source, name, terms)
        rows, columns = composed.shape
        return composed.chunk(slice(0, rows), slice(0, columns))
    parts = [read_tensor(models[term.operand.source], term.operand.tensor) for term in terms]
    if len(parts) == 1 and terms[0].weight == 1.0:
        return parts[0]
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for term, part in zip(terms, parts, strict=True):
        total.add_(part.float(), alpha=term.weight)
    return total


def _check_finite(model: Model, name: str, values: torch.Tensor, allow_nonfinite: bool) -> None:
    if not allow_nonfinite and values.is_floating_point() and not bool(torch.isfinite(values).all()):
        raise AdapterError(
            f"{name} of {model.path} holds NaN or infinity; repair that adapter, or pass --allow-nonfinite"
        )
