"""A whole job on models made on the spot: a small Llama quartet is written, analysed, merged and verified.

The weights are random, but their differences are what a merge meets in earnest: alignment and fine-tuning
change each matrix by a few directions plus noise, and the update of some matrices has left the directions of
alignment.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutputError
from .progress import ProgressCallback
from .recipes.run import carry_out
from .recipes.safemerge.scoring import analyze_settings
from .recipes.safemerge.settings import AnalysisSettings, SafemergeSettings
from .recipes.verify import VerifyReport, VerifySettings, verify_output
from .report.report import Report

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["Demo", "make_quartet", "run_demo"]

_HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS, _KEY_VALUE_HEADS, _VOCABULARY = 256, 704, 4, 4, 2, 4096
_SHARDS = 3

CONFIGURATION = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": _HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": _INTERMEDIATE,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": _HEADS,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": _KEY_VALUE_HEADS,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": _VOCABULARY,
}
"""config.json of every model of the quartet."""

# ‖V‖/‖W‖, ‖Δ‖/‖V‖ and the share of noise in V. V must stand well above bfloat16's rounding, 0.2 % of W.
_TASK, _UPDATE, _NOISE = 0.05, 0.6, 0.2
_RANK = 12


@dataclass(frozen=True, slots=True)
class Demo:
    """A finished demonstration.

    Attributes:
        directory: Where base, aligned, finetuned, safe, scores.json and merged lie.
        report: The merge's report.
        verification: The verification's report.
        seconds: Seconds by step: "make", "analyze", "merge", "verify".
    """

    directory: Path
    report: Report
    verification: VerifyReport
    seconds: dict[str, float]


def run_demo(directory: str | os.PathLike[str], progress: ProgressCallback | None = None) -> Demo:
    """Makes a quartet, analyses it, merges it with the default settings and verifies the output.

    Args:
        directory: Where to; must be new or empty.
        progress: Called with the ProgressEvents of all steps.

    Returns:
        What happened.

    Raises:
        OutputError: The directory holds something or cannot be written.
    """
    directory = Path(directory).expanduser()
    clock = [time.perf_counter()]
    models = make_quartet(directory)
    clock.append(time.perf_counter())
    scores = directory / "scores.json"
    base, aligned, finetuned, safe = (str(path) for path in models.values())
    found = analyze_settings(AnalysisSettings(base, aligned, finetuned, progress=progress))
    scores.write_text(found.to_json(), encoding="utf-8")
    clock.append(time.perf_counter())
    merged = directory / "merged"
    report = carry_out(
        SafemergeSettings(
            base, aligned, finetuned, safe, output=str(merged), scores=str(scores), progress=progress
        )
    )
    clock.append(time.perf_counter())
    verification = verify_output(VerifySettings(output=str(merged), progress=progress))
    clock.append(time.perf_counter())
    seconds = [stop - start for start, stop in pairwise(clock)]
    return Demo(
        directory=directory,
        report=report,
        verification=verification,
        seconds=dict(zip(("make", "analyze", "merge", "verify"), seconds, strict=True)),
    )


def make_quartet(directory: Path, seed: int = 0) -> dict[str, Path]:
    """Writes four Llama checkpoints of 8 MB that transformers loads, three shards each.

    Args:
        directory: Where to; must be new or empty. Each model gets a directory of its role's name.
        seed: Seed of all random numbers.

    Returns:
        The directory of each role.

    Raises:
        OutputError: The directory holds something or cannot be written.
    """
    import torch

    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise OutputError(f"{directory} is not empty; name a new directory with -o")
        generator = torch.Generator().manual_seed(seed)
        models: dict[str, dict[str, Tensor]] = {role: {} for role in ("base", "aligned", "finetuned", "safe")}
        for name, shape in _shapes().items():
            versions = _matrix(name, shape, generator) if len(shape) == 2 else _vector(shape, generator)
            for role, tensors in models.items():
                tensors[name] = versions[role].to(torch.bfloat16)
        for role, tensors in models.items():
            _write_checkpoint(directory / role, tensors)
    except OSError as error:
        raise OutputError(f"cannot write the demo to {directory}: {error.strerror}") from error
    return {role: directory / role for role in models}


def _shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, in the order of the files. The head is tied to the embedding."""
    key_value = _HIDDEN // _HEADS * _KEY_VALUE_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (_HIDDEN, _HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (key_value, _HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (key_value, _HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (_HIDDEN, _HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": (_INTERMEDIATE, _HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (_INTERMEDIATE, _HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (_HIDDEN, _INTERMEDIATE),
            f"{prefix}.input_layernorm.weight": (_HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (_HIDDEN,),
        }
    shapes["model.norm.weight"] = (_HIDDEN,)
    return shapes


def _has_left(name: str) -> bool:
    """Whether fine-tuning pushes the module out of the safety subspace: some of the later layers."""
    parts = name.split(".")
    if parts[1] != "layers":
        return False
    layer, module = int(parts[2]), parts[4]
    return (module in ("v_proj", "down_proj") and layer >= 1) or (module == "o_proj" and layer >= _LAYERS - 2)


def _matrix(name: str, shape: tuple[int, ...], generator: Generator) -> dict[str, Tensor]:
    """All versions of one weight matrix, float32.

    With U an orthonormal basis of the directions of alignment, an update a·(inside U) + √(1-a²)·(outside) of
    norm 1 has ρ ≈ a, because V Vᵀ is nearly a multiple of the identity on U and nearly zero beside it.
    """
    import torch

    rows, columns = shape

    def gauss(*size: int) -> Tensor:
        numbers: Tensor = torch.randn(*size, generator=generator)
        return numbers

    def unit(matrix: Tensor) -> Tensor:
        return matrix / float(torch.linalg.norm(matrix))

    base = 0.02 * gauss(rows, columns)
    task = _TASK * float(torch.linalg.norm(base))
    directions = torch.linalg.qr(gauss(rows, _RANK)).Q
    inside = directions @ torch.linalg.qr(gauss(columns, _RANK)).Q.T
    v = task * unit(unit(inside) + _NOISE * unit(gauss(rows, columns)))
    outside = gauss(rows, _RANK) @ gauss(_RANK, columns)
    outside -= directions @ (directions.T @ outside)
    drawn = float(torch.rand((), generator=generator))
    share = 0.08 + 0.2 * drawn if _has_left(name) else 0.45 + 0.45 * drawn
    along = unit(directions @ gauss(_RANK, columns))
    update = _UPDATE * task * (share * along + math.sqrt(1 - share**2) * unit(outside))
    safe = 0.3 * task * unit(directions @ gauss(_RANK, columns))
    return {
        "base": base,
        "aligned": base + v,
        "finetuned": base + v + update,
        "safe": base + v + safe,
    }


def _vector(shape: tuple[int, ...], generator: Generator) -> dict[str, Tensor]:
    """All versions of one norm's weights, float32: ones and small changes."""
    import torch

    base = 1 + 0.02 * torch.randn(*shape, generator=generator)
    changes = 0.01 * torch.randn(3, *shape, generator=generator)
    aligned = base + changes[0]
    return {"base": base, "aligned": aligned, "finetuned": aligned + changes[1], "safe": aligned + changes[2]}


def _write_checkpoint(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Writes shards of like size, the index and config.json."""
    from safetensors.torch import save_file

    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(_SHARDS)]
    done = 0
    for name, tensor in tensors.items():
        shards[done * _SHARDS // total][name] = tensor
        done += tensor.nbytes
    directory.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{_SHARDS:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", CONFIGURATION)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
