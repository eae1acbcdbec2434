"""How tensors of experts are called: which of an expert's matrices one holds, and where the experts belong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from .._engine import TensorInfo

__all__ = ["Kind", "Place", "Single", "may_be_stacked", "place_key", "single", "stacked"]


class Kind(Enum):
    """What a matrix does in an expert."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_UP = "gate and up"
    """Both in one, one after the other or row by row."""
    FIRST = "first"
    """What comes first: gate and up in one, or up alone; the shapes say which."""
    INPUT = "input"
    """The first of two matrices of an expert that has no gate and no intermediate size twice as large."""
    OUTPUT = "output"


# What a stacked tensor is called, before ".weight".
_STACKED = {
    "gate_up_proj": Kind.GATE_UP,
    "w13_weight": Kind.GATE_UP,
    "w13": Kind.GATE_UP,
    "shared_w13_weight": Kind.GATE_UP,
    "fc1": Kind.FIRST,
    "input_linear": Kind.FIRST,
    "gate_and_up_projs": Kind.FIRST,
    "gate_proj": Kind.GATE,
    "w1": Kind.GATE,
    "up_proj": Kind.UP,
    "v1": Kind.UP,
    "w3": Kind.UP,
    "down_proj": Kind.DOWN,
    "down_projs": Kind.DOWN,
    "w2": Kind.DOWN,
    "w2_weight": Kind.DOWN,
    "shared_w2_weight": Kind.DOWN,
    "fc2": Kind.DOWN,
    "output_linear": Kind.DOWN,
}

# What a tensor of one expert is called.
_SINGLE = {
    "gate_proj": Kind.GATE,
    "w1": Kind.GATE,
    "fc1": Kind.GATE,
    "up_proj": Kind.UP,
    "w3": Kind.UP,
    "v1": Kind.UP,
    "fc3": Kind.UP,
    "down_proj": Kind.DOWN,
    "w2": Kind.DOWN,
    "fc2": Kind.DOWN,
}
_SINGLE_NAME = re.compile(r"(?P<prefix>.*experts(?:\.mlp)?)\.(?P<expert>\d{1,6})\.(?P<leaf>\w+)\.weight")

# DBRX puts the experts of a layer one below the other, so that their tensors have two axes.
_IN_ROWS = tuple(f".experts.mlp.{leaf}{ending}" for leaf in ("w1", "v1", "w2") for ending in ("", ".weight"))

# Blocks of one kind that transformers and the authors of a model call differently.
_FEED_FORWARD = frozenset({"mlp", "ffn", "feed_forward", "block_sparse_moe", "moe", "mixer"})
# Wrappers that a name may have in front, or not.
_WRAPPERS = frozenset(
    {"model", "language_model", "text_model", "transformer", "backbone", "base_model", "llm"}
)


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of stacked experts, by its name.

    Attributes:
        prefix: What the names of its experts begin with, ending in "experts".
        parent: What the names of its neighbours begin with.
        leaf: Its own name, without ".weight".
        kind: Which matrix of each expert it holds.
    """

    prefix: str
    parent: str
    leaf: str
    kind: Kind

    @property
    def speaks_of_experts(self) -> bool:
        """Whether the name itself says that there are experts."""
        return "expert" in self.parent or "moe" in self.parent


@dataclass(frozen=True, slots=True)
class Single:
    """A tensor of one expert, by its name.

    Attributes:
        prefix: What the names of the experts begin with.
        expert: The expert's number.
        leaf: The name of the matrix.
        kind: Which matrix it is.
    """

    prefix: str
    expert: int
    leaf: str
    kind: Kind


def may_be_stacked(tensor: TensorInfo) -> bool:
    """Whether the shape is one that stacked experts can have; nearly all tensors' is not."""
    axes = len(tensor.shape)
    return axes == 3 or (axes == 2 and tensor.name.endswith(_IN_ROWS))


def stacked(name: str) -> Place | None:
    """What a name says of a tensor that may hold many experts; None if it is not one of theirs."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    kind = _STACKED.get(leaf)
    if kind is None or not parent or parent.rpartition(".")[2].isdecimal():
        return None
    prefix = parent.removesuffix(".mlp") if parent.endswith("experts.mlp") else parent
    if not prefix.endswith("experts"):
        prefix += ".experts"
    return Place(prefix, parent, leaf, kind)


@lru_cache(maxsize=16)  # a tensor is asked about once for every role
def single(name: str) -> Single | None:
    """What a name says of a tensor of one expert; None if it is none."""
    match = _SINGLE_NAME.fullmatch(name)
    if match is None or (kind := _SINGLE.get(match["leaf"])) is None:
        return None
    return Single(match["prefix"], int(match["expert"]), match["leaf"], kind)


@lru_cache(maxsize=4096)
def place_key(prefix: str) -> tuple[str, ...]:
    """The same for the experts of one layer, whichever way two checkpoints spell it."""
    parts = prefix.removesuffix(".mlp").split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdecimal()), -1)
    head = [part for part in parts[: numbered + 1] if part not in _WRAPPERS]
    rest = parts[numbered + 1 :]
    if rest and rest[-1] == "experts":
        rest = rest[:-1]
    if not rest or rest[0] in _FEED_FORWARD:
        rest = ["ffn", *rest[1:]]
    return (*head, *rest)
