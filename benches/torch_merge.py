"""What a careful user writes instead: torch and safetensors, shard by shard, tensor by tensor, in float32.

python benches/torch_merge.py CONFIG -o OUTPUT

CONFIG is a mergekit-style configuration of the benchmarks. Inputs are mapped, so that at any time the memory holds one
shard of the output, the pages of its inputs, and a few float32 copies of one tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = Sequence[torch.Tensor]
Parameters = Sequence[dict[str, Any]]


def main() -> None:
    """Merges every shard of the first model with its namesakes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configuration", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    configuration = json.loads(options.configuration.read_text(encoding="utf-8"))
    options.output.mkdir(parents=True, exist_ok=True)
    first = Path(configuration["models"][0]["model"])
    with torch.inference_mode():
        for shard in sorted(first.glob("*.safetensors")):
            save_file(merge_shard(configuration, shard.name), options.output / shard.name, {"format": "pt"})
    for name in ("model.safetensors.index.json", "config.json"):
        shutil.copyfile(first / name, options.output / name)


def merge_shard(configuration: dict[str, Any], file: str) -> dict[str, torch.Tensor]:
    """Merges the tensors of one file."""
    merge = METHODS[configuration["merge_method"]]
    base_path = configuration.get("base_model")
    # Only slerp counts the base among its models.
    entries = [entry for entry in configuration["models"] if entry["model"] != base_path]
    paths = [*([base_path] if base_path else []), *(entry["model"] for entry in entries)]
    each = [entry["parameters"] for entry in entries]
    merged = {}
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(Path(path) / file, "pt")) for path in paths]
        for name in opened[0].keys():  # noqa: SIM118 (safe_open is not iterable)
            tensors = [one.get_tensor(name) for one in opened]
            merged[name] = merge(tensors, each, configuration["parameters"]).to(tensors[0].dtype)
    return merged


def linear(models: Tensors, each: Parameters, shared: dict[str, Any]) -> torch.Tensor:
    """Σ w·x."""
    total = models[0].float().mul_(each[0]["weight"])
    for model, parameters in zip(models[1:], each[1:], strict=True):
        total.add_(model.float(), alpha=parameters["weight"])
    return total


def slerp(models: Tensors, each: Parameters, shared: dict[str, Any]) -> torch.Tensor:
    """Goes the share t of the way from the first to the second along the great circle."""
    first, second = (model.float() for model in models)
    t = shared["t"]
    norms = [float(torch.linalg.vector_norm(one)) for one in (first, second)]
    norms = [norm if norm > 1e-8 else 1.0 for norm in norms]
    dot = float(torch.dot(first.flatten(), second.flatten())) / (norms[0] * norms[1])
    if abs(dot) > 0.9995:
        return first.mul_(1 - t).add_(second, alpha=t)
    angle = math.acos(dot)
    scale = math.sin(angle)
    return first.mul_(math.sin((1 - t) * angle) / scale).add_(second, alpha=math.sin(t * angle) / scale)


def ties(models: Tensors, each: Parameters, shared: dict[str, Any]) -> torch.Tensor:
    """Trims each update to its largest entries, elects signs, and averages what agrees."""
    base, *updates = _updates(models)
    for update, parameters in zip(updates, each, strict=True):
        magnitudes = update.abs().flatten()
        keep = max(1, int(parameters["density"] * magnitudes.numel()))
        # kthvalue is several times as fast on a CPU as topk of half the entries, let alone a sort.
        threshold = magnitudes.kthvalue(magnitudes.numel() - keep + 1).values
        update.masked_fill_(update.abs() < threshold, 0.0)
    return _consensus(base, updates, each, normalize=shared["normalize"])


def dare_ties(models: Tensors, each: Parameters, shared: dict[str, Any]) -> torch.Tensor:
    """Drops entries of each update at random, rescales the others, elects signs, and adds what agrees."""
    base, *updates = _updates(models)
    for update, parameters in zip(updates, each, strict=True):
        kept = torch.empty_like(update).bernoulli_(parameters["density"])
        update.mul_(kept).div_(parameters["density"])
    return _consensus(base, updates, each, normalize=shared["normalize"])


def _updates(models: Tensors) -> list[torch.Tensor]:
    base = models[0].float()
    return [base, *(model.float().sub_(base) for model in models[1:])]


def _consensus(
    base: torch.Tensor, updates: list[torch.Tensor], each: Parameters, *, normalize: bool
) -> torch.Tensor:
    weights = [parameters["weight"] for parameters in each]
    majority = torch.zeros_like(base)
    for update, weight in zip(updates, weights, strict=True):
        majority.add_(update, alpha=weight)
    positive = majority >= 0
    total = majority.zero_()
    divisor = torch.zeros_like(base) if normalize else None
    for update, weight in zip(updates, weights, strict=True):
        agrees = torch.where(positive, update > 0, update < 0)
        total.add_(update.mul_(agrees), alpha=weight)
        if divisor is not None:
            divisor.add_(agrees, alpha=weight)
    if divisor is not None:
        total.div_(divisor.masked_fill_(divisor == 0, 1.0))
    return base.add_(total)


METHODS = {"linear": linear, "slerp": slerp, "ties": ties, "dare_ties": dare_ties}


if __name__ == "__main__":
    main()
