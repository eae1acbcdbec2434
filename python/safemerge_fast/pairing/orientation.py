"""How a matrix is stored: (out, in) as a Linear's is, or (in, out) as a Conv1D's of GPT-2 is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .._engine import TensorInfo
from ..checkpoint.model import Model
from .modules import (
    is_conv1d_name,
    is_projection_of_heads,
    is_stored_transposed,
    leads_into_heads,
    own_name,
)
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
        self._structure = structure
        self._unknown: list[str] = []
        self._known = dict(_by_biases(model))
        for tensor in model.headers.tensors:
            if _may_be_conv1d(tensor.name) and tensor.name not in self._known:
                self._known |= self._by_hidden_states(tensor)
        votes: dict[tuple[str, str], set[bool]] = {}
        for name, transposed in self._known.items():
            votes.setdefault(_siblings(name), set()).add(transposed)
        # What (out, in) says of others is what is assumed anyhow, but for names of Conv1D modules.
        self._votes = {key: next(iter(found)) for key, found in votes.items() if len(found) == 1}
        self._any = any(self._votes.values())

    def is_stored_transposed(self, tensor: TensorInfo) -> bool:
        """Whether a tensor of the model is stored as (in, out); for what is no matrix, it is not."""
        name = tensor.name
        if is_projection_of_heads(name, len(tensor.shape)):
            return leads_into_heads(name)
        if len(tensor.shape) != 2 or not (self._any or _may_be_conv1d(name)):
            return False
        known = self._known.get(name)
        if known is None:
            known = self._votes.get(_siblings(name))
        if known is not None:
            return known
        if not is_conv1d_name(name):
            return False
        types = self._structure.model_types
        if any(is_stored_transposed(tensor, {"model_type": model_type}) for model_type in types):
            return True
        if not types and name.endswith("weight"):
            self._unknown.append(name)
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

    def _by_hidden_states(self, tensor: TensorInfo) -> dict[str, bool]:
        """What the size of hidden states says of a matrix that takes them and gives something wider."""
        shape = tuple(tensor.shape)
        if len(shape) != 2 or shape[0] == shape[1] or own_name(tensor.name) not in _WIDENS:
            return {}
        hidden = [size in self._structure.hidden for size in shape]
        return {tensor.name: hidden[0]} if hidden.count(True) == 1 else {}


def _by_biases(model: Model) -> Iterator[tuple[str, bool]]:
    """What the lengths of biases say of matrices that are not square, by the matrices' names."""
    headers = model.headers
    for bias in headers.tensors:
        if len(bias.shape) != 1 or not bias.name.endswith("bias"):
            continue
        name = f"{bias.name.removesuffix('bias')}weight"
        shape = tuple(headers.tensor(name).shape) if name in headers else ()
        if len(shape) == 2 and shape[0] != shape[1] and bias.shape[0] in shape:
            yield name, shape[1] == bias.shape[0]


def _may_be_conv1d(name: str) -> bool:
    """Whether a name may be of a Conv1D module, at a glance."""
    return "c_" in name or "q_attn" in name


def _siblings(name: str) -> tuple[str, str]:
    """The tower that a tensor belongs to, and its module's own name."""
    match = _TOWER.match(name)
    return ("" if match is None else match[0]), own_name(name)
