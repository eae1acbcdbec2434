"""Reads plans as they are written, without the package under test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def operations(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The operation of every output tensor by its name; many share one."""
    return {
        tensor["name"]: plan["operations"][tensor["operation"]]
        for shard in plan["shards"]
        for tensor in shard["tensors"]
    }


def reads(operand: Mapping[str, Any], own_name: str) -> list[tuple[str, str]]:
    """All (source, tensor) that an operand reads; one that names no tensor reads that of the output's name."""
    parts: list[Mapping[str, Any]] = [{"tensor": own_name, **operand}]
    parts += [operand[name] for name in ("rows", "magnitude") if name in operand]
    parts += [product[factor] for product in operand.get("low_rank", ()) for factor in ("a", "b")]
    return [(part["source"], part["tensor"]) for part in parts]


def all_reads(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All (source, tensor) that a plan reads."""
    for name, operation in operations(plan).items():
        merge = operation.get("merge", {})
        operands = [argument["operand"] for argument in merge.get("operands", ())]
        operands += [operation["copy"]] if "copy" in operation else []
        operands += [merge["base"]] if "base" in merge else []
        for operand in operands:
            yield from reads(operand, name)
