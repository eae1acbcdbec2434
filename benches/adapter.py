"""SafeMERGE of LoRA adapters beside the time that reading base and aligned takes, on a known model's shapes.

python benches/adapter.py [--model qwen2.5-1.5b] [--rank 16] [--rounds 3] [--directory DIR]

The adapters, of random weights, adapt all seven projections. Checkpoints and adapters are made where they are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from shapes import MODELS, Shapes, write_checkpoint
from timing import Competitor, alternate, machine, save, table, warm

PREFIX = "base_model.model."


def main() -> None:
    """Makes the inputs, runs the competitors in turn, prints a table and writes adapter.json beside the inputs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-1.5b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("target/bench"))
    options = parser.parse_args()
    directory = (options.directory / options.model).resolve()
    shapes = MODELS[options.model]
    base, aligned = directory / "base", directory / "aligned"
    for seed, path in enumerate((base, aligned)):
        write_checkpoint(path, shapes, seed)
    adapters = {role: directory / f"{role}-lora{options.rank}" for role in ("finetuned", "safe")}
    for seed, path in enumerate(adapters.values()):
        write_adapter(path, shapes, options.rank, seed)

    tool = str(Path(sys.executable).parent / "safemerge-fast")
    roles = ["--base", str(base), "--aligned", str(aligned), "--finetuned", str(adapters["finetuned"])]
    both = [*roles, "--safe", str(adapters["safe"])]
    output = directory / "ours"
    scores = directory / f"scores-lora{options.rank}.json"
    floor = Competitor(
        "cat base and aligned",
        ["sh", "-c", f"cat '{base}'/*.safetensors '{aligned}'/*.safetensors >/dev/null"],
        directory / "none",
    )
    competitors = [
        floor,
        Competitor("import torch", [sys.executable, "-c", "import torch"], directory / "none"),
        Competitor("analyze", [tool, "analyze", *roles, "-o", str(scores)], directory / "none"),
        Competitor("merge to an adapter", [tool, "merge", *both, "-o", str(output)], output),
        Competitor(
            "merge to a checkpoint",
            [tool, "merge", *both, "--output-format", "checkpoint", "-o", str(output)],
            output,
        ),
        Competitor(
            "merge to a checkpoint, scores reused",
            [
                tool,
                "merge",
                *both,
                "--output-format",
                "checkpoint",
                "--scores",
                str(scores),
                "-o",
                str(output),
            ],
            output,
        ),
        Competitor(
            "copy aligned durably",
            ["sh", "-c", f"cp -r '{aligned}' '{output}' && sync '{output}'/*"],
            output,
        ),
    ]
    warm([base, aligned])
    alternate(competitors, options.rounds, lambda: None)
    title = f"{options.model}, rank {options.rank} on all seven projections, inputs cached"
    print(machine())
    print(table(title, competitors, floor))
    save(directory / "adapter.json", {title: competitors})


def write_adapter(directory: Path, shapes: Shapes, rank: int, seed: int) -> None:
    """Writes a float32 adapter of all projections, as PEFT does. An existing one is left alone."""
    done = directory / "adapter_config.json"
    if done.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    factors = []
    end = 0
    for name, shape in shapes.tensors():
        if not name.endswith("_proj.weight"):
            continue
        module = PREFIX + name.removesuffix(".weight")
        for factor, size in (("lora_A", (rank, shape[1])), ("lora_B", (shape[0], rank))):
            values = generator.standard_normal(size, dtype=np.float32) * np.float32(0.02)
            start, end = end, end + values.nbytes
            header[f"{module}.{factor}.weight"] = {
                "dtype": "F32",
                "shape": list(size),
                "data_offsets": [start, end],
            }
            factors.append(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in factors:
            values.tofile(file)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    done.write_text(json.dumps(config))


if __name__ == "__main__":
    main()
