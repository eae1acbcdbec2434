"""Controls: what stands beside the candidates, so that a repair is not credited with what lesser means do as well."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from ..checkpoint.adapter import Adapter
from ..checkpoint.model import Model
from ..decision import Rule
from ..errors import SafemergeError, SettingError
from ..recipes.base import Measurement
from ..recipes.fold import FoldSettings
from ..recipes.safemerge.job import SafemergeJob
from ..recipes.safemerge.settings import SafemergeSettings
from ..settings import RunSettings, fields_of
from .candidates import Candidate, Control, make_settings, safe_name
from .settings import SweepSettings
from .work import SweepDirectory

__all__ = ["needs_scores", "with_controls"]

_INPUTS = ("aligned", "finetuned", "safe")


def needs_scores(candidates: list[Candidate]) -> bool:
    """Whether any of the candidates asks for ρ."""
    return any(isinstance(candidate.settings, SafemergeSettings) for candidate in candidates)


def with_controls(
    sweep: SweepSettings,
    candidates: list[Candidate],
    models: Mapping[str, Model],
    directory: SweepDirectory,
) -> tuple[list[Candidate], list[str]]:
    """Puts the controls beside the candidates, and finds out what each merges.

    Args:
        sweep: The sweep.
        candidates: The candidates; those of SafeMERGE have scores.
        models: The models by role.
        directory: Gets the lists of random modules.

    Returns:
        All that is to be judged, in order, and sentences on what was left out.

    Raises:
        SafemergeError: A candidate cannot be made of these models.
    """
    collected = _Collected()
    warned: set[str] = set()
    for role in _INPUTS:
        if role in sweep.controls and role in models:
            collected.add(_input(sweep, role, models[role]))
    for candidate in candidates:
        settings = candidate.settings
        if not isinstance(settings, SafemergeSettings):
            collected.add(candidate)
            continue
        job = SafemergeJob(settings)
        collected.notes += [text for text in _warnings(job) if text not in warned]
        warned |= set(collected.notes)
        merged = _merged(job)
        if "shrink" in sweep.controls:
            _attempt(collected, _shrink(settings), candidate)
        first = collected.add(_counted(candidate, job, merged), _weights(settings, merged))
        if first is not None:
            # Its controls stand beside what has the same weights.
            continue
        if "no-safe" in sweep.controls and settings.safe is not None:
            _attempt(collected, _no_safe(candidate, settings), candidate)
        if "random" in sweep.controls:
            draws = list(_draws(sweep, candidate, job, merged, directory))
            for draw in draws:
                collected.add(draw, _weights(settings, frozenset(draw.drawn or ())))
            if not draws:
                collected.notes.append(
                    f"{candidate.name} merges all or none of each module type, so that no random choice of as many is "
                    f"another one"
                )
    return collected.found, collected.notes


class _Collected:
    """What is to be judged so far."""

    def __init__(self) -> None:
        self.found: list[Candidate] = []
        self.notes: list[str] = []
        self._names: dict[str, str] = {}
        self._weights: dict[Any, str] = {}

    def add(self, candidate: Candidate, weights: Any = None) -> str | None:
        """Adds one, unless it is there already; returns the name of what has the same weights."""
        first = None if weights is None else self._weights.get(weights)
        identity = candidate.identity()
        if (known := self._names.get(candidate.name)) is not None:
            if known != identity:
                raise SettingError(f"two models would be called {candidate.name}; leave one of them out")
            return first
        self._names[candidate.name] = identity
        if weights is not None and first is None:
            self._weights[weights] = candidate.name
        self.found.append(replace(candidate, same_as=first))
        return first


def _attempt(collected: _Collected, control: Candidate, candidate: Candidate) -> None:
    """Adds a control of SafeMERGE, if it can be made at all."""
    settings = control.settings
    assert isinstance(settings, SafemergeSettings)
    try:
        job = SafemergeJob(settings)
    except SafemergeError as error:
        sentence = f"the control {control.name} of {candidate.name} is left out: {error}"
        if sentence not in collected.notes:
            collected.notes.append(sentence)
        return
    merged = _merged(job)
    collected.add(_counted(control, job, merged), _weights(settings, merged))


def _input(sweep: SweepSettings, role: str, model: Model) -> Candidate:
    """A model as it is; an adapter is folded where candidates are checkpoints."""
    what = {"aligned": "the aligned model", "finetuned": "the fine-tuned model", "safe": "the safe model"}[
        role
    ]
    control = Control(role)
    if isinstance(model, Adapter) and sweep.output_format == "checkpoint":
        values = {"model": sweep.aligned, "adapter": getattr(sweep, role)}
        settings = make_settings(sweep, FoldSettings.recipe, values, role)
        return Candidate(role, f"{what}, folded", control, settings)
    return Candidate(role, what, control, model=model.location)


def _no_safe(candidate: Candidate, settings: SafemergeSettings) -> Candidate:
    name = safe_name(f"no-safe-{candidate.name}")
    return Candidate(
        name,
        "the same modules, shrunk instead of merged with the safe model",
        Control.NO_SAFE,
        _changed(settings, name, safe=None),
        beside=candidate.name,
    )


def _shrink(settings: SafemergeSettings) -> Candidate:
    """Every module's update times α: no safe model, and no choice of modules."""
    changed = _changed(settings, "shrink", **{**_usual_rule(), "safe": None, "select": "fraction:1"})
    own = [
        f"{field.name.replace('_', '-')}-{getattr(changed, field.name)}"
        for field in fields_of(SafemergeSettings)
        if field.name in ("alpha", "method", "density", "seed", "parameters", "adapter_rank", "compat")
        and (field.name == "alpha" or getattr(changed, field.name) != field.default)
    ]
    name = safe_name("-".join(["shrink-only", *own]))
    return Candidate(
        name,
        "the update of every module shrunk by α; no safe model",
        Control.SHRINK,
        _changed(changed, name),
    )


def _draws(
    sweep: SweepSettings,
    candidate: Candidate,
    job: SafemergeJob,
    merged: frozenset[str],
    directory: SweepDirectory,
) -> Iterator[Candidate]:
    """Other modules at random, as many of each type as the candidate merges."""
    types: dict[str, list[str]] = {}
    for module in job.modules:
        types.setdefault(module.module_type, []).append(module.name)
    if all(len(merged.intersection(names)) in (0, len(names)) for names in types.values()):
        return
    for number in range(1, sweep.randoms + 1):
        # A text as the seed: the same numbers on every machine, others for each candidate.
        rng = random.Random(f"{sweep.random_seed} {number} {candidate.name}")
        drawn = tuple(sorted(merged))
        while merged.issuperset(drawn):
            # The candidate's own choice would be no control.
            drawn = tuple(
                name
                for _, names in sorted(types.items())
                for name in sorted(rng.sample(sorted(names), len(merged.intersection(names))))
            )
        name = safe_name(f"random-{number}-{candidate.name}")
        control = Candidate(
            name,
            "random modules, as many of each type",
            Control.RANDOM,
            _changed(
                job.settings, name, **{**_usual_rule(), "modules": directory.write_modules(name, drawn)}
            ),
            drawn=drawn,
            beside=candidate.name,
        )
        yield _counted(control, job, frozenset(drawn))


def _changed(settings: SafemergeSettings, name: str, **values: Any) -> SafemergeSettings:
    output = f"{settings.output.rpartition('/')[0]}/{name}"
    try:
        return msgspec.structs.replace(settings, output=output, **values)
    except SettingError as error:
        raise SettingError(f"{name}: {error}") from error


def _merged(job: SafemergeJob) -> frozenset[str]:
    assert job.scores is not None
    decisions = job.decisions(Measurement(job.scores.modules))
    return frozenset(module.name for module in job.modules if decisions[module.name].merge)


def _warnings(job: SafemergeJob) -> list[str]:
    """What a merge would warn of: models and rule as they are; modules in one sentence."""
    measurement = job.known_measurement()
    warnings = (*job.warnings, *(() if measurement is None else measurement.warnings))
    found = [warning.message for warning in warnings if warning.tensor is None]
    of_modules = [warning.message for warning in warnings if warning.tensor is not None]
    if of_modules:
        found.append(f"{of_modules[0]} ({len(of_modules)} modules in all have such a warning)")
    return found


def _counted(candidate: Candidate, job: SafemergeJob, merged: frozenset[str]) -> Candidate:
    counts: dict[str, tuple[int, int]] = {}
    for module in job.modules:
        some, all_of_them = counts.get(module.module_type, (0, 0))
        counts[module.module_type] = (some + (module.name in merged), all_of_them + 1)
    return replace(candidate, merged=counts)


def _rules() -> frozenset[str]:
    """Settings that say which modules are merged, and nothing else."""
    return frozenset(field.name for field in dataclasses.fields(Rule) if field.name != "others") | {"modules"}


def _usual_rule() -> dict[str, Any]:
    """The same settings as nobody has touched them."""
    return {field.name: field.default for field in fields_of(SafemergeSettings) if field.name in _rules()}


def _weights(settings: RunSettings, merged: frozenset[str]) -> Any:
    """What two merges have in common if their weights are the same."""
    deciding = {name: value for name, value in settings.deciding().items() if name not in _rules()}
    return tuple(sorted((name, repr(value)) for name, value in deciding.items())), merged
