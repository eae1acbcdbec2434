"""Carries out a sweep: scores once, then each model is made, judged, noted and removed, one at a time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from .. import _engine, interruption
from ..analysis.score import Score
from ..checkpoint.model import Model
from ..decision import Rule
from ..documents import RECORD, read_bytes
from ..errors import AnalysisError, OutputError, PlanError, SafemergeError, SettingError
from ..execution.inputs import input_paths, job_identity, require_unchanged
from ..pairing.module import modules_of_rows
from ..pairing.rows import pair
from ..progress import ProgressEvent, silent
from ..recipes import recipes
from ..recipes.base import Job
from ..recipes.role_check import refuse_or_warn
from ..recipes.roles import access_of, open_roles
from ..recipes.run import carry_out_job
from ..recipes.safemerge.given import given_scores
from ..recipes.safemerge.job import SafemergeJob
from ..recipes.safemerge.scoring import judge_scores, score_models
from ..recipes.safemerge.settings import AnalysisSettings
from ..report.report import Report
from ..settings import fields_of, read_settings
from ..yaml_documents import read_yaml
from .candidates import Candidate, list_candidates
from .command import Judge, JudgeError, read_judge
from .controls import needs_scores, with_controls
from .metrics import Metric, MetricError, read_metrics
from .question import Together
from .report import SweepReport, best_of
from .result import Result
from .settings import SweepSettings
from .work import SweepDirectory

__all__ = ["ROLES", "read_sweep", "run_sweep", "sweep_models"]

ROLES = ("base", "aligned", "finetuned", "safe")


def run_sweep(
    settings: SweepSettings, tell_result: Callable[[Result, int, int], None] | None = None
) -> SweepReport:
    """Carries out a sweep.

    Args:
        settings: What was asked for.
        tell_result: Called with each result, how many there are now, and how many there will be.

    Returns:
        What came of it; models that could not be made or judged are in it with the reason.

    Raises:
        SafemergeError: One of its subclasses: something is wrong with the settings, the inputs or the directory. What
            is judged already stays for resume.
    """
    sweep = _absolute(settings)
    metrics, judge = read_metrics(sweep.metrics), read_judge(sweep.eval, sweep.timeout)
    # Before anything is made: whatever can be refused from headers.
    candidates = list_candidates(sweep)
    models = sweep_models(sweep)
    rules = _refuse_impossible(candidates)
    _refuse_inside(Path(sweep.output), models)
    with SweepDirectory(sweep.output, _head(sweep, models), resume=sweep.resume) as directory:
        interruption.expect_job()
        if needs_scores(candidates):
            sweep = msgspec.structs.replace(sweep, scores=_measured(sweep, models, rules, directory))
        listed, notes = with_controls(sweep, list_candidates(sweep), models, directory)
        work = _Work(sweep, directory, models, judge, metrics)
        tell = sweep.progress or silent
        for number, candidate in enumerate(listed):
            tell(ProgressEvent("sweep", number, len(listed), candidate.name))
            known = directory.results.get(candidate.name)
            if known is not None and known.identity == candidate.identity() and known.failed is None:
                continue
            if known is not None and known.identity != candidate.identity():
                # Another one of that name, kept from an earlier run.
                directory.remove(candidate.name)
            result = work.judge(candidate)
            if tell_result is not None:
                tell_result(result, number + 1, len(listed))
        tell(ProgressEvent("sweep", len(listed), len(listed), ""))
        return SweepReport(
            str(directory.path), metrics, tuple(directory.results.values()), tuple(notes), work.kept()
        )


def read_sweep(file: Path | None, given: Mapping[str, Any]) -> SweepSettings:
    """Makes settings of a file and of what was given besides, which wins; a grid wins setting by setting.

    Args:
        file: YAML with the fields of SweepSettings, or None.
        given: Settings by name.

    Raises:
        PlanError: The file cannot be read, or has a field that is unknown, missing or out of range.
        SettingError: A setting is missing or out of range where there is no file.
    """
    if file is None:
        missing = [
            field.name for field in fields_of(SweepSettings) if field.required and field.name not in given
        ]
        if missing:
            word = {"metrics": "metric"}.get(missing[0], missing[0])
            raise SettingError(f"{missing[0]} is missing; give --{word}, or a file that has it")
        return SweepSettings(**given)
    document = read_yaml(file, PlanError)
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise PlanError(f"{file} should hold fields with values, like `alpha: [0.5, 0.8]` below `grid:`")
    if document.pop("recipe", SweepSettings.recipe) != SweepSettings.recipe:
        raise PlanError(f"{file} is for safemerge-fast run: its recipe is not sweep")
    for field in fields_of(SweepSettings):
        if field.name in document and not field.setting.in_files:
            raise PlanError(
                f"{file} sets {field.name}, which is given on the command line (see sweep --help)"
            )
    values = {**document, **given}
    if isinstance(document.get("grid"), dict) and given.get("grid"):
        values["grid"] = {**document["grid"], **given["grid"]}
    return read_settings(SweepSettings, values, str(file))


def sweep_models(sweep: SweepSettings) -> dict[str, Model]:
    """Opens the roles of a sweep."""
    roles = {role: spec for role in ROLES if (spec := getattr(sweep, role)) is not None}
    return open_roles(roles, access_of(sweep))


@dataclass(frozen=True, slots=True)
class _Work:
    """Making and judging, one model after another."""

    sweep: SweepSettings
    directory: SweepDirectory
    models: Mapping[str, Model]
    command: Judge
    metrics: tuple[Metric, ...]

    def judge(self, candidate: Candidate) -> Result:
        """Makes one model, has it judged, notes what came of it and removes it unless it is to be kept."""
        settings = candidate.settings
        result = Result(
            name=candidate.name,
            identity=candidate.identity(),
            what=candidate.what,
            control=candidate.control,
            recipe=None if settings is None else settings.recipe,
            settings=None if settings is None else settings.to_dict(),
            model=candidate.model,
            drawn=candidate.drawn,
            beside=candidate.beside,
            merged=None if candidate.merged is None else dict(candidate.merged),
            same_as=candidate.same_as,
        )
        if candidate.same_as is not None:
            first = self.directory.results[candidate.same_as]
            failed = None if first.failed is None else f"{first.name} has the same weights, and failed"
            result = msgspec.structs.replace(result, metrics=first.metrics, failed=failed)
        else:
            result = self._judged(candidate, result)
        self.directory.add(result)
        self._tidy()
        return result

    def kept(self) -> tuple[str, ...]:
        """Names of the models that are still on disk."""
        return tuple(name for name in self.directory.results if self.directory.candidate(name).is_dir())

    def _judged(self, candidate: Candidate, result: Result) -> Result:
        clock = [time.perf_counter()]
        failed: str | None = None
        metrics: dict[str, float] | None = None
        job: str | None = None
        try:
            model, job = self._made(candidate)
            clock.append(time.perf_counter())
            interruption.expect_job()
            places = {
                "model": model,
                "aligned": str(self.models["aligned"].path),
                "name": candidate.name,
            }
            written = self.command.run(
                places, self.directory.empty_results(candidate.name), self.directory.log(candidate.name)
            )
            metrics = {metric.name: metric.read(written) for metric in self.metrics}
        except OutputError:
            # There is no room, or no right to write: the next one would fare no better.
            raise
        except SafemergeError as error:
            failed = f"it cannot be made: {error}"
        except (JudgeError, MetricError) as error:
            failed = str(error)
        # What is judged must be what was asked for.
        require_unchanged(self.models)
        clock.append(time.perf_counter())
        seconds = dict(zip(("make", "judge") if len(clock) == 3 else ("make",), _steps(clock), strict=True))
        return msgspec.structs.replace(result, metrics=metrics, failed=failed, job=job, seconds=seconds)

    def _made(self, candidate: Candidate) -> tuple[str, str | None]:
        """Where the model is, and the identity of the job that made it."""
        if candidate.settings is None:
            assert candidate.model is not None
            return candidate.model, None
        # It is where it should be, not behind a link.
        self.directory.candidate(candidate.name)
        started = time.perf_counter()
        report: Report = carry_out_job(_open(candidate), started)
        return report.output, report.identity

    def _tidy(self) -> None:
        """Removes what is judged and not to be kept."""
        if self.sweep.keep == "all":
            return
        best = best_of(self.metrics, list(self.directory.results.values()))
        for name in self.directory.results:
            if self.sweep.keep == "none" or name != best:
                self.directory.remove(name)


def _steps(clock: list[float]) -> list[float]:
    return [stop - start for start, stop in pairwise(clock)]


def _open(candidate: Candidate) -> Job[Any]:
    settings = candidate.settings
    assert settings is not None
    job: Job[Any] = recipes()[settings.recipe].open(settings)
    return job


def _refuse_impossible(candidates: list[Candidate]) -> list[Rule]:
    """Opens all candidates, so that what headers say against one is said at once; returns the rules to be settled."""
    rules = []
    for candidate in candidates:
        try:
            job = _open(candidate)
        except SafemergeError as error:
            raise type(error)(f"the candidate {candidate.name}: {error}") from error
        if isinstance(job, SafemergeJob):
            rules.append(job.rule)
    return list(dict.fromkeys(rules))


def _measured(
    sweep: SweepSettings, models: Mapping[str, Model], rules: list[Rule], directory: SweepDirectory
) -> str:
    """The file of scores that all candidates share: measured until their rules are settled, and no further."""
    names = [field.name for field in fields_of(AnalysisSettings)]
    settings = AnalysisSettings(**{name: getattr(sweep, name) for name in names})
    roles = {role: model for role, model in models.items() if role != "safe"}
    pairing = pair(roles, include=sweep.include, exclude=sweep.exclude)
    question = Together(tuple(rules))
    file = directory.scores or (None if sweep.scores is None else Path(sweep.scores))
    known: Mapping[str, Score] = {}
    if file is not None:
        known = given_scores(str(file), roles, sweep.delta_reference).modules
        if sweep.estimator == "exact":
            known = {name: score for name, score in known.items() if not score.columns}
        modules = list(modules_of_rows(pairing.rows))
        wanted = question.open_modules(modules, known) if sweep.estimator == "auto" else set()
        if not wanted and all(module.name in known for module in modules):
            return str(file)
    # What was judged by earlier scores was made of those: they stay as they are.
    scores = score_models(roles, pairing.rows, settings, question, known)
    found = judge_scores(roles, scores.modules, sweep.delta_reference)
    refuse_or_warn(found.wrong, force=sweep.force)
    return directory.write_scores(scores.to_json())


def _absolute(settings: SweepSettings) -> SweepSettings:
    """The settings with paths that hold wherever the sweep is looked at from."""
    paths: dict[str, str] = {}
    for name in (*ROLES, "scores"):
        given: str | None = getattr(settings, name)
        if given is not None and os.path.exists(os.path.expanduser(given)):
            paths[name] = os.path.abspath(os.path.expanduser(given))
    output = os.path.realpath(os.path.expanduser(settings.output))
    return msgspec.structs.replace(settings, output=output, **paths)


def _refuse_inside(output: Path, models: Mapping[str, Model]) -> None:
    """A sweep writes into no input."""
    for path in map(os.path.realpath, input_paths(models)):
        if output == Path(path) or Path(path) in output.parents:
            raise OutputError(f"{output} lies in the input {path}; name another directory for the sweep")


def _head(sweep: SweepSettings, models: Mapping[str, Model]) -> dict[str, Any]:
    """What is swept: of another head, no result is taken over."""
    deciding = sweep.deciding()
    scores = None
    if sweep.scores is not None:
        scores = hashlib.blake2b(
            read_bytes(sweep.scores, AnalysisError, limit=RECORD), digest_size=16
        ).hexdigest()
    return {
        "program": _engine.__version__,
        "identity": job_identity(sweep.recipe, deciding, models, scores),
        "settings": deciding,
    }
