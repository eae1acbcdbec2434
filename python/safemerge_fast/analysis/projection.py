"""Projects updates onto the safety subspace, as Safe LoRA (arXiv 2405.16833) does it: C·Δ with C = V·Vᵀ/‖V‖.

C is never made. Of a product, C·(B·A) = (V·(VᵀB)/‖V‖)·A takes two passes over V. Of an update of full rank, the smaller
Gram side is: V·(VᵀΔ) by blocks of rows where the input is not larger than the output, else (V·Vᵀ)·Δ by blocks of
columns. So memory is the square of the smaller side and a few blocks, and the result is given out as it is made.
Products are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import AnalysisError
from .blocks import Difference, Workspace, open_matrix, read_tensor
from .device import full_float32, resolve_device
from .products import Products, power_of_two

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.module import Module
    from ..pairing.operand import LowRank

__all__ = ["open_workspace", "project_product", "project_update"]


def open_workspace(device: str) -> Workspace:
    """The buffers that all projections of a job share, on a device as the settings name it."""
    return Workspace(resolve_device(device))


def project_product(
    models: Mapping[str, Model], module: Module, products: Sequence[LowRank], *, workspace: Workspace
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Projects the products that an update of the aligned weight is the sum of.

    Args:
        models: base, aligned and the sources of the factors, by role.
        module: A module of the pairing.
        products: The products.
        workspace: Buffers and the device.

    Returns:
        Of each product A as it is, (rank, d_in), and C·B, (d_out, rank), without its scale; float32 on the CPU.

    Raises:
        AnalysisError: A value is not finite.
    """
    v = _safety(models, module, workspace)
    reader = Products(v, transposed=module.transposed, workspace=workspace)
    found = []
    with full_float32(workspace.device):
        for product in products:
            a, b = (
                read_tensor(models[product.source], name, view).float()
                for name, view in ((product.a, product.a_view), (product.b, product.b_view))
            )
            if product.transpose != module.transposed:
                a, b = b.T, a.T
            images = reader.returned(b)
            # Against underflow of the products of small weights.
            scale = power_of_two(float(torch.linalg.vector_norm(images)))
            moved = reader.image(images.mul_(scale)).cpu() / (scale * _norm(v))
            found.append((a, _finite(moved, module)))
    v.release()
    return found


def project_update(
    models: Mapping[str, Model], module: Module, *, workspace: Workspace
) -> Iterator[torch.Tensor]:
    """Projects an update of any rank.

    Args:
        models: base, aligned and finetuned, by role.
        module: A module of the pairing.
        workspace: Buffers and the device.

    Yields:
        Rows of C·Δ, in order; of its transpose, if is_turned says so. float32 on the CPU.

    Raises:
        AnalysisError: A value is not finite.
    """
    v = _safety(models, module, workspace)
    terms = module.terms
    finetuned, aligned = (
        open_matrix(models, role, module.name, terms[role]) for role in ("finetuned", "aligned")
    )
    delta = Difference(workspace, finetuned, aligned, transposed=module.transposed)
    with full_float32(workspace.device):
        for rows in _turned(v, delta, workspace) if is_turned(module) else _straight(v, delta, workspace):
            yield _finite(rows.cpu(), module)
    v.release()
    delta.release()


def is_turned(module: Module) -> bool:
    """Whether project_update gives the rows of the transpose."""
    d_out, d_in = module.shape
    return d_in > d_out


def _straight(v: Difference, delta: Difference, workspace: Workspace) -> Iterator[torch.Tensor]:
    """Rows of V·(VᵀΔ)/‖V‖."""
    d_out, d_in = v.shape
    every = slice(0, d_in)
    blocks = workspace.blocks(d_out, d_in)
    cross = workspace.buffer("cross", d_in, d_in).zero_()
    for rows in blocks:
        block = v.block(rows, every, "block")
        update = delta.block(rows, every, "update")
        for first, last in workspace.strips(d_in, 2.0 * update.numel()):
            cross[first:last].addmm_(block[:, first:last].T, update)
    scale = power_of_two(float(torch.linalg.vector_norm(cross)))
    cross.mul_(scale)
    for rows in blocks:
        block = v.block(rows, every, "block", norms=False)
        moved = workspace.buffer("product", rows.stop - rows.start, d_in)
        for first, last in workspace.strips(len(block), 2.0 * d_in * d_in):
            torch.mm(block[first:last], cross, out=moved[first:last])
        yield moved.div_(scale * _norm(v))


def _turned(v: Difference, delta: Difference, workspace: Workspace) -> Iterator[torch.Tensor]:
    """Columns of (V·Vᵀ)·Δ/‖V‖, as rows."""
    d_out, d_in = v.shape
    every = slice(0, d_out)
    blocks = workspace.blocks(d_in, d_out)
    gram = workspace.buffer("gram", d_out, d_out).zero_()
    for columns in blocks:
        block = v.block(every, columns, "block")
        for first, last in workspace.strips(d_out, 2.0 * block.numel()):
            gram[first:last].addmm_(block[first:last], block.T)
    scale = power_of_two(float(torch.linalg.vector_norm(gram)))
    gram.mul_(scale)
    for columns in blocks:
        update = delta.block(every, columns, "update")
        moved = workspace.buffer("product", columns.stop - columns.start, d_out)
        for first, last in workspace.strips(len(moved), 2.0 * d_out * d_out):
            # The Gram matrix is symmetric.
            torch.mm(update[:, first:last].T, gram, out=moved[first:last])
        yield moved.div_(scale * _norm(v))


def _safety(models: Mapping[str, Model], module: Module, workspace: Workspace) -> Difference:
    """V = W_aligned - W_base."""
    terms = module.terms
    aligned, base = (open_matrix(models, role, module.name, terms[role]) for role in ("aligned", "base"))
    return Difference(workspace, aligned, base, transposed=module.transposed)


def _norm(v: Difference) -> float:
    """‖V‖, once V was read; of one that is zero, so that nothing is left of an update, 1."""
    return math.sqrt(v.squares) or 1.0


def _finite(rows: torch.Tensor, module: Module) -> torch.Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise AnalysisError(
            f"{module.name} cannot be projected: it holds values that are not finite, or its product leaves float32's "
            f"range; repair that checkpoint, or leave the tensor out with --exclude"
        )
    return rows
