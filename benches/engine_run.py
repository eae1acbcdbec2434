"""Runs a mergekit-style configuration of the benchmarks through the engine, as a process of its own.

python benches/engine_run.py CONFIG -o OUTPUT [--threads N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safemerge_fast import _engine


def main() -> None:
    """Makes a plan of the configuration and executes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configuration", type=Path)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    configuration = json.loads(options.configuration.read_text(encoding="utf-8"))
    plan = _engine.Plan(json.dumps(make_plan(configuration)))
    first = Path(configuration["models"][0]["model"])
    output = _engine.Output(options.output)
    plan.execute(output, threads=options.threads)
    for name in ("model.safetensors.index.json", "config.json"):
        output.copy_file(first / name, name)
    output.finish()


def make_plan(configuration: dict[str, Any]) -> dict[str, Any]:
    """Says of every tensor of the first model how it is merged; files stay that model's."""
    base = configuration.get("base_model")
    entries = configuration["models"]
    paths = dict.fromkeys([*([base] if base else []), *(entry["model"] for entry in entries)])
    checkpoints = {path: _engine.Checkpoint(path) for path in paths}
    sources = {
        path: {"path": path, "files": checkpoint.identity()} for path, checkpoint in checkpoints.items()
    }
    # Only slerp counts the base among its models.
    merged = [entry for entry in entries if entry["model"] != base]
    shards: dict[str, list[dict[str, Any]]] = {}
    for tensor in checkpoints[entries[0]["model"]].tensors:
        merge: dict[str, Any] = {
            "method": configuration["merge_method"],
            "parameters": configuration["parameters"],
            "operands": [_operand(entry, tensor.name) for entry in merged],
        }
        if base:
            merge["base"] = {"source": base, "tensor": tensor.name}
        planned = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "merge": merge}
        shards.setdefault(tensor.file, []).append(planned)
    return {
        "version": 1,
        "sources": sources,
        "shards": [
            {"file": file, "metadata": {"format": "pt"}, "tensors": shards[file]} for file in sorted(shards)
        ],
    }


def _operand(entry: dict[str, Any], name: str) -> dict[str, Any]:
    parameters = dict(entry["parameters"])
    operand: dict[str, Any] = {"operand": {"source": entry["model"], "tensor": name}}
    if "weight" in parameters:
        operand["weight"] = parameters.pop("weight")
    return {**operand, "parameters": parameters}


if __name__ == "__main__":
    main()
