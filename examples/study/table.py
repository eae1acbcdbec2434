"""Tables of a study in Markdown: each model's means over seeds, and paired differences with intervals.

python -m study.table --out /tmp/study                          # writes results.csv there, and prints
python -m study.table --results study/results.csv               # what is published
python -m study.table --results study/results.csv --figure study.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from .intervals import Interval, by_seed, difference, interval, most_compared
from .results import METRICS, Row, collect, read_rows, write_rows

DEFAULT = "threshold-0.35-alpha-0.8"
"""The candidate with the program's own settings."""

_PERCENT = ("refused", "overrefused", "solved")


def models_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the model's name, each seed and task once; those of most seeds and tasks first."""
    found: dict[str, dict[tuple[int, str], Row]] = {}
    for row in rows:
        # A control that two parts judged is the same in both.
        found.setdefault(row.name, {}).setdefault((row.seed, row.task), row)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return {name: list(of_it.values()) for name, of_it in ordered}


def means_table(rows: list[Row]) -> Iterator[str]:
    """Lines of a table of means over seeds and tasks, with differences from the default."""
    models = models_of(rows)
    yield (
        "| model | merged | refuses harmful | refuses harmless | solves | loss | prose "
        "| harmful, from default | solves, from default | tasks | seeds |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|"
    for name, of_it in models.items():
        tasks = most_compared(of_it)
        values = {metric: by_seed(of_it, metric, tasks) for metric in METRICS}
        cells = [f"`{name}`", _merged(of_it)]
        for metric in METRICS:
            mean = interval(list(values[metric].values())).mean
            cells.append(f"{100 * mean:.0f}" if metric in _PERCENT else f"{mean:.2f}")
        for metric in ("refused", "solved"):
            usual = by_seed(models.get(DEFAULT, []), metric, tasks)
            cells.append("" if name == DEFAULT else points(difference(values[metric], usual)))
        cells += [", ".join(tasks), str(len(values["refused"]))]
        yield "| " + " | ".join(cells) + " |"


def controls_table(rows: list[Row]) -> Iterator[str]:
    """Lines of a table of candidates minus the controls that stand beside them."""
    models = models_of(rows)
    yield "| candidate | minus | refuses harmful | refuses harmless | solves | loss | tasks | seeds |"
    yield "|---|---|---:|---:|---:|---:|---|---:|"
    for name, of_it in models.items():
        for rival, of_rival in models.items():
            if of_it[0].control or not of_it[0].merged or not _beside(of_it[0], of_rival[0]):
                continue
            tasks = most_compared([row for row in of_it if _judged(of_rival, row)] or of_it)
            found = {
                metric: difference(by_seed(of_it, metric, tasks), by_seed(of_rival, metric, tasks))
                for metric in (*_PERCENT, "loss")
            }
            if (refused := found["refused"]) is None:
                continue
            cells = [f"`{name}`", f"`{rival}`", *(points(found[metric]) for metric in _PERCENT)]
            loss = found["loss"]
            cells += ["" if loss is None else _signed(loss, 1, 2), ", ".join(tasks), str(refused.seeds)]
            yield "| " + " | ".join(cells) + " |"


def points(found: Interval | None) -> str:
    """A difference of shares in points; bold where the interval excludes 0."""
    return "" if found is None else _signed(found, 100, 0)


def _signed(found: Interval, scale: float, digits: int) -> str:
    if found.seeds == 1:
        return f"{scale * found.mean:+.{digits}f}"
    text = f"{scale * found.mean:+.{digits}f} ± {scale * found.half:.{digits}f}"
    return f"**{text}**" if found.excludes_zero else text


def _beside(candidate: Row, rival: Row) -> bool:
    """Whether a control is one of a candidate's: its own, or shrinking everything by the same α."""
    if rival.control in ("no-safe", "random"):
        return rival.beside == candidate.name
    return rival.control == "shrink" and rival.name.removeprefix("shrink-only-") in candidate.name


def _judged(rows: list[Row], like: Row) -> bool:
    """Whether one of the rows has another's seed and task."""
    return any((row.seed, row.task) == (like.seed, like.task) for row in rows)


def _merged(rows: list[Row]) -> str:
    """The range of numbers of merged modules."""
    counts = sorted({int(row.merged) for row in rows if row.merged})
    if not counts:
        return ""
    low, high = counts[0], counts[-1]
    of_all = next(row.modules for row in rows if row.modules)
    return f"{low} of {of_all}" if low == high else f"{low} to {high} of {of_all}"


def read_arguments(words: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="study.table", description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--out", type=Path, help="the directory of study.run")
    source.add_argument("--results", type=Path, help="the CSV that was made of one")
    parser.add_argument("--figure", type=Path, help="where to draw refusals and task, .svg or .png")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Prints the tables."""
    given = read_arguments(words)
    if given.out is not None:
        rows = collect(given.out)
        write_rows(rows, given.out / "results.csv")
    else:
        rows = read_rows(given.results)
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        print(f"\n### {kind}\n")
        print("\n".join(means_table(of_kind)))
        print()
        print("\n".join(controls_table(of_kind)))
    if given.figure is not None:
        from .figure import draw

        draw(rows, given.figure)


if __name__ == "__main__":
    main()
