"""One merge at growing sizes: does time grow in proportion to the bytes, and does memory not grow at all?

python benches/ladder.py [--models qwen2.5-0.5b …] [--job linear] [--cache hot cold] [--rounds 3] [--directory DIR]
                         [--keep] [--summary]

Sizes are measured one after another, and each is saved in DIR/ladder.json as soon as it is there: name some of them at
a time, if all take too long. Inputs of a size are removed before the next is made, unless --keep; the 8B step needs
48 GB of disk. Sizes whose inputs do not stay cached are measured cold only. --summary prints what is there already.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import peers
from compare import discard_models, measure
from jobs import JOBS
from results import Comparison, load, save
from shapes import MODELS

STEPS = ["qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.2-3b", "llama-3.1-8b"]


def main() -> None:
    """Measures the sizes that the command line asks for, and prints the ladder as far as it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=STEPS)
    parser.add_argument("--job", choices=JOBS, default="linear")
    parser.add_argument("--cache", nargs="*", choices=["hot", "cold"], default=["hot", "cold"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("target/bench"))
    parser.add_argument("--keep", action="store_true", help="keep the inputs")
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    options = parser.parse_args()
    results = options.directory.resolve() / "ladder.json"
    for model in [] if options.summary else options.models:
        directory = results.parent / model
        settings = argparse.Namespace(
            model=model, rounds=options.rounds, slow_rounds=0, threads=[], peers=[], directory=results.parent
        )
        for state in options.cache:
            if comparison := measure(options.job, state, directory, settings):
                save(results, comparison)
        if not options.keep:
            discard_models(directory)
    print(summary(load(results)))


def summary(comparisons: Sequence[Comparison]) -> str:
    """Returns a Markdown table of all sizes, and a line fitted to each state of the cache."""
    lines = [
        "| model | job | inputs | GB out | median s | s/GB | CPU s/GB | / copy floor | peak MB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    points: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for one in sorted(comparisons, key=lambda one: (one.facts["cache"], one.facts["written_bytes"])):
        ours = one.row(peers.OURS)
        if ours is None:
            continue
        size = one.facts["written_bytes"] / 1e9
        floor = one.row(peers.FLOOR)
        ratio = "–" if floor is None else f"{ours.seconds / floor.seconds:.2f}"
        state, job = one.facts["cache"], one.facts["job"]
        points.setdefault((job, state), []).append((size, ours.seconds, ours.peak_mb))
        lines.append(
            f"| {one.facts['model']} | {job} | {state} | {size:.2f} | {ours.seconds:.2f} "
            f"| {ours.seconds / size:.2f} | {ours.cpu_seconds / size:.2f} | {ratio} | {ours.peak_mb:.0f} |"
        )
    lines.append("")
    for (job, state), found in points.items():
        if len(found) > 1:
            lines.append(f"- {job}, {state}: {_fit(found)}")
    return "\n".join(lines) + "\n"


def _fit(points: Sequence[tuple[float, float, float]]) -> str:
    """Says how straight the line through (GB, seconds) is, and how flat the peaks are."""
    sizes, seconds, peaks = zip(*points, strict=True)
    intercept, slope = line(list(zip(sizes, seconds, strict=True)))
    text = f"{intercept:.2f} s + {slope:.3f} s/GB"
    if len(points) > 2:
        furthest = max(
            abs(intercept + slope * size - second) / second
            for size, second in zip(sizes, seconds, strict=True)
        )
        text += f", no size further off than {furthest:.0%}"
    return f"{text}; peak {min(peaks):.0f} to {max(peaks):.0f} MB"


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fits seconds = intercept + slope · GB to relative errors, so that small sizes count as much as large ones."""
    weights = [second**-2 for _, second in points]
    total = sum(weights)
    size = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    second = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    rise = sum(w * (x - size) * (y - second) for w, (x, y) in zip(weights, points, strict=True))
    slope = rise / sum(w * (x - size) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    return second - slope * size, slope


if __name__ == "__main__":
    main()
