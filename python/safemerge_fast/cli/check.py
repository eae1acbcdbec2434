"""`safemerge-fast check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ..printable import printable
from ..recipes.check import CheckedUpdate, CheckReport, CheckSettings, check_adapter
from .options import settings_options, terminal_options
from .terminal import Terminal


@click.command("check")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("model", metavar="MODEL")
@settings_options(CheckSettings)
@terminal_options
def command(*, terminal: Terminal, adapter: str, model: str, **values: Any) -> None:
    """Say which tensor of MODEL each key of the LoRA adapter ADAPTER changes, in what way, and by how much.

    Reads the adapter's factors and only the headers of the model. With -v every key is listed. Exits with 3 if there
    are keys that go nowhere, as a merge would.
    """
    with terminal.progress() as progress:
        report = check_adapter(CheckSettings(adapter=adapter, model=model, progress=progress, **values))
    terminal.result(report.to_json, *_lines(report, every_key=terminal.is_verbose))
    terminal.say_some("note", report.notes, rest="-v shows all")
    report.require_all_used()


def _lines(report: CheckReport, *, every_key: bool) -> Iterator[Any]:
    """The report for a person."""
    keys = sum(len(update.keys) for update in report.updates)
    lost = sum(len(unused.keys) for unused in report.unused)
    yield f"{printable(report.adapter)} on {printable(report.model)}"
    unread = f", {len(report.unread)} that nothing needs to read" if report.unread else ""
    yield (
        f"{keys + lost} keys: {keys} change {len({t for u in report.updates for t in u.tensors})} tensors, "
        f"{lost} go nowhere{unread}"
    )
    if report.expert_lora_layout is not None:
        yield f"B of fused experts read as {report.expert_lora_layout} lays it out"
    if report.updates:
        yield _groups(report.updates)
    if every_key:
        for update in report.updates:
            target = printable(update.tensors[0])
            more = f" and {len(update.tensors) - 1} more" if len(update.tensors) > 1 else ""
            for key in update.keys:
                yield f"{printable(key)} → {target}{more}: {_form(update)}, ‖·‖ {_norm(update.norm)}"
        for key in report.unread:
            yield f"{printable(key)} → not read: stored twice, or not trained"
    for unused in report.unused if every_key else report.unused[:3]:
        for key in unused.keys:
            yield f"{printable(key)} → nowhere: {printable(unused.problem, 400)}"


def _groups(updates: tuple[CheckedUpdate, ...]) -> Any:
    """A table with a line for changes of one kind."""
    from rich import box
    from rich.table import Table

    groups: dict[tuple[str, ...], list[CheckedUpdate]] = {}
    for update in updates:
        groups.setdefault(
            (
                _kind(update.parameter),
                _form(update),
                update.stored or "",
                str(update.rank or ""),
                f"{update.scale:.6g}" if update.norm is not None else "",
            ),
            [],
        ).append(update)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("n", justify="right")
    table.add_column("form", overflow="fold")
    table.add_column("stored")
    for title in ("rank", "scale", "‖s·B·A‖"):
        table.add_column(title, justify="right", overflow="fold")
    for (kind, form, stored, rank, scale), members in groups.items():
        norms = [update.norm for update in members if update.norm is not None]
        size = (
            "" if not norms else f"{min(norms):.4g} … {max(norms):.4g}" if len(norms) > 1 else _norm(norms[0])
        )
        table.add_row(printable(kind), str(len(members)), form, stored, rank, scale, size)
    return table


def _kind(parameter: str) -> str:
    """The last part of a module's name, and the parameter's if that is not its weight."""
    module, _, leaf = parameter.rpartition(".")
    last = module.rpartition(".")[2]
    return last if leaf == "weight" else f"{last}.{leaf}"


def _form(update: CheckedUpdate) -> str:
    form = f"{update.experts} experts" if update.form == "experts" else update.form
    return f"{form}, DoRA" if update.dora else form


def _norm(norm: float | None) -> str:
    return "unknown without the weights" if norm is None else f"{norm:.4g}"
