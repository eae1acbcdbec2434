"""The plan of a whole checkpoint: its files, what stays quantised in them, and what config.json says of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checkpoint.model import Model
from ..pairing.row import Row
from .encoding import Encode, encoded_config, output_rows
from .layout import lay_out
from .operation import Operation
from .pieces import Pieces
from .plan import Plan, build_plan, is_own
from .turned import turned_operation, turned_row, turns

__all__ = ["plan_checkpoint"]


def plan_checkpoint(
    models: Mapping[str, Model],
    rows: Sequence[Row],
    operation: Callable[[Row], Operation | Pieces],
    *,
    host: Model,
    anchor: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | None = None,
    encode: Encode = Encode.ALL,
    config: Mapping[str, Any] | None = None,
    beside: Mapping[str, str] | None = None,
) -> tuple[Plan, Mapping[str, Any] | None]:
    """Says what every tensor of a checkpoint is made of.

    Args:
        models: The models by role.
        rows: One per tensor.
        operation: What makes a row's tensor.
        host: The model that the output is shaped like.
        anchor: As for build_plan; the host's role if it is not given.
        dtype: Output dtype of float tensors.
        max_shard_size: Most bytes per output file, or None.
        encode: What becomes of quantised tensors.
        config: What config.json says in place of the host's, if it is not to be that.
        beside: As Plan has it.

    Returns:
        The plan, and what config.json says in place of the host's, or None.

    Raises:
        PairingError: What operation raises.
        AdapterError: Likewise.
    """
    known = host.config if config is None else config
    made = output_rows(rows, encode, lambda row: not is_own(operation(row), row), host.role, known)
    other = {row.name: row for row in made if turns(row)}

    def making(row: Row) -> Operation | Pieces:
        quantised = other.get(row.name)
        return operation(row) if quantised is None else turned_operation(operation(quantised), quantised)

    written = [turned_row(row) if row.name in other else row for row in made]
    plan = build_plan(
        models,
        lay_out(written, dtype=dtype, max_shard_size=max_shard_size),
        making,
        anchor=host.role if anchor is None else anchor,
        dtype=dtype,
        beside=beside,
    )
    changed = encoded_config(known, made, host.role)
    return plan, config if changed is None else changed
