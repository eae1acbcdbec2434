"""What was measured, kept as JSON under a title each, and the Markdown tables made of it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timing import Competitor, Measurement


@dataclass(frozen=True)
class Row:
    """A competitor's runs."""

    name: str
    command: list[str]
    measurements: list[Measurement]

    @property
    def seconds(self) -> float:
        """Median of the seconds."""
        return statistics.median(run.seconds for run in self.measurements)

    @property
    def cpu_seconds(self) -> float:
        """Median of the processor seconds."""
        return statistics.median(run.cpu_seconds for run in self.measurements)

    @property
    def peak_mb(self) -> float:
        """Largest of the peaks."""
        return max(run.peak_mb for run in self.measurements)


@dataclass(frozen=True)
class Comparison:
    """Competitors that were run in turn; the first is what the others are compared with.

    Attributes:
        title: What was done, in words.
        facts: What else a reader needs, by name: model, job, bytes.
        rows: The competitors.
        when: When it was measured.
    """

    title: str
    facts: dict[str, Any]
    rows: list[Row]
    when: str

    @classmethod
    def of(cls, title: str, competitors: Sequence[Competitor], **facts: Any) -> Comparison:
        """Collects what competitors have measured."""
        rows = [Row(one.name, list(one.command), one.measurements) for one in competitors if one.measurements]
        return cls(title, facts, rows, time.strftime("%Y-%m-%d %H:%M"))

    def row(self, name: str) -> Row | None:
        """The competitor of that name, if it took part."""
        return next((row for row in self.rows if row.name == name), None)

    def table(self) -> str:
        """Returns a Markdown table: medians, spread, ratios of medians, peak memory, processor time, disk reads."""
        reference = self.rows[0]
        sizes = ", ".join(
            f"{value / 1e9:.2f} GB {name.removesuffix('_bytes')}"
            for name, value in self.facts.items()
            if name.endswith("_bytes")
        )
        lines = [
            f"### {self.title}",
            "",
            *([f"{sizes}.", ""] if sizes else []),
            f"| | median s | min–max s | rounds | / {reference.name.split(' (')[0]} | peak MB | CPU s | from disk GB |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in self.rows:
            times = [run.seconds for run in row.measurements]
            peak = f"{row.peak_mb:.0f}" if row.peak_mb else "–"
            disk = statistics.median(run.disk_read_mb for run in row.measurements) / 1e3
            lines.append(
                f"| {row.name} | {row.seconds:.2f} | {min(times):.2f}–{max(times):.2f} | {len(times)} "
                f"| {row.seconds / reference.seconds:.2f} | {peak} | {row.cpu_seconds:.1f} | {disk:.1f} |"
            )
        return "\n".join(lines) + "\n"


def load(path: Path) -> list[Comparison]:
    """Reads what `save` wrote; nothing if it has written nothing."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))["comparisons"]
    return [
        Comparison(
            one["title"],
            one["facts"],
            [
                Row(row["name"], row["command"], [Measurement(**run) for run in row["measurements"]])
                for row in one["rows"]
            ],
            one["when"],
        )
        for one in found
    ]


def save(path: Path, comparison: Comparison) -> None:
    """Adds a comparison to a JSON file, in place of one with that title, and writes all tables beside it."""
    comparisons = load(path)
    titles = [one.title for one in comparisons]
    if comparison.title in titles:
        comparisons[titles.index(comparison.title)] = comparison
    else:
        comparisons.append(comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "comparisons": [asdict(one) for one in comparisons]}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    tables = "\n".join(one.table() for one in comparisons)
    path.with_suffix(".md").write_text(f"{about}\n\n{tables}", encoding="utf-8")


def machine() -> dict[str, object]:
    """Returns what a reader needs to know of the machine."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _field(path: str, name: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(name)), "")
