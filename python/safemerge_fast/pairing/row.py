"""One output tensor and what it could be made of; models have a hundred thousand of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from .encoded import Encoded
from .operand import Operand, Term
from .stack import Slices

__all__ = ["NOT_ADAPTED", "Row", "SameName", "Shared"]


class SameName(Mapping[str, str]):
    """The names of a tensor that is called the same in every role; models have a hundred thousand of them."""

    __slots__ = ("_name", "_roles")

    def __init__(self, name: str, roles: tuple[str, ...]) -> None:
        """Holds one name.

        Args:
            name: The name.
            roles: The roles that have it; one tuple for many tensors.
        """
        self._name = name
        self._roles = roles

    def __getitem__(self, role: str) -> str:
        if role in self._roles:
            return self._name
        raise KeyError(role)

    def __contains__(self, role: object) -> bool:
        return role in self._roles

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)


_Value = TypeVar("_Value")

NOT_ADAPTED: Mapping[str, tuple[Term, ...]] = {}
"""What adapters make of a tensor where there is none."""


class Row(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One output tensor and what it could be made of.

    Attributes:
        name: Name of the output tensor, the fine-tuned model's (the aligned model's if that is an adapter).
        file: That model's file that holds it.
        dtype: Its dtype there, e.g. "BF16".
        shape: Its shape there.
        names: Role to that role's tensor name, for the checkpoints that have it with an equal shape; adapters
            are not among them.
        module_type: "q_proj", "experts.gate_proj", "embed_tokens", "norm", …, for counts per type.
        layer: The layer it belongs to, e.g. "model.layers.7", or None.
        analysed: Whether it is to be scored.
        transposed: Whether it is stored as (in, out), as GPT-2's Conv1D does.
        reason: Why it is left out of the analysis, or "projection".
        adapted: What adapters make of it, by role; a role is there if it is an adapter, or if it has the matrix as a
            part of another tensor.
        slices: The experts that it holds, if it holds many; None for a tensor that is one module, or none.
        encoded: How it is stored, if it is quantised.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    names: Mapping[str, str]
    module_type: str
    layer: str | None
    analysed: bool
    transposed: bool
    reason: str
    adapted: Mapping[str, tuple[Term, ...]] = NOT_ADAPTED
    slices: Slices | None = None
    encoded: Encoded | None = None

    @property
    def terms(self) -> Mapping[str, tuple[Term, ...]]:
        """What each role's tensor is made of, for the roles that have it as one."""
        plain = {role: (Term(Operand(role, name)),) for role, name in self.names.items()}
        return {**plain, **self.adapted}

    def has(self, role: str) -> bool:
        """Whether a role has the tensor, or makes it, or has all that it holds."""
        return role in self.names or role in self.adapted or self.is_elsewhere(role)

    def is_elsewhere(self, role: str) -> bool:
        """Whether a role has the experts of the tensor in another layout, so that only parts can be compared."""
        return self.slices is not None and role in self.slices.elsewhere

    def is_plain(self, role: str) -> bool:
        """Whether a role has the tensor stored under the row's own name."""
        return role not in self.adapted and role in self.names and self.names[role] == self.name


class Shared:
    """Gives one object for equal values, so that a hundred thousand rows hold few."""

    def __init__(self, roles: tuple[str, ...]) -> None:
        """Starts with no value known.

        Args:
            roles: The roles that a tensor may have a name in.
        """
        self._known: dict[Any, Any] = {}
        self._roles = roles

    def __call__(self, value: _Value) -> _Value:
        """The first value that was equal to this one."""
        found: _Value = self._known.setdefault(value, value)
        return found

    def names(self, own: str, names: dict[str, str]) -> Mapping[str, str]:
        """The same names, in less memory where they are all one."""
        if any(name != own for name in names.values()):
            return names
        return SameName(own, self(tuple(names)))
