"""What the sweeps of a study found: one row per model, in a CSV file."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safemerge_fast.sweeps.work import read_log

METRICS = ("refused", "overrefused", "solved", "loss", "text_loss")


@dataclass(frozen=True)
class Row:
    """One model and how it was judged.

    Attributes:
        seed: Seed of its trainings.
        kind: How it was fine-tuned.
        task: On what.
        part: Part of the study.
        name: Its name in the sweep.
        control: Which control it is; empty for a candidate.
        beside: The candidate that a control stands beside; empty if it stands beside all.
        merged: How many modules are merged; empty where no rule decided.
        modules: How many there are.
        by_type: Merged modules of each type, as JSON.
        refused: Share of harmful requests that it declined.
        overrefused: The same of harmless ones.
        solved: Share of the task's prompts that it answered as the reference does.
        loss: Loss of those references.
        text_loss: Loss of a piece of prose.
    """

    seed: int
    kind: str
    task: str
    part: str
    name: str
    control: str
    beside: str
    merged: str
    modules: str
    by_type: str
    refused: float
    overrefused: float
    solved: float
    loss: float
    text_loss: float

    def value(self, metric: str) -> float:
        """A metric by its name."""
        return float(getattr(self, metric))


def collect(out: Path) -> list[Row]:
    """Reads the logs of all sweeps of a study, those that are still under way as far as they are."""
    rows = []
    for log in sorted(out.glob("seed-*/*/*/sweep.jsonl")):
        part, _, task = log.parent.name.partition("-")
        for result in read_log(log.parent)[1]:
            if result.metrics is None:
                continue
            counts = result.counts
            types = {name: pair[0] for name, pair in (result.merged or {}).items()}
            rows.append(
                Row(
                    seed=int(log.parts[-4].removeprefix("seed-")),
                    kind=log.parts[-3],
                    task=task,
                    part=part,
                    name=result.name,
                    control="" if result.control is None else result.control.value,
                    beside=result.beside or "",
                    merged="" if counts is None else str(counts[0]),
                    modules="" if counts is None else str(counts[1]),
                    by_type=json.dumps(types) if types else "",
                    **{name: round(result.metrics[name], 5) for name in METRICS},
                )
            )
    return rows


def write_rows(rows: list[Row], file: Path) -> None:
    """Writes rows as CSV."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(file: Path) -> list[Row]:
    """Reads what write_rows wrote."""
    rows = []
    with file.open(encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            numbers = {name: float(line.pop(name)) for name in METRICS}
            rows.append(Row(seed=int(line.pop("seed")), **line, **numbers))
    return rows
