"""Quantised models: FP8 beside as many bytes of BF16, and the tensor count of a model of 10^12 parameters.

python benches/quantised.py [fp8] [kimi] [--model qwen2.5-1.5b] [--rounds 3] [--limit-mb 256] [--directory DIR]

fp8: 0.2 aligned + 0.8 finetuned of every tensor (recipe wise-ft). The FP8 models have twice as many rows in each
projection, in blocks of 128 x 128, so that both have the same bytes; each is quantised again. kimi: Kimi K2's names,
61 layers of 384 experts in INT4 (pack-quantized), with matrices of 32 x 64 in sparse files: what 70,000 quantised
tensors cost that are 210,000 stored ones, where next to no bytes are read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cache
import peers
from checkpoints import BLOCK, require
from results import Comparison, save
from shapes import MODELS
from timing import Competitor, alternate

if TYPE_CHECKING:
    import numpy as np

SIDE = 128
FILE_BYTES = 2_000_000_000
Stored = tuple[str, str, tuple[int, ...]]
ITEMS = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "I32": 4}
LAYERS, EXPERTS, ROWS, COLUMNS = 61, 384, 32, 64


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", choices=["fp8", "kimi"], default=["fp8", "kimi"])
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-1.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-mb", type=int, default=256)
    parser.add_argument("--directory", type=Path, default=Path("target/bench"))
    options = parser.parse_args()
    directory = options.directory.resolve()
    measures = {"fp8": measure_fp8, "kimi": measure_kimi}
    for what in options.what:
        comparison = measures[what](directory, options)
        save(directory / "quantised.json", comparison)
        print(comparison.table(), flush=True)


def measure_fp8(directory: Path, options: argparse.Namespace) -> Comparison:
    """FP8 and BF16 in turn."""
    shapes, place = MODELS[options.model], directory / options.model
    plain = [
        require(options.model, place / "base"),
        require(options.model, place / "first", "--finetune", "1"),
    ]
    quantised = [place / f"fp8-{role}" for role in ("base", "first")]
    for number, role in enumerate(quantised):
        write(
            role,
            list(doubled(options.model)),
            fp8_filling(number),
            {"quant_method": "fp8", "weight_block_size": [SIDE, SIDE]},
        )
    competitors = [
        competitor("BF16", *plain, place / "out-bf16", options.limit_mb),
        competitor(
            "FP8 in blocks of 128 x 128, as many bytes", *quantised, place / "out-fp8", options.limit_mb
        ),
    ]
    alternate(competitors, options.rounds, lambda: cache.warm([*plain, *quantised]))
    return Comparison.of(
        f"{options.model}: wise-ft, every tensor, inputs cached, at most {options.limit_mb} MB",
        competitors,
        model=options.model,
        job="wise-ft",
        cache="hot",
        read_bytes=2 * shapes.bytes,
        written_bytes=shapes.bytes,
    )


def measure_kimi(directory: Path, options: argparse.Namespace) -> Comparison:
    """A merge of 70,000 quantised tensors."""
    roles = [directory / "kimi-k2" / role for role in ("base", "first")]
    for role in roles:
        write(role, list(kimi()), None, {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    ours = competitor("safemerge-fast", *roles, directory / "kimi-k2" / "out", None)
    alternate([ours], options.rounds, os.sync)
    tensors = sum(1 for name, _, _ in kimi() if not name.endswith(("_scale", "_shape")))
    return Comparison.of(
        f"Kimi K2's {tensors} tensors, small, in holes: wise-ft, every tensor",
        [ours],
        model="kimi-k2",
        job="wise-ft",
        cache="holes",
        tensors=tensors,
    )


def competitor(name: str, aligned: Path, finetuned: Path, output: Path, limit_mb: int | None) -> Competitor:
    """A merge of every tensor by our own command."""
    document = {
        "recipe": "wise-ft",
        "aligned": str(aligned),
        "finetuned": str(finetuned),
        "alpha": 0.2,
        "force": True,
    }
    config = output.with_suffix(".yml")
    config.write_text(json.dumps(document))
    command = [
        sys.executable,
        "-m",
        "safemerge_fast",
        "run",
        str(config),
        "-o",
        str(output),
        "--overwrite",
        "-q",
    ]
    return Competitor(name if name != "safemerge-fast" else peers.OURS, command, output, limit_mb=limit_mb)


def doubled(model: str) -> Iterator[Stored]:
    """The tensors of a model whose projections are FP8 and have twice as many rows."""
    for name, shape in MODELS[model].tensors():
        if len(shape) == 2 and "_proj" in name:
            rows, columns = 2 * shape[0], shape[1]
            yield name, "F8_E4M3", (rows, columns)
            yield f"{name}_scale_inv", "F32", (-(-rows // SIDE), -(-columns // SIDE))
        else:
            yield name, "BF16", shape


def kimi() -> Iterator[Stored]:
    """Kimi K2's names, with small matrices."""
    prefix = "language_model.model"
    yield f"{prefix}.embed_tokens.weight", "BF16", (4 * COLUMNS, COLUMNS)
    for layer in range(LAYERS):
        inside = f"{prefix}.layers.{layer}"
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            yield f"{inside}.self_attn.{name}.weight", "BF16", (ROWS, COLUMNS)
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                module = f"{inside}.mlp.experts.{expert}.{name}"
                yield f"{module}.weight_packed", "I32", (ROWS, COLUMNS // 8)
                yield f"{module}.weight_scale", "BF16", (ROWS, COLUMNS // 32)
        yield f"{inside}.mlp.gate.weight", "BF16", (EXPERTS, COLUMNS)
        yield f"{inside}.input_layernorm.weight", "BF16", (COLUMNS,)
        yield f"{inside}.post_attention_layernorm.weight", "BF16", (COLUMNS,)
    yield f"{prefix}.norm.weight", "BF16", (COLUMNS,)


def fp8_filling(seed: int) -> np.ndarray:
    """Random bytes: codes but no NaN; as BF16 numbers of usual size, and as F32 small positive ones."""
    import numpy as np

    values = np.random.default_rng(seed).integers(0, 1 << 8, BLOCK, dtype=np.uint8)
    return (values & 0x3B) | 0x20


def write(
    directory: Path, tensors: list[Stored], filling: np.ndarray | None, quantization: dict[str, object]
) -> None:
    """Writes a checkpoint where it is missing: tensors filled from consecutive bytes, or holes."""
    if (directory / "complete").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    groups: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if size > FILE_BYTES or len(groups[-1]) >= 4000:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += stored_bytes(tensor)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weight_map.update({name: file for name, _, _ in group})
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in group:
            name, dtype, shape = tensor
            start, end = end, end + stored_bytes(tensor)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            if filling is None:
                opened.truncate(opened.tell() + end)
                continue
            for name, dtype, shape in group:
                left = stored_bytes((name, dtype, shape))
                while left:
                    part = filling[:left]
                    part.tofile(opened)
                    left -= part.size
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text(
        json.dumps({"dtype": "bfloat16", "quantization_config": quantization})
    )
    (directory / "complete").touch()


def stored_bytes(tensor: Stored) -> int:
    """Bytes of a tensor."""
    _, dtype, shape = tensor
    size = ITEMS[dtype]
    for extent in shape:
        size *= extent
    return size


if __name__ == "__main__":
    main()
