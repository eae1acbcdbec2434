"""Makes a candidate of a sweep again, to be kept: from the same inputs, with the same settings, so the same weights."""

from __future__ import annotations

import difflib
import time
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from ..errors import PlanError, SettingError
from ..printable import printable
from ..recipes import recipes
from ..recipes.run import carry_out_job
from ..report.report import Report
from ..settings import Kind, Progress, RunSettings, Setting, Settings
from .result import Result
from .work import read_log

__all__ = ["KeepSettings", "keep_candidate", "kept_settings"]


class KeepSettings(Settings, frozen=True):
    """Which candidate of which sweep to keep, and where."""

    recipe: ClassVar[str] = "keep"

    sweep: Annotated[
        str, Setting("The sweep's directory.", kind=Kind.PATH, metavar="DIR", on_command_line=False)
    ]
    name: Annotated[str, Setting("The candidate's name.", metavar="NAME", on_command_line=False)]
    output: Annotated[
        str, Setting("Output directory; new or empty.", kind=Kind.PATH, metavar="DIR", names=("-o",))
    ]
    resume: Annotated[
        bool, Setting("Continue an unfinished job of this output; says so if it is complete.")
    ] = False
    overwrite: Annotated[
        bool | Literal["in-place"],
        Setting(
            "Replace an earlier output once the new one is complete; in-place removes the old one first."
        ),
    ] = False
    progress: Progress = None


def kept_settings(settings: KeepSettings) -> RunSettings:
    """The settings that make the candidate again.

    Raises:
        PlanError: The directory holds no sweep.
        SettingError: The sweep has no such candidate, or one that cannot be made again.
    """
    return _settings_of(_found(settings), settings)


def keep_candidate(settings: KeepSettings) -> Report:
    """Makes a candidate of a sweep again.

    Args:
        settings: Which, and where.

    Returns:
        The report of the output.

    Raises:
        SafemergeError: One of its subclasses: as for kept_settings; an input, the scores or this program are not what
            they were when the candidate was judged; or what the recipe raises.
    """
    started = time.perf_counter()
    result = _found(settings)
    record = _settings_of(result, settings)
    job = recipes()[record.recipe].open(record)
    if result.job is not None and job.identity() != result.job:
        raise PlanError(
            f"what {result.name} is made of is not what was judged: a model, the scores or the version of this program "
            f"has changed since; sweep again"
        )
    return carry_out_job(job, started)


def _settings_of(result: Result, settings: KeepSettings) -> RunSettings:
    if result.settings is None or result.recipe is None:
        raise SettingError(
            f"{result.name} was judged as it is, at {printable(result.model or '')}; nothing is to be made"
        )
    if result.recipe not in recipes():
        raise PlanError(
            f"{result.name} was made by the recipe {printable(repr(result.recipe), 80)}, which is not known here"
        )
    record: type[RunSettings] = recipes()[result.recipe].settings
    return record.from_dict(
        {
            **result.settings,
            "output": settings.output,
            "resume": settings.resume,
            "overwrite": settings.overwrite,
            "progress": settings.progress,
        }
    )


def _found(settings: KeepSettings) -> Result:
    """What came of it; if it has the weights of another, what came of that."""
    _, results = read_log(Path(settings.sweep).expanduser())
    by_name = {result.name: result for result in results}
    if settings.name not in by_name:
        close = difflib.get_close_matches(settings.name, by_name, n=1, cutoff=0.0)
        hint = f", like {close[0]}" if close else ", and has judged nothing yet"
        raise SettingError(
            f"the sweep in {printable(settings.sweep)} has no model {printable(repr(settings.name), 120)}{hint}"
        )
    return by_name[settings.name]
