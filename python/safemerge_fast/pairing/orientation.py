"""How a matrix is stored: (out, in) as a Linear's is, or (in, out) as a Conv1D's of GPT-2 is."""

from __future__ import annotations

import re

from .._engine import TensorInfo
from ..checkpoint.model import Model
from .modules import is_conv1d_name, is_stored_transposed, own_name
from .structure import Structure

__all__ = ["Orientations"]

# Modules of GPT-2 that take hidden states and give something wider.
_WIDENS = frozenset({"c_attn", "c_fc", "q_attn"})
_TOWER = re.compile(r"^(.*?)(?=(^|\.)\d+\.)")


class Orientations:
    """How the matrices of one model are stored.

    What says it, the first that does: the length of the matrix's bias, which is that of the outputs; the size of hidden
    states; matrices of the same module in other layers, or beside it, that are not square; the family, by any role's
    configuration or one nested in it. Where nothing says it, (out, in) is assumed, and notes() tells if that could be
    wrong.
    """

    def __init__(self, model: Model, structure: Structure) -> None:
        """Looks at the headers once.

        Args:
            model: The model whose matrices are asked for.
            structure: What its shapes and all configurations say.
        """
        self._headers = model.headers
        self._structure = structure
        self._votes: dict[tuple[str, str], set[bool]] = {}
        self._unknown: list[str] = []
        for tensor in model.headers.tensors:
            transposed = self._by_shape(tensor)
            if transposed is not None:
                self._votes.setdefault(_siblings(tensor.name), set()).add(transposed)

    def is_stored_transposed(self, tensor: TensorInfo) -> bool:
        """Whether a tensor of the model is stored as (in, out); for what is no matrix, it is not."""
        if len(tensor.shape) != 2:
            return False
        known = self._by_shape(tensor)
        if known is not None:
            return known
        votes = self._votes.get(_siblings(tensor.name), ())
        if len(votes) == 1:
            return next(iter(votes))
        if not is_conv1d_name(tensor.name):
            return False
        if any(
            is_stored_transposed(tensor, {"model_type": model_type})
            for model_type in self._structure.model_types
        ):
            return True
        if not self._structure.model_types and tensor.name.endswith("weight"):
            self._unknown.append(tensor.name)
        return False

    def notes(self) -> list[str]:
        """What a person should know of matrices whose orientation nothing said; to be asked when all were asked for."""
        if not self._unknown:
            return []
        names = sorted(set(self._unknown))
        return [
            f"{len(names)} matrices, such as {names[0]}, may be stored as (in, out) as GPT-2's are, and neither a bias "
            f"nor a config.json says it; (out, in) is assumed, and ρ would be wrong otherwise: put the config.json "
            f"beside the weights of a role"
        ]

    def _by_shape(self, tensor: TensorInfo) -> bool | None:
        """What the shape says of a matrix, or None; a square one says nothing."""
        shape = tuple(tensor.shape)
        if len(shape) != 2 or shape[0] == shape[1] or not tensor.name.endswith("weight"):
            return None
        bias = f"{tensor.name.removesuffix('weight')}bias"
        if bias in self._headers:
            length = tuple(self._headers.tensor(bias).shape)
            if length in (shape[:1], shape[1:]):
                return length == shape[1:]
        if own_name(tensor.name) in _WIDENS:
            hidden = [size in self._structure.hidden for size in shape]
            if hidden.count(True) == 1:
                return hidden[0]
        return None


def _siblings(name: str) -> tuple[str, str]:
    """The tower that a tensor belongs to, and its module's own name."""
    match = _TOWER.match(name)
    return ("" if match is None else match[0]), own_name(name)
