"""Whole merges beside mergekit, a careful torch script and the copy floor, on a known model's shapes.

python benches/compare.py [--model qwen2.5-1.5b] [--jobs linear …] [--peers torch mergekit] [--cache hot cold]
                          [--threads 1 2 4] [--rounds 3] [--slow-rounds 1] [--directory DIR] [--discard]

Inputs are made where they are missing. Competitors take turns. Each job and state of the cache is measured and saved by
itself, in DIR/MODEL/compare.json and compare.md, so that a comparison can be made in pieces.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cache
import peers
from checkpoints import require
from jobs import FINETUNED, JOBS
from results import Comparison, save
from shapes import MODELS
from timing import Competitor, alternate

# Merges that only this project knows: SafeMERGE with scores at hand, and the making of scores.
OWN_JOBS = {"safemerge": ["first", "second"], "analyze": ["base", "first", "second"]}


def main() -> None:
    """Runs the jobs that the command line asks for, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-1.5b")
    parser.add_argument("--jobs", nargs="*", choices=[*JOBS, *OWN_JOBS], default=[*JOBS, "safemerge"])
    parser.add_argument("--peers", nargs="*", choices=["torch", "mergekit"], default=["torch", "mergekit"])
    parser.add_argument("--cache", nargs="*", choices=["hot", "cold"], default=["hot", "cold"])
    parser.add_argument("--threads", type=int, nargs="*", default=[], help="ours, also with these counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1, help="in how many of them peers take part")
    parser.add_argument("--directory", type=Path, default=Path("target/bench"))
    parser.add_argument("--discard", action="store_true", help="remove the inputs afterwards")
    options = parser.parse_args()
    directory = (options.directory / options.model).resolve()
    for job in options.jobs:
        for state in options.cache:
            if comparison := measure(job, state, directory, options):
                save(directory / "compare.json", comparison)
                print(comparison.table(), flush=True)
    if options.discard:
        discard_models(directory)


def discard_models(directory: Path) -> None:
    """Removes the inputs that `measure` made."""
    for folder in (*FINETUNED, "sparse"):
        shutil.rmtree(directory / folder, ignore_errors=True)


def measure(job: str, state: str, directory: Path, options: argparse.Namespace) -> Comparison | None:
    """Measures one job with the inputs cached (state "hot") or not ("cold"); None if it cannot be done here."""
    shapes = MODELS[options.model]
    names = JOBS[job].inputs if job in JOBS else OWN_JOBS[job]
    inputs = [directory / name for name in names]
    size = len(inputs) * shapes.bytes
    if state == "hot" and not cache.fits(size):
        print(f"{job}: {size / 1e9:.1f} GB of inputs do not stay cached here; left out", file=sys.stderr)
        return None
    check_room(inputs, shapes.bytes)
    for name in names:
        make_model(options.model, directory, name)
    competitors = line_up(job, inputs, directory, options)
    before = functools.partial(cache.warm if state == "hot" else cache.empty, inputs)
    title = JOBS[job].title if job in JOBS else job
    print(f"{options.model}, {title}, {state}", file=sys.stderr)
    alternate(competitors, options.rounds, before)
    how = "inputs cached" if state == "hot" else cache.how_emptied()
    written = 0 if job == "analyze" else shapes.bytes
    return Comparison.of(
        f"{options.model}: {title}, {how}",
        competitors,
        model=options.model,
        job=job,
        cache=state,
        read_bytes=size,
        written_bytes=written,
    )


def check_room(inputs: Sequence[Path], size: int) -> None:
    """Gives up if there is no room for the inputs that are missing and for one output."""
    directory = inputs[0].parent
    directory.mkdir(parents=True, exist_ok=True)
    missing = sum(not (path / "complete").exists() for path in inputs)
    needed, free = (missing + 1) * size, shutil.disk_usage(directory).free
    if needed > free:
        raise SystemExit(f"{directory} has {free / 1e9:.0f} GB free, but this takes {needed / 1e9:.0f} GB")


def make_model(model: str, directory: Path, name: str) -> Path:
    """Makes one of the inputs, if it is missing."""
    seed = FINETUNED[name]
    return require(model, directory / name, *([] if seed is None else ["--finetune", str(seed)]))


def line_up(
    job: str, inputs: Sequence[Path], directory: Path, options: argparse.Namespace
) -> list[Competitor]:
    """Returns the competitors of a job, the one that all are compared with first."""
    output = directory / "output"
    size = MODELS[options.model].bytes
    if job == "analyze":
        return [peers.read_alone(list(inputs), output), peers.analyze(directory, output)]
    lined_up = [peers.copy_floor(list(inputs), output), peers.read_alone(list(inputs), output)]
    if sys.platform == "linux":
        lined_up.append(peers.write_alone(size, output))
    counts = [None, *options.threads]
    if job == "safemerge":
        scores = make_scores(options.model, directory)
        lined_up += [peers.safemerge(directory, scores, output, threads=count) for count in counts]
    else:
        configuration = directory / f"{job}.yml"
        # JSON is YAML.
        configuration.write_text(json.dumps(JOBS[job].configuration(directory), indent=1), encoding="utf-8")
        lined_up += [peers.ours(configuration, output, threads=count) for count in counts]
        slow = [peers.torch_script(configuration, output)] if "torch" in options.peers else []
        if "mergekit" in options.peers:
            if found := peers.mergekit(configuration, output):
                slow.append(found)
            else:
                print("mergekit is not installed; left out", file=sys.stderr)
        for peer in slow:
            peer.rounds = options.slow_rounds
        lined_up += slow
    for competitor in lined_up:
        if competitor.name != peers.READ:
            competitor.least_bytes = size
    return lined_up


def make_scores(model: str, directory: Path) -> Path:
    """Makes scores of base and aligned models that are holes: with scores at hand, a merge reads neither."""
    scores = directory / "scores.json"
    sparse = require(model, directory / "sparse", "--sparse")
    script = [sys.executable, str(Path(__file__).parent / "scores.py")]
    roles = [str(sparse), str(sparse), str(directory / "first")]
    subprocess.run([*script, *roles, "-o", str(scores)], check=True)
    return scores


if __name__ == "__main__":
    main()
