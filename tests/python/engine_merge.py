"""Merges tensors through the engine alone: checkpoints of one file each, and a plan written by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import DTYPE_NAMES, write_safetensors
from safetensors.torch import load_file

from safemerge_fast import _engine


def stated_files(path: Path) -> dict[str, Any]:
    """The files of a checkpoint as a plan states them."""
    return {file: facts.to_dict() for file, facts in _engine.Checkpoint(path).identity().items()}


def engine_plan(
    directory: Path,
    method: str,
    operands: Sequence[Mapping[str, torch.Tensor]],
    base: Mapping[str, torch.Tensor] | None = None,
    *,
    shared: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
) -> _engine.Plan:
    """Writes the models and makes the plan of `engine_merge`, which the engine validates."""
    directory.mkdir(parents=True, exist_ok=True)
    models = {f"model{number}": tensors for number, tensors in enumerate(operands)}
    if base is not None:
        models["base"] = base
    sources = {}
    for name, tensors in models.items():
        path = directory / name
        path.mkdir(exist_ok=True)
        write_safetensors(path / "model.safetensors", tensors)
        sources[name] = {"path": str(path), "files": stated_files(path)}
    each = each or [{} for _ in operands]
    planned = []
    operations = []
    for name, tensor in operands[0].items():
        merge: dict[str, Any] = {"method": method, "parameters": dict(shared or {}), "operands": []}
        for number, parameters in enumerate(each):
            rest = {key: value for key, value in parameters.items() if key != "weight"}
            entry: dict[str, Any] = {
                "operand": {"source": f"model{number}", "tensor": name},
                "parameters": rest,
            }
            if "weight" in parameters:
                entry["weight"] = parameters["weight"]
            merge["operands"].append(entry)
        if base is not None:
            merge["base"] = {"source": "base", "tensor": name}
        planned.append(
            {
                "name": name,
                "dtype": DTYPE_NAMES[str(dtype or tensor.dtype)],
                "shape": list(tensor.shape),
                "operation": len(operations),
            }
        )
        operations.append({"merge": merge})
    plan = {
        "version": 2,
        "sources": sources,
        "operations": operations,
        "shards": [{"file": "out.safetensors", "tensors": planned}],
    }
    return _engine.Plan(json.dumps(plan))


def engine_merge(
    directory: Path,
    method: str,
    operands: Sequence[Mapping[str, torch.Tensor]],
    base: Mapping[str, torch.Tensor] | None = None,
    *,
    shared: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Merges tensors of equal names.

    Args:
        directory: Where to write inputs and output; made if it is missing, reused if not.
        method: The method.
        operands: The models.
        base: The base model.
        shared: Parameters of the method.
        each: Parameters of each operand, weight among them.
        dtype: Output dtype; the operands' by default.
        **options: Options of Plan.execute.

    Returns:
        The merged tensors by name.
    """
    parsed = engine_plan(directory, method, operands, base, shared=shared, each=each, dtype=dtype)
    # No report tells that an earlier output is this program's, so that it would not be replaced.
    shutil.rmtree(directory / "out", ignore_errors=True)
    output = _engine.JobDirectory(directory / "out", identity="a test")
    parsed.execute(output, **options)
    output.publish()
    merged = load_file(directory / "out" / "out.safetensors")
    checked = parsed.verify(directory / "out")
    assert checked.mismatches == []
    assert checked.bytes_checked == checked.bytes_total
    return merged
