"""The analysis of a full fine-tune beside the time that reading the three models takes, on a known model's shapes.

python benches/analysis.py [--model qwen2.5-1.5b] [--rounds 3] [--exact] [--threshold 0.35 …] [--directory DIR]

Updates are random and of full rank. `analyze` decides all modules at a threshold; `--exact` lets the exact analysis
take part in one round. Checkpoints are made where they are missing. Results go into DIR/MODEL, analysis.json and
analysis.md.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import cache
import peers
from checkpoints import require
from results import Comparison, save
from shapes import MODELS
from timing import Competitor, alternate

ROLES = {"base": (), "first": (1,), "tuned": (1, 2), "safe": (1, 3)}
"""Seeds of the updates that each model has; "first" is the aligned one."""


def main() -> None:
    """Makes the inputs, runs the competitors in turn, prints a table and saves it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-1.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.35])
    parser.add_argument("--directory", type=Path, default=Path("target/bench"))
    options = parser.parse_args()
    directory = (options.directory / options.model).resolve()
    models = [make(options.model, directory / role, seeds) for role, seeds in ROLES.items()]
    competitors = line_up(directory, options.threshold, exact=options.exact)
    alternate(competitors, options.rounds, functools.partial(cache.warm, models))
    comparison = Comparison.of(
        f"{options.model}: full-rank updates, inputs cached",
        competitors,
        model=options.model,
        job="analysis",
        cache="hot",
        read_bytes=3 * MODELS[options.model].bytes,
        written_bytes=0,
    )
    save(directory / "analysis.json", comparison)
    print(comparison.table())


def make(model: str, directory: Path, seeds: tuple[int, ...]) -> Path:
    """Makes a checkpoint where it is missing."""
    return require(model, directory, *(("--finetune", *map(str, seeds)) if seeds else ()))


def line_up(directory: Path, thresholds: list[float], *, exact: bool) -> list[Competitor]:
    """Returns the competitors, the one that all are compared with first."""
    base, aligned, tuned, safe = (directory / role for role in ROLES)
    roles = ["--base", str(base), "--aligned", str(aligned), "--finetuned", str(tuned)]
    output, scores = directory / "output", directory / "scores-full.json"
    analyze = [*peers.TOOL, "analyze", *roles]
    merge = [*peers.TOOL, "merge", *roles, "--safe", str(safe), "-o", str(output)]
    found = [
        peers.read_alone([base, aligned, tuned], output),
        Competitor("start-up", [sys.executable, "-c", "import safemerge_fast.analysis.sketch"], output),
    ]
    for threshold in thresholds:
        command = [*analyze, "--threshold", str(threshold), "-o", str(scores)]
        found.append(Competitor(f"analyze, τ {threshold:g}", command, output))
    found += [
        Competitor("merge, scores reused", [*merge, "--scores", str(scores)], output),
        Competitor("merge", merge, output),
    ]
    if exact:
        found.append(Competitor("analyze, exact", [*analyze, "--estimator", "exact"], output, rounds=1))
    return found


if __name__ == "__main__":
    main()
