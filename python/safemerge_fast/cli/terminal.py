"""Printing: data on stdout, progress bars and everything that is said besides on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ..printable import MOST_OF_A_MESSAGE, printable
from ..progress import ProgressCallback, ProgressEvent

__all__ = ["Terminal"]

_STAGES = {"analysis": "analysing", "merge": "merging", "verify": "verifying", "sweep": "sweeping"}
_SHORT = 3


class Terminal:
    """The two streams of one command."""

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbose: int = 0, no_progress: bool = False
    ) -> None:
        """Chooses what is printed.

        Args:
            as_json: The result is one JSON document.
            quiet: Nothing but errors is printed, and JSON if asked for.
            verbose: With at least 1, no list of sentences is cut short.
            no_progress: There are no progress bars.
        """
        self._as_json = as_json
        self._quiet = quiet
        self._verbose = verbose
        self._no_progress = no_progress

    @property
    def is_verbose(self) -> bool:
        """Whether everything is to be said."""
        return self._verbose > 0

    def result(self, to_json: Callable[[], str | Iterable[str]], *parts: Any) -> None:
        """Prints a command's result to stdout: the JSON document, whole or in pieces, or else rich tables and text."""
        if self._as_json:
            document = to_json()
            for piece in (document,) if isinstance(document, str) else document:
                click.echo(piece, nl=False)
            return
        if self._quiet:
            return
        from rich.console import Console

        console = Console(highlight=False)
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str), markup=False)

    def say(self, message: str) -> None:
        """Writes a line to stderr, unless told to be quiet."""
        if not self._quiet:
            click.echo(printable(message, MOST_OF_A_MESSAGE), err=True)

    def say_next(self, steps: Sequence[tuple[str, str]]) -> None:
        """Writes what one may want to do next: a word, and what to type; one in a line."""
        for word, action in steps:
            self.say(f"  {word:<8} {action}")

    def say_some(self, kind: str, messages: Sequence[str], *, rest: str) -> None:
        """Writes the first few of many sentences to stderr, and how many more there are; with -v all."""
        shown = messages if self._verbose else messages[:_SHORT]
        for message in shown:
            self.say(f"{kind}: {message}")
        if left := len(messages) - len(shown):
            self.say(f"{kind}: and {left} more; {rest}")

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback | None]:
        """Bars on stderr while the block runs, one per stage; yields None where nobody would see them."""
        if self._quiet or self._no_progress or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
        from rich.table import Column

        bars = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn(
                "{task.fields[item]}",
                style="dim",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=Console(stderr=True),
            expand=True,
            transient=True,
        )
        tasks: dict[str, TaskID] = {}

        def show(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(_STAGES[event.stage], total=event.total, item="")
            bars.update(
                tasks[event.stage], completed=event.done, total=event.total, item=printable(event.item, 200)
            )

        with bars:
            yield show
