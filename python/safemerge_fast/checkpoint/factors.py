"""What the factors of every low-rank product must be, whatever they are added to."""

from __future__ import annotations

from .._engine import TensorInfo
from ..errors import AdapterError

__all__ = ["require_factors"]


def require_factors(where: str, a: TensorInfo, b: TensorInfo) -> None:
    """Refuses factors that make no matrix.

    Args:
        where: Role and file, for messages.
        a: A.
        b: B.

    Raises:
        AdapterError: One of them is empty or no matrix.
    """
    for factor in (a, b):
        shape = tuple(factor.shape)
        if 0 in shape:
            raise AdapterError(
                f"{where}: {factor.name} is empty, of shape {shape}: the adapter was saved without gathering its "
                f"shards (DeepSpeed ZeRO-3, FSDP); save it again from gathered weights"
            )
        if len(shape) != 2:
            raise AdapterError(
                f"{where}: {factor.name} has shape {shape}; only LoRA of linear, Conv1D and embedding layers and of "
                f"parameters, whose factors are matrices, can be merged"
            )
