"""Reads what a plan says of each tensor, with what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def planned_operations(output: str | Path) -> dict[str, dict[str, Any]]:
    """The operation of every tensor of an output by name; operands that name no tensor name it."""
    plan = json.loads((Path(output) / "safemerge_plan.json").read_text())
    found = {}
    for shard in plan["shards"]:
        for tensor in shard["tensors"]:
            # Entries are shared, so that each tensor gets a copy of its own.
            operation = json.loads(json.dumps(plan["operations"][tensor["operation"]]))
            merge = operation.get("merge", {})
            operands = [weighted["operand"] for weighted in merge.get("operands", ())]
            operands += [operation["copy"]] if "copy" in operation else []
            operands += [merge["base"]] if "base" in merge else []
            for operand in operands:
                operand.setdefault("tensor", tensor["name"])
            found[tensor["name"]] = operation
    return found
