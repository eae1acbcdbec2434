"""Executes plans that are known before the work begins: recipes without an analysis."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from .. import _engine
from ..checkpoint.model import Model
from ..plan.shards import index_document, plan_document
from ..progress import ProgressCallback, ProgressEvent
from .publication import remove_stray_shards
from .shard_writer import ShardWriter

__all__ = ["Run", "write_planned"]


class Run(Protocol):
    """What one run is told, besides what it is to make."""

    @property
    def output(self) -> str:
        """The output directory."""

    @property
    def threads(self) -> int | None:
        """Worker threads."""

    @property
    def memory_budget(self) -> int | str | None:
        """Most bytes for the engine's buffers."""

    @property
    def read_backend(self) -> str:
        """How inputs are read."""

    @property
    def allow_nonfinite(self) -> bool:
        """Whether NaN and infinity of the inputs may get through."""

    @property
    def resume(self) -> bool:
        """Whether to continue an unfinished run."""

    @property
    def overwrite(self) -> bool:
        """Whether to replace what the output holds."""


@contextmanager
def write_planned(
    run: Run,
    models: Mapping[str, Model],
    planned: Sequence[Mapping[str, Any]],
    progress: ProgressCallback | None,
) -> Iterator[tuple[_engine.Output, ShardWriter]]:
    """Writes all weights; the body of the `with` then writes what makes the output complete.

    Args:
        run: Where and how to work.
        models: The models by role.
        planned: The plan's shards.
        progress: Called with ProgressEvents; an exception it raises stops the work.

    Yields:
        The output, in which the weights are committed, and the writer with its facts.

    Raises:
        SafemergeError: One of its subclasses; the output then holds nothing that looks complete.
    """
    tell = progress or (lambda event: None)
    # All of them before the output is touched.
    plans = [
        _engine.Plan(json.dumps(plan_document(models, [shard])), read_backend=run.read_backend)
        for shard in planned
    ]
    total = int(index_document(planned)["metadata"]["total_size"])
    output = _engine.Output(
        run.output,
        inputs=[model.headers.path for model in models.values()],
        resume=run.resume,
        overwrite=run.overwrite,
    )
    writer = ShardWriter(
        output,
        threads=run.threads,
        memory_budget=None if run.memory_budget is None else int(run.memory_budget),
        allow_nonfinite=run.allow_nonfinite,
        # The engine counts headers too, which the total leaves out.
        on_bytes=lambda done, file: tell(ProgressEvent("merge", min(done, total), total, file)),
    )
    try:
        remove_stray_shards(output, [shard["file"] for shard in planned])
        for plan in plans:
            writer.submit_checked(plan)
        writer.finish()
        yield output, writer
        output.finish()
    except BaseException:
        # Also for Ctrl-C: what is committed stays for --resume, but nothing loads it without config.json.
        writer.abandon()
        output.close()
        raise
