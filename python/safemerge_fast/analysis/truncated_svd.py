"""The best approximation of a difference of two weights by a product of low rank: SVD_k(V), in float32 factors.

A Gaussian range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061), whose products with V are
made by blocks, so that V need not be in memory if it is large. Where the k-th singular value is near the next one, the
iteration converges slowly; so it goes on until what it would still change, by the rate at which changes shrink, is
small, and says how much that is where it has to give up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import AnalysisError
from .blocks import Difference, Matrix, Workspace, open_matrix
from .device import full_float32, resolve_device
from .products import HELD, Products

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.module import Module

__all__ = ["MOST_BYTES", "Truncation", "open_workspace", "truncate"]

OVERSAMPLING = 16
"""Columns beside the k, with which the iteration converges faster."""

DENSE = 192
"""Matrices whose smaller side is not longer are decomposed whole, in float64."""

MOST_BYTES = 4 * HELD + 3 * 4 * (4 << 20)
"""What it takes beside torch, about."""

TOLERANCE = 3e-6
"""What may be missing of the approximation, relative to its norm."""

_SEED = 20250615
# Nothing converges at a rate above this within a useful number of iterations.
_SLOWEST = 0.999


@dataclass(frozen=True, slots=True)
class Truncation:
    """SVD_k(V) = B·A.

    Attributes:
        b: U·S, (d_out, k), float32.
        a: Vᵀ, (k, d_in), float32, with orthonormal rows.
        singular: The k singular values, in float64.
        squares: ‖V‖², of all of V.
        error: What is missing of the product, relative to its norm, as far as the iteration can tell; 0 where V was
            decomposed whole.
    """

    b: torch.Tensor
    a: torch.Tensor
    singular: torch.Tensor
    squares: float
    error: float

    def missing(self) -> torch.Tensor:
        """The error as a tensor of one float32."""
        return torch.tensor([self.error], dtype=torch.float32)


def open_workspace(device: str) -> Workspace:
    """The buffers that all truncations of a job share, on a device as the settings name it."""
    return Workspace(resolve_device(device))


def truncate(
    models: Mapping[str, Model],
    module: Module,
    rank: int,
    *,
    minuend: str,
    subtrahend: str,
    workspace: Workspace,
    iterations: int,
) -> Truncation:
    """Approximates one module's difference.

    Args:
        models: The models by role, sources of what the module is made of.
        module: A module of the pairing, which both roles have.
        rank: k; at most the smaller side.
        minuend: The role that is subtracted from.
        subtrahend: The role that is subtracted.
        workspace: Buffers and the device.
        iterations: Power iterations at most.

    Raises:
        AnalysisError: A value is not finite.
    """
    terms = module.terms
    tensors = [open_matrix(models, role, module.name, terms[role]) for role in (minuend, subtrahend)]
    difference = Difference(workspace, *tensors, transposed=module.transposed)
    products = Products(difference, transposed=module.transposed, workspace=workspace)
    smaller = min(difference.shape)
    with full_float32(workspace.device):
        if smaller <= max(DENSE, 2 * (rank + OVERSAMPLING)) and products.is_held:
            found = _dense(products.whole(), rank, difference)
        else:
            found = _iterated(products, rank, iterations, difference)
    difference.release()
    if found is None:
        raise AnalysisError(_why_not_finite(module.name, tensors, workspace))
    return found


def _dense(v: torch.Tensor, rank: int, difference: Difference) -> Truncation | None:
    """By a whole SVD in float64, on the CPU, because MPS has no float64."""
    if not math.isfinite(difference.squares):
        return None
    u, s, vt = torch.linalg.svd(v.cpu().double(), full_matrices=False)
    b = (u[:, :rank] * s[:rank]).float()
    return Truncation(b, vt[:rank].float(), s[:rank], difference.squares, 0.0)


def _iterated(products: Products, rank: int, iterations: int, difference: Difference) -> Truncation | None:
    """By the range finder. Products are float32; what keeps columns orthonormal is float64."""
    d_out, d_in = difference.shape
    width = min(rank + OVERSAMPLING, d_out, d_in)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(d_in, width, generator=generator)
    basis = _orthonormal(products.image(start))
    if not math.isfinite(difference.squares):
        return None
    if difference.squares == 0.0:
        return Truncation(
            torch.zeros(d_out, rank), torch.zeros(rank, d_in), torch.zeros(rank).double(), 0.0, 0.0
        )
    found = _projected(basis, products.returned(basis), rank)
    last = error = math.inf
    for _ in range(iterations):
        right = _orthonormal(found.images)
        basis = _orthonormal(products.image(right))
        better = _projected(basis, products.returned(basis), rank)
        change = better.distance(found)
        found = better
        rate = min(change / last, _SLOWEST) if math.isfinite(last) and last > 0.0 else 0.5
        error, last = change * rate / (1.0 - rate), change
        if max(error, change / 8.0) <= TOLERANCE:
            break
    return Truncation(found.b.float(), found.a.float(), found.singular, difference.squares, error)


@dataclass(frozen=True, slots=True)
class _Projection:
    """SVD_k of Q·Qᵀ·V, with VᵀQ, from which the next iteration starts; float64 on the CPU."""

    b: torch.Tensor
    a: torch.Tensor
    singular: torch.Tensor
    images: torch.Tensor

    def distance(self, other: _Projection) -> float:
        """‖B·A - B'·A'‖ / ‖B·A‖, from Gram matrices of the factors."""
        size = float(self.singular.square().sum())
        if size == 0.0:
            return 0.0
        inner = float(((self.b.T @ other.b) * (self.a @ other.a.T)).sum())
        return math.sqrt(max(size + float(other.singular.square().sum()) - 2.0 * inner, 0.0) / size)


def _projected(basis: torch.Tensor, images: torch.Tensor, rank: int) -> _Projection:
    """Decomposes Q·Qᵀ·V by the small matrix VᵀQ."""
    images = images.cpu().double()
    u, s, wt = torch.linalg.svd(images, full_matrices=False)
    b = (basis.cpu().double() @ wt[:rank].T) * s[:rank]
    return _Projection(b, u[:, :rank].T, s[:rank], images)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns' span, in float64."""
    double = columns.cpu().double()
    # What is not finite is found out by the norm of V.
    basis: torch.Tensor = torch.linalg.qr(torch.nan_to_num(double)).Q
    return basis


def _why_not_finite(name: str, tensors: list[Matrix], workspace: Workspace) -> str:
    for tensor in tensors:
        if not tensor.is_finite(workspace.chunk_elements):
            return (
                f"{name} cannot be decomposed: non-finite values in {tensor.role} tensor {tensor.name}; repair that "
                f"checkpoint, or leave the tensor out with --exclude"
            )
    return f"{name} cannot be decomposed: its difference leaves float32's range; leave it out with --exclude"
