"""Experts across checkpoints: which tensor of a role, and which part of it, holds one expert's matrix.

Roles may differ: stacked the one way, stacked the other way, or a tensor for each expert. What is compared is the
matrix, (out, in), of one expert.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .._engine import TensorInfo
from ..checkpoint.adapter import Adapter
from ..checkpoint.model import Model
from .expert_facts import ExpertFacts
from .expert_layout import Block, Layout, read_block
from .expert_names import Kind, Place, may_be_stacked, place_key, single, stacked
from .operand import Operand, Term
from .stack import Elsewhere, Part, Slices, Stack
from .view import View

__all__ = ["Experts", "find_experts"]


@dataclass(frozen=True, slots=True)
class _Where:
    """One kind of matrix of one layer's experts in one role.

    Attributes:
        shape: (out, in).
        experts: How many there are.
        layout: How they are stacked, and in which part; None if each has a tensor.
        part: Likewise.
        prefix: What the names of the tensors begin with, if each has one.
        leaf: The name of the matrix in these.
    """

    shape: tuple[int, ...]
    experts: int
    layout: Layout | None = None
    part: Part | None = None
    prefix: str = ""
    leaf: str = ""

    def tensor(self, expert: int) -> str:
        """The tensor that holds an expert's matrix."""
        return self.layout.tensor if self.layout is not None else f"{self.prefix}.{expert}.{self.leaf}.weight"

    def term(self, role: str, expert: int, *, transposed: bool) -> Term:
        """An expert's matrix, rows and columns as they are wanted."""
        if self.layout is None or self.part is None:
            view = View(0, self.shape, (self.shape[1], 1))
            lies = False
        else:
            view = self.layout.stack.view(expert, self.part)
            lies = self.layout.stack.transposed
        return Term(Operand(role, self.tensor(expert), view=view if lies is transposed else view.turned()))


@dataclass(frozen=True, slots=True)
class _Places:
    """Elsewhere: the parts of a stack in a role that lays them out differently, each with where it is."""

    role: str
    parts: tuple[tuple[Part, _Where], ...]

    def terms(self, expert: int, part: Part, *, transposed: bool) -> tuple[Term, ...]:
        """See Elsewhere."""
        where = next(where for mine, where in self.parts if mine is part or mine == part)
        return (where.term(self.role, expert, transposed=transposed),)


@dataclass(slots=True)
class _Role:
    """The experts of one model.

    Attributes:
        model: The model.
        blocks: Its stacked experts, layer by layer.
        layouts: The same by tensor.
        used: Tensors that are parts of another role's tensors, or have them as parts.
    """

    model: Model
    blocks: tuple[Block, ...]
    layouts: Mapping[str, tuple[Block, Layout]]
    used: set[str] = field(default_factory=set)
    _places: dict[tuple[str, ...], dict[Kind, _Where] | None] | None = None

    def where(self, prefix: str) -> Mapping[Kind, _Where]:
        """Where the matrices of a layer's experts are; the prefix is another role's."""
        if self._places is None:
            self._places = self._find()
        return self._places.get(place_key(prefix)) or {}

    def _find(self) -> dict[tuple[str, ...], dict[Kind, _Where] | None]:
        places: dict[tuple[str, ...], dict[Kind, _Where] | None] = {}
        owners: dict[tuple[str, ...], str] = {}

        def add(prefix: str, kind: Kind, where: _Where) -> None:
            key = place_key(prefix)
            if owners.setdefault(key, prefix) != prefix:
                # Two layers of this model could be meant.
                places[key] = None
            elif (known := places.setdefault(key, {})) is not None:
                known[kind] = where

        for block in self.blocks:
            for layout in block.layouts:
                stack = layout.stack
                for part, kind in zip(stack.parts, layout.kinds, strict=True):
                    shape = part.view.shape[::-1] if stack.transposed else part.view.shape
                    add(block.prefix, kind, _Where(shape, stack.experts, layout, part))
        for (prefix, leaf), (kind, tensors) in self._singles().items():
            if len({tuple(tensor.shape) for tensor in tensors}) == 1 and len(tensors[0].shape) == 2:
                shape = tuple(tensors[0].shape)
                add(prefix, kind, _Where(shape, len(tensors), prefix=prefix, leaf=leaf))
        return places

    def _singles(self) -> dict[tuple[str, str], tuple[Kind, list[TensorInfo]]]:
        """Tensors of single experts, by what their names begin and end with."""
        found: dict[tuple[str, str], tuple[Kind, dict[int, TensorInfo]]] = {}
        for tensor in self.model.headers.tensors:
            if "experts." in tensor.name and (mine := single(tensor.name)) is not None:
                found.setdefault((mine.prefix, mine.leaf), (mine.kind, {}))[1][mine.expert] = tensor
        return {
            key: (kind, list(tensors.values()))
            for key, (kind, tensors) in found.items()
            if sorted(tensors) == list(range(len(tensors)))
        }


class Experts:
    """The experts of all roles, of which at least one has stacked tensors."""

    def __init__(self, roles: Mapping[str, _Role], anchor: str) -> None:
        """Holds what was found; see find_experts."""
        self._roles = roles
        self._anchor = roles[anchor]

    def slices(self, name: str) -> Slices | None:
        """The experts that a tensor of the anchor holds; None if it holds none, or it is not known how."""
        found = self._anchor.layouts.get(name)
        return None if found is None else Slices(found[0].prefix, found[1].stack)

    def is_alike(self, name: str, role: str, counterpart: str) -> bool:
        """Whether a role's tensor of the same shape has the same experts at the same places as the anchor's."""
        mine = self._anchor.layouts.get(name)
        other = self._roles[role].layouts.get(counterpart)
        return mine is None or other is None or _lie_alike(mine[1].stack, other[1].stack)

    def elsewhere(self, name: str, role: str) -> Elsewhere | str | None:
        """How a role has the experts of a stacked tensor of the anchor.

        Returns:
            Where they are; or what is wrong, in a few words; None if it has none of them.
        """
        block, layout = self._anchor.layouts[name]
        other = self._roles[role]
        places = other.where(block.prefix)
        found = []
        for part, kind in zip(layout.stack.parts, layout.kinds, strict=True):
            where = places.get(kind)
            if where is None:
                return _fault(kind, places)
            shape = part.view.shape[::-1] if layout.stack.transposed else part.view.shape
            if (where.experts, where.shape) != (layout.stack.experts, shape):
                return f"{where.experts} experts of {where.shape}"
            found.append((part, where))
        for expert in range(layout.stack.experts):
            other.used.update(where.tensor(expert) for _, where in found)
        return _Places(role, tuple(found))

    def terms(self, tensor: TensorInfo, role: str) -> tuple[Term, ...] | str | None:
        """What a tensor of one expert of the anchor is in a role that stacks them.

        Returns:
            Its terms; or what is wrong, in a few words; None if the role has no such expert.
        """
        mine = single(tensor.name)
        if mine is None:
            return None
        other = self._roles[role]
        places = other.where(mine.prefix)
        where = places.get(mine.kind)
        if where is None or where.layout is None:
            return _fault(mine.kind, places)
        if where.shape != tuple(tensor.shape) or mine.expert >= where.experts:
            return f"{where.experts} experts of {where.shape}"
        other.used.add(where.tensor(mine.expert))
        return (where.term(role, mine.expert, transposed=False),)

    def used(self, role: str) -> set[str]:
        """The tensors of a role that were taken for, or from, another role's tensors."""
        return self._roles[role].used

    def notes(self) -> list[str]:
        """What a person should know of them, in sentences."""
        notes = []
        for role, its in self._roles.items():
            unclear = [unclear for block in its.blocks for unclear in block.unclear]
            unsplit = [name for block in its.blocks for name in block.unsplit]
            if unclear and its is self._anchor:
                notes.append(
                    f"how {len(unclear)} tensors of experts lie in {role} is not known, such as "
                    f"{unclear[0].tensor} ({unclear[0].why}); they are not analysed"
                )
            if unsplit:
                notes.append(
                    f"where gate and up lie in {len(unsplit)} tensors of experts of {role} is not known, such as "
                    f"{unsplit[0]}; the two of an expert are taken for one matrix"
                )
        return notes


def find_experts(models: Mapping[str, Model], anchor: str) -> Experts | None:
    """Looks for stacked experts; only headers are read.

    Args:
        models: Models by role; adapters are not looked at.
        anchor: The role whose tensors are to be paired.

    Returns:
        The experts, or None if no role has stacked ones, as most have none.
    """
    facts = {
        role: ExpertFacts(model.config) for role, model in models.items() if not isinstance(model, Adapter)
    }
    counts = {fact.count for fact in facts.values()}
    found = {role: grouped for role in facts if (grouped := _grouped(models[role], counts))}
    if not found:
        return None
    roles = {}
    for role in facts:
        known = [facts[role], *(fact for other, fact in facts.items() if other != role)]
        headers = models[role].headers
        blocks = tuple(read_block(group, headers, known) for group in found.get(role, ()))
        layouts = {layout.tensor: (block, layout) for block in blocks for layout in block.layouts}
        roles[role] = _Role(models[role], blocks, layouts)
    return Experts(roles, anchor)


def _grouped(model: Model, counts: Container[int | None]) -> Sequence[Sequence[tuple[Place, TensorInfo]]]:
    """The tensors that may hold stacked experts, layer by layer; counts are how many there may be."""
    groups: dict[str, list[tuple[Place, TensorInfo]]] = {}
    for tensor in model.headers.tensors:
        if not may_be_stacked(tensor) or (place := stacked(tensor.name)) is None:
            continue
        # A convolution may be called the same.
        if place.speaks_of_experts or tensor.shape[0] in counts:
            groups.setdefault(place.parent, []).append((place, tensor))
    return list(groups.values())


def _lie_alike(one: Stack, other: Stack) -> bool:
    return (one.experts, one.size, one.transposed) == (other.experts, other.size, other.transposed) and [
        part.view for part in one.parts
    ] == [part.view for part in other.parts]


def _fault(kind: Kind, places: Iterable[Kind]) -> str | None:
    """Why a role's experts have no such matrix."""
    known = set(places)
    if not known:
        return None
    if Kind.GATE_UP in known and kind in (Kind.GATE, Kind.UP):
        return "gate and up in one, at places that are not known,"
    return f"without {kind.value}"
