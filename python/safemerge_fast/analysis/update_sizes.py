"""How large a low-rank update is, ‖s·B·A‖, from its factors alone: they are small, and no matrix is made of them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .._engine import TensorInfo
from ..checkpoint.model import Model
from ..pairing.operand import LowRank
from ..pairing.view import View

__all__ = ["UpdateSizes"]

_Floats = npt.NDArray[np.floating]
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


class UpdateSizes:
    """The norms of an adapter's updates; the factors of one update are kept for the next of its experts."""

    def __init__(self, model: Model) -> None:
        """Reads nothing yet.

        Args:
            model: The adapter.
        """
        self._model = model
        self._kept: dict[str, _Floats] = {}

    def of_product(self, product: LowRank) -> float:
        """‖s·B·A‖ (Frobenius) in float64, by the Gram matrices of the factors: ‖B·A‖² = ⟨BᵀB, AAᵀ⟩."""
        keep = {product.a, product.b}
        self._kept = {name: values for name, values in self._kept.items() if name in keep}
        a = self._matrix(product.a, product.a_view)
        b = self._matrix(product.b, product.b_view)
        square = float(np.sum((b.T @ b) * (a @ a.T)))
        # Rounding may take a product that is zero below zero.
        return abs(product.scale) * math.sqrt(max(square, 0.0)) if not math.isnan(square) else math.nan

    def of_tensor(self, name: str, scale: float) -> float:
        """‖s·x‖ of a tensor that is added as it is, such as a bias."""
        return abs(scale) * float(np.linalg.norm(self._stored(name).astype(np.float64)))

    def _matrix(self, name: str, view: View | None) -> npt.NDArray[np.float64]:
        """A factor, or the part of it that a view is of."""
        stored = self._stored(name)
        if view is not None:
            flat = stored.reshape(-1)
            strides = tuple(stride * flat.itemsize for stride in view.strides)
            stored = np.lib.stride_tricks.as_strided(flat[view.start :], view.shape, strides, writeable=False)
        return stored.astype(np.float64)

    def _stored(self, name: str) -> _Floats:
        if name not in self._kept:
            headers = self._model.headers
            info = headers.tensor(name)
            rows = headers.rows(name, 0, info.shape[0] if info.shape else 1)
            self._kept[name] = _floats(np.array(rows, dtype=np.uint8), info)
            headers.release(name)
        return self._kept[name]


def _floats(data: npt.NDArray[np.uint8], info: TensorInfo) -> _Floats:
    """Stored bytes as numbers; bfloat16 is the upper half of float32."""
    if info.dtype == "BF16":
        halves = data.reshape(-1).view(np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(info.shape)
    return data.reshape(-1).view(_DTYPES[info.dtype]).reshape(info.shape)
