"""What a job costs in bytes, passes and operations, and the seconds that follow from a machine's constants.

python benches/cost_model.py                           the predictions, as Markdown
python benches/cost_model.py --update docs/scaling.md  puts them between that file's markers
python benches/cost_model.py --measure [DIR]           this machine's constants, from what the other scripts saved

The constants lie in machines.json beside this script. docs/scaling.md says what the model assumes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import peers
from ladder import line
from results import load
from shapes import ITEM_BYTES, MODELS, Shapes

MACHINES = Path(__file__).with_name("machines.json")
MARKERS = ("<!-- predictions -->", "<!-- end of predictions -->")
PREDICTED = ["llama-3.1-8b", "llama-3-70b", "llama-3.1-405b", "mixture-1t"]
RANK = 16
# Gaussian columns beside the factors, which estimate ρ_null: analysis/low_rank.py.
PROBES = 16
# Elements of a panel of columns of a tall module: analysis/cosine.py and analysis/blocks.py.
PANEL = 4 * (4 << 20)
LEAST_PANEL = 2048
# As many workers as the engine starts by itself at most.
MOST_WORKERS = 16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The constants of the model; None is not known yet.

    Attributes:
        name: What it is.
        source: Where the constants come from: measured, or assumed and why.
        cores: Processors.
        read_gb_s: Reading files that are not cached.
        write_gb_s: Writing durably, past the page cache.
        startup_s: What a merge takes beside its bytes.
        core_s_per_gb: Processor seconds per GB of a merge's output, all passes together, by job.
        analysis_gb_s: What the analysis reads of cached inputs per second.
        gflops: float32 operations per second of the analysis's products, in thousand millions.
    """

    name: str
    source: str
    cores: int | None = None
    read_gb_s: float | None = None
    write_gb_s: float | None = None
    startup_s: float | None = None
    core_s_per_gb: dict[str, float] | None = None
    analysis_gb_s: float | None = None
    gflops: float | None = None


@dataclass(frozen=True)
class Work:
    """What a job asks of a machine.

    Attributes:
        read: Bytes read from the disk, once each.
        touched: Bytes read from disk or cache, all passes together.
        written: Bytes written.
        flops: Operations of the matrix products.
    """

    read: float
    touched: float
    written: float
    flops: float = 0.0


MERGES = {"linear": (2, 0), "slerp": (2, 1), "ties": (3, 5), "dare_ties": (3, 0)}
"""Models that a merge reads, and observe passes before it blends: at most, as `_engine.methods()` has them.

dare_ties observes only if it rescales by norms, which it does not by default.
"""


def merge_work(shapes: Shapes, job: str) -> Work:
    """What a merge of whole models does."""
    models, passes = MERGES[job]
    return Work(
        read=models * shapes.bytes, touched=(passes + 1) * models * shapes.bytes, written=shapes.bytes
    )


def dense_analysis_work(shapes: Shapes) -> Work:
    """What scores of a full-rank fine-tune take: V from base and aligned, Δ from fine-tuned and aligned."""
    size = sum(ITEM_BYTES * d_out * d_in for d_out, d_in in shapes.projections())
    touched = flops = 0.0
    for d_out, d_in in shapes.projections():
        flops += dense_flops(d_out, d_in)
        touched += ITEM_BYTES * d_out * d_in * (2 * _readings_of_v(d_out, d_in) + 2)
    return Work(read=3 * size, touched=touched, written=0, flops=flops)


def dense_flops(d_out: int, d_in: int) -> float:
    """Operations for one module: the lower half of a Gram matrix, its product with Δ, and for a tall one VᵀΔ."""
    small, large = sorted((d_out, d_in))
    gram, product = small * small * large, 2 * small * small * large
    return gram + product if d_out <= d_in else gram + product + 2 * small**3


def _readings_of_v(d_out: int, d_in: int) -> int:
    """How often V is read: a tall module's VᵀΔ is made in panels, each of which is a pass over V."""
    if d_out <= d_in:
        return 1
    return -(-d_in // max(PANEL // d_in, LEAST_PANEL))


def low_rank_analysis_work(shapes: Shapes, rank: int = RANK) -> Work:
    """What scores of a LoRA adapter take: two passes over V, each with a thin product."""
    elements = sum(d_out * d_in for d_out, d_in in shapes.projections())
    size = ITEM_BYTES * elements
    return Work(read=2 * size, touched=4 * size, written=0, flops=4.0 * elements * (rank + PROBES))


def merge_seconds(work: Work, job: str, machine: Machine) -> float | None:
    """Seconds of a merge whose inputs are not cached: the disk and the processors work at the same time."""
    if (
        machine.read_gb_s is None
        or machine.write_gb_s is None
        or machine.startup_s is None
        or machine.cores is None
        or machine.core_s_per_gb is None
        or job not in machine.core_s_per_gb
    ):
        return None
    disk = work.read / 1e9 / machine.read_gb_s + work.written / 1e9 / machine.write_gb_s
    compute = work.written / 1e9 * machine.core_s_per_gb[job] / min(machine.cores, MOST_WORKERS)
    return machine.startup_s + max(disk, compute)


def analysis_seconds(work: Work, machine: Machine) -> float | None:
    """Seconds of an analysis: reading from the disk overlaps with nothing, as far as is known."""
    if machine.read_gb_s is None or machine.analysis_gb_s is None or machine.gflops is None:
        return None
    cached = max(work.touched - work.read, 0.0)
    return (
        work.read / 1e9 / min(machine.read_gb_s, machine.analysis_gb_s)
        + cached / 1e9 / machine.analysis_gb_s
        + work.flops / 1e9 / machine.gflops
    )


def predictions(machines: Iterable[Machine], models: Sequence[str]) -> str:
    """Returns Markdown: the work of each job on each model, and the time that each machine would take."""
    lines = [
        "| model | job | read GB | all passes GB | written GB | TFLOP |",
        "|---|---|---:|---:|---:|---:|",
    ]
    works = [(model, job, work) for model in models for job, work in _works(MODELS[model]).items()]
    for model, job, work in works:
        lines.append(
            f"| {model} | {job} | {work.read / 1e9:,.1f} | {work.touched / 1e9:,.1f} | {work.written / 1e9:,.1f} "
            f"| {work.flops / 1e12:,.1f} |"
        )
    for machine in machines:
        lines += ["", f"**{machine.name}** ({machine.source})", ""]
        jobs = list(_works(MODELS[models[0]]))
        lines += [f"| model | {' | '.join(jobs)} |", "|---|" + "---:|" * len(jobs)]
        for model in models:
            times = [
                merge_seconds(work, job, machine) if job in MERGES else analysis_seconds(work, machine)
                for job, work in _works(MODELS[model]).items()
            ]
            lines.append(f"| {model} | {' | '.join(map(duration, times))} |")
    return "\n".join(lines)


def _works(shapes: Shapes) -> dict[str, Work]:
    return {
        **{job: merge_work(shapes, job) for job in MERGES},
        "analysis, LoRA": low_rank_analysis_work(shapes),
        "analysis, full rank": dense_analysis_work(shapes),
    }


def duration(seconds: float | None) -> str:
    """Writes a time with two digits and the unit that suits it."""
    if seconds is None:
        return "TODO"
    for size, unit in ((1, "s"), (60, "min"), (3600, "h"), (86400, "d")):
        if seconds < 100 * size or unit == "d":
            break
    return f"{seconds / size:.2g} {unit}"


def measured(directory: Path, name: str) -> Machine:
    """Reads this machine's constants off what was measured; of several models the largest counts.

    Args:
        directory: Where compare.py, adapter.py and ladder.py saved.
        name: How to call the machine.

    Returns:
        The machine, with None for what nobody has measured.
    """
    files = [*directory.glob("*/compare.json"), *directory.glob("*/adapter.json")]
    found = [one for path in files for one in load(path)]
    found.sort(key=lambda one: one.facts["read_bytes"])
    rates: dict[str, float] = {}
    core_s: dict[str, float] = {}
    for one in found:
        job, state = one.facts["job"], one.facts["cache"]
        read, written = one.facts["read_bytes"] / 1e9, one.facts["written_bytes"] / 1e9
        reading, writing, ours = (one.row(row) for row in (peers.READ, peers.WRITE, peers.OURS))
        if reading and state == "cold":
            rates["read_gb_s"] = read / reading.seconds
        if writing:
            rates["write_gb_s"] = written / writing.seconds
        if ours and state == "hot" and job in MERGES:
            core_s[job] = ours.cpu_seconds / written
    for one in found:
        # Reading is a hundredth of a full-rank analysis.
        if one.facts["job"] == "analyze" and (ours := one.row(peers.OURS)):
            work = dense_analysis_work(MODELS[one.facts["model"]])
            rates["gflops"] = work.flops / 1e9 / ours.seconds
    for one in found:
        analysis, imports = one.row("analyze"), one.row("import torch")
        if analysis and imports and "gflops" in rates:
            work = low_rank_analysis_work(MODELS[one.facts["model"]], one.facts["rank"])
            rest = analysis.seconds - imports.seconds - work.flops / 1e9 / rates["gflops"]
            if rest > 0.0:
                rates["analysis_gb_s"] = work.touched / 1e9 / rest
    points = [
        (one.facts["written_bytes"] / 1e9, ours.seconds)
        for one in load(directory / "ladder.json")
        if one.facts["cache"] == "hot" and (ours := one.row(peers.OURS))
    ]
    if len(points) > 1:
        rates["startup_s"] = max(line(points)[0], 0.0)
    return Machine(name=name, source="measured", cores=os.cpu_count(), core_s_per_gb=core_s or None, **rates)


def machines(path: Path) -> list[Machine]:
    """Reads the machines; one without processor costs of its own gets the first one's, core for core."""
    known = [Machine(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    return [
        replace(
            one,
            core_s_per_gb=one.core_s_per_gb or known[0].core_s_per_gb,
            startup_s=known[0].startup_s if one.startup_s is None else one.startup_s,
        )
        for one in known
    ]


def main() -> None:
    """Prints or writes down what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", type=Path, metavar="FILE")
    parser.add_argument("--measure", type=Path, nargs="?", const=Path("target/bench"), metavar="DIR")
    parser.add_argument("--name", default="workstation", help="how to call the machine that was measured")
    options = parser.parse_args()
    if options.measure:
        constants = asdict(measured(options.measure, options.name))
        print(json.dumps(constants, indent=1))
        return
    text = predictions(machines(MACHINES), PREDICTED)
    if options.update is None:
        print(text)
        return
    document = options.update.read_text(encoding="utf-8")
    before, rest = document.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    options.update.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
