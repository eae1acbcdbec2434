"""How experts lie in stacked tensors: what their shapes and their neighbours' say of it, and last the family.

A stacked tensor of one layer is (experts, rows, columns), or (experts · rows, columns). Its matrices are (out, in) or
(in, out), and gate and up may be one matrix. With H what an expert takes and gives and I what lies between, gate and
up are (k·I, H) and down is (H, I), with k = 2 where gate and up are one: shapes that fit one way only, but for k = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .._engine import Checkpoint, TensorInfo
from ..checkpoint.model import FLOATS
from .expert_facts import ExpertFacts, Spelling, Split
from .expert_names import Kind, Place
from .modules import PROJECTION, module_type
from .stack import Part, Stack
from .view import View

__all__ = ["Block", "Layout", "Unclear", "read_block"]

_ROUTERS = ("gate.weight", "router.weight", "router.layer.weight", "router.proj.weight", "gate.wg.weight")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor holds experts.

    Attributes:
        tensor: Its name.
        stack: Where each expert's matrices lie.
        kinds: What each part of the stack is.
    """

    tensor: str
    stack: Stack
    kinds: tuple[Kind, ...]

    def part(self, kind: Kind) -> Part | None:
        """The part of that kind, or None."""
        return next(
            (part for part, mine in zip(self.stack.parts, self.kinds, strict=True) if mine is kind), None
        )


@dataclass(frozen=True, slots=True)
class Unclear:
    """A tensor of experts whose layout is not known.

    Attributes:
        tensor: Its name.
        why: Why not, in words.
    """

    tensor: str
    why: str


@dataclass(frozen=True, slots=True)
class Block:
    """The stacked experts of one layer.

    Attributes:
        prefix: What their names begin with.
        layouts: How each tensor holds them.
        unclear: Tensors of which that is not known.
        unsplit: Tensors that hold gate and up of each expert as one matrix, since it is not known where they lie.
    """

    prefix: str
    layouts: tuple[Layout, ...]
    unclear: tuple[Unclear, ...]
    unsplit: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Stacked:
    """One tensor, and which sides its matrices have as they are stored."""

    place: Place
    name: str
    experts: int
    rows: int
    columns: int

    @property
    def is_down(self) -> bool:
        return self.place.kind is Kind.DOWN

    def sides(self, transposed: bool) -> tuple[int, int]:
        """(out, in)."""
        return (self.columns, self.rows) if transposed else (self.rows, self.columns)

    def hidden(self, transposed: bool) -> int:
        """The side that is the model's hidden size."""
        out, inner = self.sides(transposed)
        return out if self.is_down else inner

    def factors(self) -> tuple[int, ...]:
        """How many times the intermediate size its other side may be."""
        match self.place.kind:
            case Kind.GATE_UP:
                return (2,)
            case Kind.FIRST:
                return (1, 2)
            case _:
                return (1,)


def read_block(
    found: Sequence[tuple[Place, TensorInfo]], headers: Checkpoint, facts: Sequence[ExpertFacts]
) -> Block:
    """Finds out how the stacked experts of one layer lie.

    Args:
        found: The tensors of that layer that may hold them, all with one parent.
        headers: The checkpoint that they are of.
        facts: What configurations say: the checkpoint's own, then the other roles'.
    """
    place = found[0][0]
    tensors: list[_Stacked] = []
    unclear: list[Unclear] = []
    for its, info in found:
        shape = _matrices(its, info, headers, facts)
        if isinstance(shape, str):
            unclear.append(Unclear(info.name, shape))
        else:
            tensors.append(_Stacked(its, info.name, *shape))
    downs = [tensor for tensor in tensors if tensor.is_down]
    firsts = [tensor for tensor in tensors if not tensor.is_down]
    layouts: list[Layout] = []
    unsplit: list[str] = []
    in_rows = len(found[0][1].shape) == 2
    for tensor in tensors:
        others = firsts if tensor.is_down else downs
        directions = _directions(tensor, () if in_rows else others, headers, facts)
        if len(directions) != 1:
            why = "its shape fits both ways" if directions else "its sides fit no other tensor of the layer"
            unclear.append(Unclear(tensor.name, why))
            continue
        layout = _layout(tensor, others, transposed=directions.pop(), facts=facts)
        if layout.kinds == (Kind.GATE_UP,):
            unsplit.append(tensor.name)
        layouts.append(layout)
    # As the checkpoint would call them if each had tensors of its own.
    prefix = place.prefix.replace(".mlp.experts", f".{_spelling(facts).block}.experts")
    return Block(prefix, tuple(layouts), tuple(unclear), tuple(unsplit))


def _matrices(
    place: Place, tensor: TensorInfo, headers: Checkpoint, facts: Sequence[ExpertFacts]
) -> tuple[int, int, int] | str:
    """(experts, rows, columns), or why they are not known."""
    shape = tuple(tensor.shape)
    if tensor.dtype not in FLOATS or 0 in shape:
        return "it is no float tensor, or empty"
    counts = [count for fact in facts if (count := fact.count) is not None]
    if len(shape) == 3:
        named = "shared" not in place.prefix and shape[0] not in counts
        if named and any(count in shape[1:] for count in counts):
            return f"its first axis should be the experts, but {shape} has their number elsewhere"
        return shape
    if (router := _router(place, headers)) is not None:
        counts.insert(0, router.shape[0])
    for count in counts:
        if shape[0] % count == 0:
            return count, shape[0] // count, shape[1]
    return "the number of experts is not known"


def _router(place: Place, headers: Checkpoint) -> TensorInfo | None:
    """The router beside the experts, which is (experts, hidden)."""
    above = place.prefix.removesuffix(".experts")
    for parent in dict.fromkeys((above, place.parent)):
        for leaf in _ROUTERS:
            name = f"{parent}.{leaf}"
            if name in headers and len(headers.tensor(name).shape) == 2:
                return headers.tensor(name)
    return None


def _directions(
    tensor: _Stacked, others: Sequence[_Stacked], headers: Checkpoint, facts: Sequence[ExpertFacts]
) -> set[bool]:
    """Whether the matrices can be (out, in), False, or (in, out), True, as far as is known; the surest word first."""
    possible = {False, True}
    for words in (
        _by_neighbours(tensor, others),
        _by_bias(tensor, headers),
        _by_router(tensor, headers),
        _by_hidden_size(tensor, facts),
        _by_hidden_size_of_neighbours(others, facts),
        _by_family(facts),
    ):
        for said in words:
            if len(possible) > 1 or not said:
                possible &= said
    return possible


def _by_neighbours(tensor: _Stacked, others: Sequence[_Stacked]) -> Iterator[set[bool]]:
    """Gate and up on one side and down on the other fit each other in one direction only."""
    for other in others:
        down, first = (tensor, other) if tensor.is_down else (other, tensor)
        yield {
            transposed
            for transposed in (False, True)
            for factor in first.factors()
            if first.hidden(transposed) == down.hidden(transposed)
            and first.sides(transposed)[0] == factor * down.sides(transposed)[1]
        }


def _by_bias(tensor: _Stacked, headers: Checkpoint) -> Iterator[set[bool]]:
    """A bias is as long as there are outputs."""
    for name in (f"{tensor.name}_bias", f"{tensor.name.removesuffix('.weight')}.bias"):
        if name in headers and headers.tensor(name).shape:
            length = headers.tensor(name).shape[-1]
            yield from _only({way for way in (False, True) if tensor.sides(way)[0] == length})


def _by_router(tensor: _Stacked, headers: Checkpoint) -> Iterator[set[bool]]:
    """A router takes what the experts take."""
    router = _router(tensor.place, headers)
    if router is not None:
        yield from _only({way for way in (False, True) if tensor.hidden(way) == router.shape[1]})


def _by_hidden_size(tensor: _Stacked, facts: Iterable[ExpertFacts]) -> Iterator[set[bool]]:
    """The side that is the model's hidden size."""
    for size in {fact.hidden_size for fact in facts}:
        yield from _only({way for way in (False, True) if tensor.hidden(way) == size})


def _by_hidden_size_of_neighbours(
    others: Iterable[_Stacked], facts: Iterable[ExpertFacts]
) -> Iterator[set[bool]]:
    """Tensors of one layer lie the same way."""
    for other in others:
        yield from _by_hidden_size(other, facts)


def _by_family(facts: Iterable[ExpertFacts]) -> Iterator[set[bool]]:
    for fact in facts:
        if fact.is_transposed is not None:
            yield {fact.is_transposed}


def _only(directions: set[bool]) -> Iterator[set[bool]]:
    """Says something only where one direction fits: experts may work in a size that is not the model's."""
    if len(directions) == 1:
        yield directions


def _layout(
    tensor: _Stacked, others: Sequence[_Stacked], *, transposed: bool, facts: Sequence[ExpertFacts]
) -> Layout:
    """Where the matrices lie, once their direction is known."""
    kind = tensor.place.kind
    if kind is Kind.FIRST:
        kind = _kind_of_first(tensor, others, transposed)
    elif kind is Kind.DOWN and any(
        first.place.kind is Kind.FIRST and _kind_of_first(first, [tensor], transposed) is Kind.INPUT
        for first in others
    ):
        kind = Kind.OUTPUT
    whole = View(0, (tensor.rows, tensor.columns), (tensor.columns, 1))
    views: dict[Kind, View] = {kind: whole}
    split = next((split for fact in facts if (split := fact.split(tensor.place.leaf)) is not None), None)
    if kind is Kind.GATE_UP and split is not None and tensor.sides(transposed)[0] % 2 == 0:
        views = dict(zip((Kind.GATE, Kind.UP), _halves(whole, split, transposed=transposed), strict=True))
    parts = []
    for its, view in views.items():
        name = _name(its, tensor.place.leaf, facts)
        kind_of_module = module_type(f"{tensor.place.prefix}.0.{name}", PROJECTION)
        parts.append(Part(name, kind_of_module, view))
    stack = Stack(tensor.experts, tensor.rows * tensor.columns, tuple(parts), transposed)
    return Layout(tensor.name, stack, tuple(views))


def _kind_of_first(tensor: _Stacked, downs: Sequence[_Stacked], transposed: bool) -> Kind:
    """Whether the first matrix is gate and up in one, by the size of what follows."""
    out = tensor.sides(transposed)[0]
    for down in downs:
        inner = down.sides(transposed)[1]
        if out == 2 * inner:
            return Kind.GATE_UP
        if out == inner:
            return Kind.INPUT if tensor.place.leaf == "input_linear" else Kind.UP
    return Kind.INPUT


def _halves(whole: View, split: str, *, transposed: bool) -> tuple[View, View]:
    """Gate's and up's part of a matrix of both."""
    axis = 1 if transposed else 0
    extent, stride = whole.shape[axis] // 2, whole.strides[axis]
    shape = tuple(extent if place == axis else length for place, length in enumerate(whole.shape))
    if split == Split.HALVES:
        return View(0, shape, whole.strides), View(extent * stride, shape, whole.strides)
    strides = tuple(2 * step if place == axis else step for place, step in enumerate(whole.strides))
    return View(0, shape, strides), View(stride, shape, strides)


def _spelling(facts: Sequence[ExpertFacts]) -> Spelling:
    """What one expert's tensors are called in the first model that says what it is."""
    return next((fact for fact in facts if fact.config), ExpertFacts({})).spelling


def _name(kind: Kind, leaf: str, facts: Sequence[ExpertFacts]) -> str:
    """What follows the expert's number in the name of a matrix."""
    match kind:
        case Kind.GATE | Kind.UP | Kind.DOWN:
            spelling = _spelling(facts)
            names = {Kind.GATE: spelling.gate, Kind.UP: spelling.up, Kind.DOWN: spelling.down}
            return f"{names[kind]}.weight"
        case Kind.GATE_UP:
            return "gate_up_proj"
        case _:
            return f"{leaf}.weight"
