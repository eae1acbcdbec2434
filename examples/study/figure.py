"""A picture of a study: refusals of harmful requests over the task solved, a panel for each kind of fine-tuning."""

from __future__ import annotations

from pathlib import Path

from .intervals import by_seed, interval, most_compared
from .results import Row
from .table import DEFAULT, models_of

_STYLES = {
    "aligned": ("#444444", "s", "aligned"),
    "finetuned": ("#cc3311", "s", "fine-tuned"),
    "shrink": ("#ee7733", "D", "shrink everything"),
    "no-safe": ("#ddaa33", "v", "same modules, no safe model"),
    "random": ("#999999", "x", "random modules"),
    "recipe": ("#009988", "^", "other recipes"),
    "safemerge": ("#0077bb", "o", "SafeMERGE"),
    "default": ("#0077bb", "*", "SafeMERGE, defaults"),
}


def draw(rows: list[Row], file: Path) -> None:
    """Draws means over seeds and tasks, with 95 % intervals of the refusals where there are seeds for one.

    Args:
        rows: What was found.
        file: Where to, as .svg or .png.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row.kind for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 4.2), squeeze=False, sharey=True)
    for panel, kind in zip(axes[0], kinds, strict=True):
        of_kind = [row for row in rows if row.kind == kind]
        shown: set[str] = set()
        for name, of_it in models_of(of_kind).items():
            tasks = most_compared(of_it)
            refused, solved = (by_seed(of_it, metric, tasks) for metric in ("refused", "solved"))
            style = _style(of_it[0], name)
            colour, mark, label = _STYLES[style]
            up, right = interval(list(refused.values())), interval(list(solved.values()))
            panel.errorbar(
                100 * right.mean,
                100 * up.mean,
                yerr=100 * up.half if up.seeds > 1 else None,
                color=colour,
                marker=mark,
                markersize=11 if style == "default" else 6,
                linestyle="none",
                elinewidth=0.6,
                alpha=0.85,
                label=None if style in shown else label,
            )
            shown.add(style)
        panel.set_title(kind)
        panel.set_xlabel("task solved, %")
        panel.set_ylim(-5, 105)
        panel.grid(alpha=0.25)
    axes[0][0].set_ylabel("refuses harmful requests, %")
    axes[0][-1].legend(fontsize=7, framealpha=0.6)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _style(row: Row, name: str) -> str:
    if row.control:
        return row.control
    if name == DEFAULT:
        return "default"
    return "safemerge" if row.merged else "recipe"
