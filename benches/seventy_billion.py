"""Llama-3-70B's real shapes through the public API, on a disk that holds two of its thirty shards.

python benches/seventy_billion.py [--models llama-3.1-8b llama-3-70b] [--rounds 1] [--limit-mb 256] [--directory DIR]

Inputs are sparse files: real headers, real index, and holes, which read as zeros and come from no disk. So reading is
cheaper than it would be, and the same is done with 8B beside it. Every tensor of finetuned and safe is merged, with
scores at hand; the output is written for real, and a shard is removed as soon as it is committed. The process can
allocate no more than the limit (RLIMIT_DATA), and is killed once its resident memory, the pages of mapped inputs
included, has ever been above it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peers
from checkpoints import require
from ladder import summary
from results import Comparison, load, save
from shapes import MODELS, tensor_bytes
from timing import Competitor, alternate

ROLES = ("base", "aligned", "finetuned", "safe")


def main() -> None:
    """Merges the models that the command line names, and prints the ladder with them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["llama-3.1-8b", "llama-3-70b"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit-mb", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--directory", type=Path, default=Path("target/bench"))
    options = parser.parse_args()
    results = options.directory.resolve() / "ladder.json"
    for model in options.models:
        save(results, measure(model, results.parent / model / "sparse-roles", options))
    print(summary(load(results)))


def measure(model: str, directory: Path, options: argparse.Namespace) -> Comparison:
    """Merges one model as often as asked for."""
    shapes = MODELS[model]
    largest = max(sum(tensor_bytes(shape) for _, shape in tensors) for _, tensors in shapes.files())
    directory.mkdir(parents=True, exist_ok=True)
    # The one being written, the one just committed, and some room.
    if shutil.disk_usage(directory).free < 3 * largest:
        raise SystemExit(f"{directory} needs {3 * largest / 1e9:.0f} GB free")
    roles = [require(model, directory / role, "--sparse") for role in ROLES]
    scores, facts = directory / "scores.json", directory / "facts.json"
    here = Path(__file__).parent
    script = [sys.executable, str(here / "scores.py"), *map(str, roles[:3])]
    subprocess.run([*script, "-o", str(scores), "--rho", "0"], check=True)
    output = directory / "output"
    command = [sys.executable, str(here / "merge_and_discard.py"), *map(str, roles)]
    command += ["--scores", str(scores), "-o", str(output), "--facts", str(facts)]
    if options.threads:
        command += ["--threads", str(options.threads)]
    competitor = Competitor(
        peers.OURS,
        command,
        output,
        limit_mb=options.limit_mb,
        # numpy's BLAS would set aside memory for each processor, and does nothing here.
        environment={"OPENBLAS_NUM_THREADS": "1"},
    )
    print(f"{model}, sparse", file=sys.stderr)
    alternate([competitor], options.rounds, os.sync)
    found = json.loads(facts.read_text(encoding="utf-8"))
    check(found, model)
    return Comparison.of(
        f"{model}: linear, every tensor, inputs are holes, at most {options.limit_mb} MB",
        [competitor],
        model=model,
        job="linear",
        cache="holes",
        read_bytes=2 * shapes.bytes,
        written_bytes=shapes.bytes,
        merge=found,
    )


def check(facts: dict[str, object], model: str) -> None:
    """Makes sure that everything was merged and written, and that torch had no part in it."""
    shapes = MODELS[model]
    expected = {
        "shards": len(shapes.files()),
        "merged": sum(1 for _ in shapes.tensors()),
        "torch": False,
    }
    wrong = {name: facts[name] for name, value in expected.items() if facts[name] != value}
    written = facts["bytes_written"]
    if wrong or not isinstance(written, int) or written < shapes.bytes:
        raise SystemExit(f"{model} should have given {expected} and {shapes.bytes} bytes, not {facts}")


if __name__ == "__main__":
    main()
