"""Carries out a recipe: open, measure, decide, write, report, publish. What stands under the output's name is whole."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import _engine, interruption
from ..documents import RECORD, read_bytes
from ..errors import PlanError, SettingError
from ..execution.choice import executor_of
from ..execution.executor import Executor
from ..execution.inputs import input_paths, require_unchanged
from ..execution.written import Written
from ..progress import silent
from ..report.environment import peak_memory, versions
from ..report.report import CARD_FILE, HTML_FILE, REPORT_FILE, ModuleWarning, OutputFile, Report
from ..settings import RunSettings, Settings, fields_of, read_settings
from ..yaml_documents import read_yaml
from . import recipes
from .base import Contents, Job, Measurement

__all__ = [
    "carry_out",
    "carry_out_job",
    "decided",
    "job_directory",
    "read_recipe",
    "read_report",
    "run",
]

_OVERWRITING = "overwriting"

_RETAINED = 0.5
"""A share of a change that is stored below which a tensor is warned about."""


def carry_out(settings: RunSettings) -> Report:
    """Makes what settings say.

    Args:
        settings: Settings of any recipe.

    Returns:
        The report, which also lies in the output as safemerge_report.json.

    Raises:
        SafemergeError: One of its subclasses. What stood under the output's name stands there still, and what was
            measured and written waits for resume.
    """
    started = time.perf_counter()
    return carry_out_job(recipes()[settings.recipe].open(settings), started)


def carry_out_job(job: Job[Any], started: float, executor: Executor | None = None) -> Report:
    """As carry_out, of a job that is opened already.

    Args:
        job: The job.
        started: When work on it began, by time.perf_counter.
        executor: Who writes the weights; None is whom the settings name.
    """
    settings = job.settings
    tell = settings.progress or silent
    companions = job.companions()
    executor = executor or executor_of(settings)
    with job_directory(job) as directory:
        if directory.complete:
            directory.close()
            return read_report(Path(directory.output))
        measurement, contents = decided(job, directory)
        written = contents.write(directory, settings, tell, executor)
        for source, name in companions:
            directory.copy_file(source, name)
        for name, pieces in contents.small_files():
            directory.write_pieces(name, pieces)
        report = _report(job, directory, contents, measurement, written, started)
        directory.write_file(CARD_FILE, job.card(report).encode())
        if (page := job.page(report)) is not None:
            directory.write_pieces(HTML_FILE, page)
        report = replace(report, files=_files(directory))
        directory.write_pieces(REPORT_FILE, report.pieces())
        require_unchanged(job.models)
        directory.publish()
    return report


@contextmanager
def job_directory(job: Job[Any]) -> Iterator[_engine.JobDirectory]:
    """The directory of a job, locked while the block runs; what goes wrong there leaves what --resume goes on with."""
    settings = job.settings
    directory = _engine.JobDirectory(
        settings.output,
        identity=job.identity(),
        inputs=input_paths(job.models),
        resume=settings.resume,
        overwrite=settings.overwriting,
    )
    interruption.expect_job()
    try:
        yield directory
    except BaseException:
        # Also for Ctrl-C: what is measured and committed stays for --resume, under a hidden name.
        directory.close()
        if not os.path.lexists(directory.path):
            # Nothing was begun.
            interruption.expect_nothing()
        raise


def decided(job: Job[Any], directory: _engine.JobDirectory) -> tuple[Measurement, Contents]:
    """Measures, and says what the output consists of.

    Args:
        job: The job.
        directory: Its directory, which keeps what is measured.

    Raises:
        SafemergeError: One of its subclasses.
    """
    if job.settings.overwrite:
        # Keeps the job's directory even if nothing else is in it yet, so that --resume knows what it may replace.
        directory.append(_OVERWRITING, b"")
    measurement = job.measure(directory, job.settings.progress or silent)
    require_unchanged(job.models)
    return measurement, job.contents(measurement)


def run(
    config: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    **settings: Any,
) -> Report:
    """Makes what a YAML file says: a recipe, or a merge as mergekit's files say it.

    Args:
        config: The file. Paths in it are relative to the working directory.
        output: Output directory; must be new or empty unless resume or overwrite is given.
        **settings: Further settings of the run, which win over the file's: threads, memory_budget, read_backend,
            resume, overwrite, allow_nonfinite, progress.

    Returns:
        The report, which also lies in the output as safemerge_report.json.

    Raises:
        SafemergeError: One of its subclasses; what stood under the output's name stands there still.
    """
    known = {field.name for field in fields_of(RunSettings)}
    if unknown := sorted(settings.keys() - known):
        raise SettingError(f"run has no setting {unknown[0]!r}; put it into the file")
    return carry_out(read_recipe(Path(config), {"output": output, **settings}))


def read_recipe(file: Path, run: Mapping[str, Any]) -> RunSettings:
    """Reads a file that says what to make.

    Args:
        file: YAML, or JSON, which is YAML too. Its field `recipe` names a recipe, whose settings the other fields are;
            without one, a recipe may know the document by its fields.
        run: Settings of the run, which win over the file's; those that are None are not given.

    Raises:
        PlanError: The file cannot be read, names no known recipe, or has a field that is unknown, missing or out of
            range.
        SettingError: A setting of the run has a value that it may not have.
    """
    document = read_yaml(file, PlanError)
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise PlanError(f"{file} should hold fields with values, like `recipe: fold`")
    given = {name: value for name, value in run.items() if value is not None}
    # Alone first: what is wrong with them is not the file's fault.
    of_the_run = {field.name for field in fields_of(RunSettings)}
    RunSettings(**{name: value for name, value in given.items() if name in of_the_run})
    if "recipe" not in document:
        for recipe in recipes().values():
            found: RunSettings | None = (
                None if recipe.read is None else recipe.read(str(file), document, given)
            )
            if found is not None:
                return found
    name = document.pop("recipe", None)
    named = [recipe.name for recipe in recipes().values() if recipe.read is None]
    if not isinstance(name, str) or name not in named:
        raise PlanError(
            f"{file} should say `recipe: {' or '.join(named)}`"
            + (", or have a merge_method" if name is None else f", not {name!r}")
        )
    record: type[RunSettings] = recipes()[name].settings
    _refuse_settings_of_the_run(file, record, document)
    return read_settings(record, {**document, **given}, str(file))


def _refuse_settings_of_the_run(file: Path, record: type[Settings], document: Mapping[str, Any]) -> None:
    for field in fields_of(record):
        if field.name in document and not field.setting.in_files:
            raise PlanError(f"{file} sets {field.name}, which is given on the command line (see run --help)")


def read_report(directory: Path) -> Report:
    """Reads the report of an output.

    Raises:
        PlanError: It is damaged, or of another version.
        CheckpointError: There is none.
    """
    path = directory / REPORT_FILE
    text = read_bytes(path, PlanError, limit=RECORD)

    def configuration(recipe: str, values: Mapping[str, Any]) -> Settings:
        if recipe not in recipes():
            raise PlanError(f"it was made by the recipe {recipe!r}, which this program does not have")
        record: type[RunSettings] = recipes()[recipe].settings
        return record.from_dict(values)

    try:
        return Report.from_json(text, configuration)
    except PlanError as error:
        raise PlanError(f"cannot read {path}: {error}") from error


def _report(
    job: Job[Any],
    directory: _engine.JobDirectory,
    contents: Contents,
    measurement: Measurement,
    written: Written,
    started: float,
) -> Report:
    nonfinite = tuple(
        ModuleWarning(tensor, f"{tensor} of {path} holds NaN or infinity, and so may the output")
        for tensor, path in written.nonfinite
    )
    return Report(
        recipe=job.settings.recipe,
        output=directory.output,
        configuration=job.settings,
        identity=job.identity(),
        inputs=job.describe_inputs(),
        versions=versions(),
        device=measurement.device,
        seconds={
            "analysis": measurement.seconds,
            "merge": written.seconds,
            "total": time.perf_counter() - started,
        },
        bytes_read=written.bytes_read,
        bytes_written=written.bytes_written,
        peak_memory_bytes=peak_memory(),
        shards=written.shards,
        tensors=contents.tensors(measurement.scores, written),
        unused=job.unused,
        warnings=(*job.warnings, *measurement.warnings, *nonfinite, *_lost(written)),
        notes=(*job.notes, *contents.notes()),
        adapter=contents.adapter(),
        coverage=job.coverage,
    )


def _lost(written: Written) -> tuple[ModuleWarning, ...]:
    """What little is left of changes where tensors were quantised again."""
    lost = sorted((share, name) for name, share in written.retained.items() if share < _RETAINED)
    if not lost:
        return ()
    share, name = lost[0]
    return (
        ModuleWarning(
            None,
            f"of {len(lost)} tensors that were quantised again less than half of the change is stored, such as "
            f"{max(share, 0.0):.1%} of {name}; pass --encode bfloat16 to keep all of it",
        ),
    )


def _files(directory: _engine.JobDirectory) -> tuple[OutputFile, ...]:
    return tuple(
        OutputFile(file.name, file.bytes, file.digest)
        for file in sorted(directory.written, key=lambda file: file.name)
    )
