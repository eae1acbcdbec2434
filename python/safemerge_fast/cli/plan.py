"""`safemerge-fast plan`: a merge up to its plan, for workers of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..printable import printable
from ..recipes.safemerge.settings import SafemergeSettings
from ..settings import RunSettings
from .merge import ByRecipe, recipe_options
from .terminal import Terminal


def _made(record: type[RunSettings]) -> Callable[..., None]:
    """What plans a recipe, with all its options."""

    @recipe_options(record, leave_out=("executor", "task_cpus", "stall_after"))
    def run(*, terminal: Terminal, recipe: str, **values: Any) -> None:
        from ..recipes.shared_job import plan_job
        from ..sizes import format_size

        with terminal.progress() as progress:
            planned = plan_job(record(**values, progress=progress))
        terminal.result(
            planned.to_json,
            f"planned: {printable(planned.output)}, {planned.files} file(s) of "
            f"{format_size(planned.bytes_written)} ({planned.seconds:.1f} s)",
        )
        output = planned.output
        terminal.say_next(
            [
                (
                    "work",
                    f"safemerge-fast work {output} --index I/N    (I from 0 to N - 1, N at most {planned.files})",
                ),
                ("finish", f"safemerge-fast finish {output}"),
            ]
        )

    return run


command = click.command(
    "plan",
    cls=ByRecipe,
    make=_made,
    help="Do what merge does up to the plan, and leave the weights to `work`.\n\n"
    "Takes all of merge's options. The job waits in a hidden directory beside the output, on a file system that all "
    "workers share: `work` prepares files of weights there, on as many machines as there are files, and `finish` puts "
    "the output together. docs/cluster.md has scripts for Slurm and Kubernetes.",
)(_made(SafemergeSettings))
