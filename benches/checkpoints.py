"""Writes checkpoints and adapters with a known model's shapes, without torch and faster than a disk takes them.

python benches/checkpoints.py MODEL DIRECTORY                 random weights, N(0, 0.02²) in bfloat16
python benches/checkpoints.py MODEL DIRECTORY --finetune N …  the same plus updates, each N(0, 0.001²), of these seeds
python benches/checkpoints.py MODEL DIRECTORY --sparse        holes, which read as zeros and take no room
python benches/checkpoints.py MODEL DIRECTORY --adapter R     a float32 LoRA adapter of all projections, rank R

Programs call `require` instead: it leaves alone what is there already, and makes the rest in a process of its own,
since the memory of a parent counts in its children's peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shapes import ITEM_BYTES, MODELS, Shapes, Tensor, tensor_bytes

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 24  # elements of random data, reused from another offset for every file


def require(model: str, directory: Path, *kind: str) -> Path:
    """Makes a checkpoint or an adapter where it is missing.

    Args:
        model: Key of MODELS.
        directory: Where it lies, or shall.
        kind: Flags of this script.

    Returns:
        The directory.
    """
    if not (directory / "complete").exists():
        subprocess.run([sys.executable, __file__, model, str(directory), *kind], check=True)
    return directory


def main() -> None:
    """Writes what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("directory", type=Path)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--finetune", type=int, nargs="+", default=[], metavar="SEED")
    kind.add_argument("--sparse", action="store_true")
    kind.add_argument("--adapter", type=int, metavar="RANK")
    parser.add_argument("--seed", type=int, default=0, help="of an adapter")
    options = parser.parse_args()
    shapes, directory = MODELS[options.model], options.directory
    directory.mkdir(parents=True, exist_ok=True)
    if options.adapter is not None:
        write_adapter(directory, shapes, options.adapter, options.seed)
    else:
        write_checkpoint(directory, shapes, None if options.sparse else weights(options.finetune))
    (directory / "complete").touch()


def weights(finetune: Sequence[int]) -> np.ndarray:
    """Returns BLOCK values as bfloat16 bits: the base model's, with an update of each seed added to each."""
    import numpy as np

    values = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32)
    values *= np.float32(0.02)
    values = (_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    for seed in finetune:
        update = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
        update *= np.float32(1e-3)
        values += update
    return _bfloat16(values)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds finite float32 values to bfloat16, to nearest even."""
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_checkpoint(directory: Path, shapes: Shapes, block: np.ndarray | None) -> None:
    """Writes all files of a checkpoint: its tensors filled from consecutive values of `block`, or holes."""
    weight_map = {}
    for number, (file, tensors) in enumerate(shapes.files()):
        weight_map.update(dict.fromkeys((name for name, _ in tensors), file))
        with (directory / file).open("wb") as opened:
            opened.write(_header(tensors))
            left = sum(tensor_bytes(shape) for _, shape in tensors)
            if block is None:
                opened.truncate(opened.tell() + left)
                continue
            left //= ITEM_BYTES
            place = number * 7919 % BLOCK
            while left:
                part = block[place : place + left]
                part.tofile(opened)
                left, place = left - part.size, 0
    index = {"metadata": {"total_size": shapes.bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(shapes.config()))


def _header(tensors: list[Tensor], dtype: str = "BF16", item: int = ITEM_BYTES) -> bytes:
    """The length and the text that a safetensors file begins with."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + tensor_bytes(shape) // ITEM_BYTES * item
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_adapter(directory: Path, shapes: Shapes, rank: int, seed: int) -> None:
    """Writes an adapter of random factors, as PEFT lays it out."""
    import numpy as np

    generator = np.random.default_rng(seed)
    factors: list[Tensor] = []
    for name, shape in shapes.tensors():
        if len(shape) == 2 and name.endswith("_proj.weight"):
            module = "base_model.model." + name.removesuffix(".weight")
            factors.append((f"{module}.lora_A.weight", (rank, shape[1])))
            factors.append((f"{module}.lora_B.weight", (shape[0], rank)))
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(_header(factors, "F32", 4))
        for _, size in factors:
            values = generator.standard_normal(size, dtype=np.float32) * np.float32(0.02)
            values.tofile(file)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
