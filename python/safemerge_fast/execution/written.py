"""What happened to the weights of an output, whoever wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from .. import _engine

__all__ = ["Written", "WrittenShard"]


class WrittenShard(msgspec.Struct, frozen=True):
    """What happened to one file of weights.

    Attributes:
        file: Its name.
        bytes_written: Bytes; 0 if it had been committed before.
        seconds: From its first tile to its commit.
        write: "direct", "buffered", or "cloned" from an input of the same bytes.
        resumed: Whether an earlier run had written it.
        nonfinite_inputs: Input tensors, as (name, file), that hold NaN or infinity and were let through.
    """

    file: str
    bytes_written: int
    seconds: float
    write: str
    resumed: bool = False
    nonfinite_inputs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """Weights that were written.

    Attributes:
        shards: What happened to each file.
        bytes_read: Bytes that were read of all models, less those of files that were there already.
        seconds: How long it took.
        survival: Of tensors that were quantised again, by name: ‖Q(W') - W‖ / ‖W' - W‖, what is stored of a change.
        retained: Of the same: ⟨Q(W') - W, W' - W⟩ / ‖W' - W‖², the part of that which lies along the change.
    """

    shards: tuple[WrittenShard, ...]
    bytes_read: int
    seconds: float
    survival: Mapping[str, float] = field(default_factory=dict)
    retained: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Iterable[_engine.ShardFacts], checked: _engine.Plan, seconds: float) -> Written:
        """What the engine says of the shards of a plan."""
        found = list(facts)
        shards = tuple(
            WrittenShard(
                file=fact.file,
                bytes_written=fact.bytes_written,
                seconds=fact.seconds,
                write=fact.write,
                resumed=fact.resumed,
                nonfinite_inputs=tuple((place.tensor, place.path) for place in fact.nonfinite_inputs),
            )
            for fact in found
        )
        resumed = all(fact.resumed for fact in found)
        survival = {name: share for fact in found for name, share in fact.survival.items()}
        retained = {name: share for fact in found for name, share in fact.retained.items()}
        return cls(shards, 0 if resumed else checked.bytes_read, seconds, survival, retained)

    @property
    def bytes_written(self) -> int:
        """Bytes of weights written in this run."""
        return sum(shard.bytes_written for shard in self.shards)

    @property
    def nonfinite(self) -> list[tuple[str, str]]:
        """Input tensors (name, file) that hold NaN or infinity and were let through."""
        return sorted({place for shard in self.shards for place in shard.nonfinite_inputs})
