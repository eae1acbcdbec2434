"""SafeMERGE of LoRA adapters beside the time that reading base and aligned takes, on a known model's shapes.

python benches/adapter.py [--model qwen2.5-1.5b] [--rank 16] [--rounds 3] [--directory DIR]

The adapters, of random weights, adapt all seven projections. Checkpoints and adapters are made where they are missing.
Results go into DIR/MODEL/adapter.json and adapter.md.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import cache
import peers
from checkpoints import require
from compare import make_model
from results import Comparison, save
from shapes import MODELS
from timing import Competitor, alternate


def main() -> None:
    """Makes the inputs, runs the competitors in turn, prints a table and saves it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-1.5b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("target/bench"))
    options = parser.parse_args()
    directory = (options.directory / options.model).resolve()
    models = [make_model(options.model, directory, name) for name in ("base", "first")]
    competitors = line_up(options.model, options.rank, directory)
    alternate(competitors, options.rounds, functools.partial(cache.warm, models))
    comparison = Comparison.of(
        f"{options.model}: adapters of rank {options.rank} on all seven projections, inputs cached",
        competitors,
        model=options.model,
        job="adapter",
        rank=options.rank,
        cache="hot",
        read_bytes=2 * MODELS[options.model].bytes,
        written_bytes=0,
    )
    save(directory / "adapter.json", comparison)
    print(comparison.table())


def line_up(model: str, rank: int, directory: Path) -> list[Competitor]:
    """Returns the competitors, the one that all are compared with first."""
    base, aligned = directory / "base", directory / "first"
    flags = [("--adapter", str(rank), "--seed", str(seed)) for seed in (0, 1)]
    finetuned = require(model, directory / f"finetuned-lora{rank}", *flags[0])
    safe = require(model, directory / f"safe-lora{rank}", *flags[1])
    roles = ["--base", str(base), "--aligned", str(aligned), "--finetuned", str(finetuned)]
    output, scores = directory / "output", directory / f"scores-lora{rank}.json"
    merge = [*peers.TOOL, "merge", *roles, "--safe", str(safe), "-o", str(output)]
    to_checkpoint = [*merge, "--output-format", "checkpoint"]
    return [
        peers.read_alone([base, aligned], output),
        Competitor("import torch", [sys.executable, "-c", "import torch"], output),
        Competitor("analyze", [*peers.TOOL, "analyze", *roles, "-o", str(scores)], output),
        Competitor("merge to an adapter", merge, output),
        Competitor("merge to a checkpoint", to_checkpoint, output),
        Competitor("merge to a checkpoint, scores reused", [*to_checkpoint, "--scores", str(scores)], output),
        Competitor("copy aligned", ["sh", "-c", f"cp -r '{aligned}' '{output}'"], output),
    ]


if __name__ == "__main__":
    main()
