"""Whole commands, timed from outside: seconds and peak memory, quoted as medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass
class Competitor:
    """A command and what the runs of it measured."""

    name: str
    command: list[str]
    output: Path
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Runs the command once, into a fresh output directory."""
        shutil.rmtree(self.output, ignore_errors=True)
        started = time.perf_counter()
        with subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            complaint = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{self.name} failed with {process.returncode}: {complaint.decode()[-2000:]}")
        self.seconds.append(time.perf_counter() - started)
        self.peak_mb.append(usage.ru_maxrss / 1024)
        shutil.rmtree(self.output, ignore_errors=True)


def copy_floor(inputs: list[Path], output: Path) -> Competitor:
    """Reads the inputs once and copies one of them durably: no merge through the cache beats that."""
    reads = " ".join(f"'{path}'/*.safetensors" for path in inputs)
    script = f"cat {reads} >/dev/null && cp -r '{inputs[0]}' '{output}' && sync '{output}'/*"
    return Competitor("copy floor (cat inputs, cp one, sync)", ["sh", "-c", script], output)


def warm(paths: list[Path]) -> None:
    """Reads files so that they are cached."""
    for path in paths:
        for file in path.glob("*.safetensors"):
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass


def drop_caches() -> None:
    """Empties the page cache; needs the right to do so."""
    os.sync()
    DROP_CACHES.write_text("3")


def can_drop_caches() -> bool:
    """Tells whether drop_caches would work."""
    return os.access(DROP_CACHES, os.W_OK)


def alternate(competitors: list[Competitor], rounds: int, before: Callable[[], None]) -> None:
    """Runs all competitors in turn, `rounds` times, calling `before` ahead of each run."""
    for _ in range(rounds):
        for competitor in competitors:
            before()
            competitor.run()


def table(title: str, competitors: list[Competitor], reference: Competitor) -> str:
    """Returns a Markdown table: medians, spread, ratios of medians to the reference, peak memory."""
    base = statistics.median(reference.seconds)
    lines = [
        f"### {title}",
        "",
        f"| | median s | min–max s | / {reference.name.split(' (')[0]} | peak MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in competitors:
        median = statistics.median(one.seconds)
        lines.append(
            f"| {one.name} | {median:.2f} | {min(one.seconds):.2f}–{max(one.seconds):.2f} | {median / base:.2f} "
            f"| {max(one.peak_mb):.0f} |"
        )
    return "\n".join(lines) + "\n"


def machine() -> dict[str, object]:
    """Returns what a reader needs to know of the machine."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def save(path: Path, results: dict[str, list[Competitor]]) -> None:
    """Writes every single measurement as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        title: [{**asdict(one), "output": str(one.output)} for one in competitors]
        for title, competitors in results.items()
    }
    path.write_text(json.dumps({"machine": machine(), "results": plain}, indent=1))
