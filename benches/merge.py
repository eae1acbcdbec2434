"""Whole merges beside the copy floor and a careful torch script, on checkpoints with a known model's shapes.

python benches/merge.py [--model qwen2.5-1.5b] [--rounds 3] [--directory DIR] [--cold] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shapes import MODELS, write_checkpoint
from timing import Competitor, alternate, can_drop_caches, copy_floor, drop_caches, machine, save, table, warm

ROLES = ("base", "aligned", "finetuned", "safe")


def main() -> None:
    """Makes the inputs, runs the competitors in turn, prints tables and writes results.json beside them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-1.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("target/bench"))
    parser.add_argument("--cold", action="store_true", help="also with an empty page cache (needs root)")
    parser.add_argument("--threads", type=int, nargs="*", default=[], help="also with these thread counts")
    options = parser.parse_args()
    directory = (options.directory / options.model).resolve()
    models = {role: directory / role for role in ROLES}
    for seed, path in enumerate(models.values()):
        write_checkpoint(path, MODELS[options.model], seed)
    scores = directory / "scores.json"
    tool = str(Path(sys.executable).parent / "safemerge-fast")
    roles = [part for role in ROLES for part in (f"--{role}", str(models[role]))]
    if not scores.exists():
        Competitor("analyze", [tool, "analyze", *roles[:6], "-o", str(scores)], directory / "none").run()

    def ours(name: str, *flags: str) -> Competitor:
        output = directory / "ours"
        return Competitor(
            name, [tool, "merge", *roles, "--scores", str(scores), "-o", str(output), *flags], output
        )

    inputs = [models["finetuned"], models["safe"]]
    floor = copy_floor(inputs, directory / "copy")
    # Every ρ is below 2: all tensors are read twice, blended and written.
    everything = ("--threshold", "2", "--others", "merge")
    competitors = [
        floor,
        ours("ours, every tensor merged", *everything),
        *(ours(f"ours, {n} threads", *everything, "--threads", str(n)) for n in options.threads),
        ours("ours, SafeMERGE with reused scores"),
        Competitor(
            "careful torch script",
            [
                sys.executable,
                str(Path(__file__).parent / "torch_merge.py"),
                *map(str, inputs),
                str(directory / "torch"),
            ],
            directory / "torch",
        ),
    ]
    results = {}
    warm(inputs)
    title = f"{options.model}, inputs cached"
    alternate(competitors, options.rounds, lambda: None)
    results[title] = competitors
    print(machine())
    print(table(title, competitors, floor))
    if options.cold:
        if not can_drop_caches():
            raise SystemExit("--cold needs the right to write /proc/sys/vm/drop_caches")
        cold = [Competitor(one.name, one.command, one.output) for one in competitors[:-1]]
        alternate(cold, options.rounds, drop_caches)
        title = f"{options.model}, caches dropped"
        results[title] = cold
        print(table(title, cold, cold[0]))
    save(directory / "results.json", results)


if __name__ == "__main__":
    main()
