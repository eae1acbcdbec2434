"""Which tensors of a checkpoint are in which decoder layer, and on which side of the layers the others are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...pairing.modules import decoder_layers, layer_of

__all__ = ["Stack", "find_stack", "follows_layers", "share"]

# Towers beside the language model, whose layers are none of it.
_TOWER = re.compile(r"vision|visual|image|audio|speech|(^|\.)mtp")
# The last norm and the head, with its bias.
_FOLLOWS = re.compile(r"^(.*norm(_f)?|ln_f|lm_head|embed_out|score|classifier|output|project_out)$")
_PRECEDES = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe)\.")


@dataclass(frozen=True, slots=True)
class Stack:
    """The decoder layers of a checkpoint.

    Attributes:
        prefix: What names of tensors in it begin with, e.g. "model.layers."; the layer's number follows.
        count: How many layers there are.
    """

    prefix: str
    count: int

    def layer(self, name: str) -> int | None:
        """The layer that a tensor is in, or None for what is no part of the stack."""
        number, dot, _ = name.removeprefix(self.prefix).partition(".")
        if not name.startswith(self.prefix) or not dot or not number.isdecimal():
            return None
        # Past the last layer lie those that predict further tokens.
        return int(number) if int(number) < self.count else None

    def tail(self, name: str) -> str:
        """What follows the layer's number in the name of a tensor of the stack."""
        return name.removeprefix(self.prefix).partition(".")[2]

    def renamed(self, name: str, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.prefix}{layer}.{self.tail(name)}"

    def place(self, name: str) -> float:
        """The layer's place from 0 to 1; what is outside the layers is at 0, as with mergekit."""
        layer = self.layer(name)
        return 0.0 if layer is None else share(layer, self.count)


def share(index: int, count: int) -> float:
    """The place of one of several layers, from 0 to 1; a single one is at 1, as with mergekit."""
    return index / (count - 1) if count > 1 else 1.0


def find_stack(names: Iterable[str], config: Mapping[str, Any]) -> Stack | None:
    """Finds the decoder layers: the only numbered modules that there are as many of as config.json says.

    Args:
        names: Names of all tensors.
        config: The configuration; without one all numbered modules count.

    Returns:
        The layers, or None if there are none, or several that may be meant.
    """
    indices: dict[str, set[int]] = {}
    for name in names:
        if (layer := layer_of(name)) is not None and not _TOWER.search(name):
            prefix, _, number = layer.rpartition(".")
            indices.setdefault(f"{prefix}.", set()).add(int(number))
    stated = decoder_layers(config) or _other_count(config)
    stacks = [
        Stack(prefix, stated or len(found))
        for prefix, found in indices.items()
        if found >= set(range(stated or len(found)))
    ]
    return stacks[0] if len(stacks) == 1 else None


def follows_layers(name: str) -> bool:
    """Whether a tensor outside the layers comes after them: the last norm, and the head."""
    module = name.rpartition(".")[0] or name
    return _PRECEDES.search(name) is None and _FOLLOWS.match(module.rpartition(".")[2]) is not None


def _other_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers where a configuration calls it something else than num_hidden_layers."""
    for key in ("n_layer", "num_layers", "n_layers"):
        if isinstance(count := config.get(key), int) and not isinstance(count, bool) and count > 0:
            return count
    return None
