"""The factors of stacked parameters: those of every expert side by side, in the layout that PEFT reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from ....analysis.blocks import read_tensor
from ....checkpoint.model import Model
from ....pairing.view import View
from .experts import StackedWeight

__all__ = ["ExpertFactors", "make_factors", "stacked", "truncated", "unstacked"]

ExpertFactors = tuple[torch.Tensor, torch.Tensor]
"""A (experts, rank, in) and B (experts, out, rank)."""


def make_factors(
    models: Mapping[str, Model],
    weight: StackedWeight,
    check: Callable[[Model, str, torch.Tensor], None],
) -> ExpertFactors:
    """Puts all experts' products side by side, exactly: what scales them is rounded once.

    Args:
        models: The models by role.
        weight: What is made of what.
        check: Called with every stored factor, to refuse some.
    """
    a = torch.zeros(weight.experts, weight.rank, weight.inputs)
    b = torch.zeros(weight.experts, weight.outputs, weight.rank)
    columns, first = {}, 0
    for role, rank in weight.ranks.items():
        columns[role] = slice(first, first + rank)
        first += rank
    stored: dict[tuple[str, str], torch.Tensor] = {}

    def part(source: str, name: str, view: View | None) -> torch.Tensor:
        if (source, name) not in stored:
            values = read_tensor(models[source], name)
            check(models[source], name, values)
            stored[source, name] = values
        values = stored[source, name]
        return values if view is None else values.as_strided(view.shape, view.strides, view.start)

    for share in weight.shares:
        product, place = share.product, share.place
        own_a = part(product.source, product.a, product.a_view)
        own_b = part(product.source, product.b, product.b_view)
        places = columns[product.source]
        # Parts of an expert that are decided apart are rows of B, or else columns of A: those are what is scaled.
        if len(own_b) == weight.outputs and own_a.shape[1] != weight.inputs:
            a[place.expert, places, place.inputs] = (own_a.double() * product.scale).float()
            b[place.expert, :, places] = own_b.float()
        else:
            a[place.expert, places] = own_a.float()
            b[place.expert, place.outputs, places] = (own_b.double() * product.scale).float()
    return a, b


def truncated(
    factors: ExpertFactors,
    rank: int,
    truncate: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> ExpertFactors:
    """Every expert's product at a lower rank; one that has it already stays as it is.

    Args:
        factors: The factors.
        rank: The rank.
        truncate: Makes a product's factors of that rank.
    """
    a, b = factors
    made_a, made_b = a.new_zeros(len(a), rank, a.shape[2]), b.new_zeros(len(b), b.shape[1], rank)
    for expert, (own_a, own_b) in enumerate(zip(a, b, strict=True)):
        used = own_b.any(dim=0)
        own_a, own_b = own_a[used], own_b[:, used]
        if len(own_a) > rank:
            own_a, own_b = truncate(own_a, own_b)
        made_a[expert, : len(own_a)], made_b[expert, :, : len(own_a)] = own_a, own_b
    return made_a, made_b


def stacked(factors: ExpertFactors, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (experts·rank, in) and B (out, rank·experts), an expert's columns of it lying apart.

    Args:
        factors: The factors.
        rank: The rank of the result; what is missing are zeros.
    """
    a, b = factors
    missing = rank - a.shape[1]
    a = torch.nn.functional.pad(a, (0, 0, 0, missing)).reshape(-1, a.shape[2])
    b = torch.nn.functional.pad(b, (0, missing)).permute(1, 2, 0)
    return a, b.reshape(len(b), -1).contiguous()


def unstacked(
    weight: StackedWeight, a: torch.Tensor, b: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every expert's A and B of factors that are stacked."""
    ranked = b.reshape(weight.outputs, -1, weight.experts)
    for expert, own in enumerate(a.reshape(weight.experts, -1, weight.inputs)):
        yield own, ranked[:, :, expert]
