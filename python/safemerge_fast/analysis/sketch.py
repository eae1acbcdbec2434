"""Scores modules from random columns: an interval for each, and further looks only where the question needs them.

Reading and products are the engine's, a module in each thread; the statistics are interval.py's and chance.py's, for
all modules that are ready together. No torch.
"""

from __future__ import annotations

import math
import time
from collections import ChainMap, deque
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from .. import _engine, interruption
from .chance import chance_of
from .interval import estimate_rho
from .moments import Moments
from .opened import OpenedModule
from .precision import Precision
from .question import Question
from .rounding import v_rounding
from .schedule import LOOKS, failure_at, looks_of
from .score import Score, signed_cosine
from .small import score_small
from .threads import one_thread_each, processors

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.module import Module
    from .sketch_torch import TorchMoments

__all__ = ["Sketches"]

# Each holds a module's thin products, and pages of its inputs.
_MOST_THREADS = 16
# Modules that are measured or wait for it, for each thread.
_UNDER_WAY = 16
# Seconds that the statistics wait for company.
_PATIENCE = 0.002

# Of a module of which nothing is known yet.
_ANYTHING = Score(0.5, None, 0.0, 0.0, 0.0, 0.0, None, rho_low=0.0, rho_high=1.0, columns=1)


@dataclass(frozen=True, slots=True)
class _Task:
    """One look at a module; where it has none, the module is small and measured exactly."""

    module: Module
    look: int | None


@dataclass(frozen=True, slots=True)
class _Sketched:
    """What a look found."""

    opened: OpenedModule
    moments: _engine.SketchMoments | TorchMoments


class Sketches:
    """The sketches of one analysis.

    Attributes:
        left: Modules that all looks which are worth while have left open, or of which they say nothing.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        *,
        delta_reference: str,
        precision: Precision,
        decided: int,
        question: Question | None,
        device: str = "cpu",
    ) -> None:
        """Starts nothing.

        Args:
            models: base, aligned and finetuned, and sources of adapters, by role.
            delta_reference: What Δ is taken against, "aligned" or "base".
            precision: How sure one wants to be.
            decided: How many modules the whole run decides; they share the probability of failure.
            question: What is to be settled; None: nothing, one look at each.
            device: Where the products are computed.
        """
        self.left: list[Module] = []
        self._models = models
        self._delta_reference = delta_reference
        self._precision = precision
        self._decided = decided
        self._question = question
        self._device = device
        self._columns = _engine.Columns(precision.seed)
        self._scores: dict[str, Score] = {}
        self._looked: dict[str, int] = {}  # looks that were taken, or are under way

    @property
    def unknown(self) -> list[Module]:
        """Those of them of which nothing is known."""
        return [module for module in self.left if module.name not in self._scores]

    def run(
        self, modules: Sequence[Module], everything: Sequence[Module], known: Mapping[str, Score]
    ) -> Iterator[tuple[str, Score]]:
        """Measures modules, as far as the question needs them.

        Args:
            modules: Those that may be measured, in the order in which they are begun.
            everything: All that the question is asked of.
            known: Scores that there are already.

        Yields:
            (name, score) as they are measured, in no particular order; one name again with a better score.
        """
        self._scores = dict(known)
        local = self._question is None or self._question.is_local
        if local:
            yield from self._measure(self._next(modules, self._open(modules)), follow=True)
            return
        missing = {module.name for module in modules if module.name not in known}
        tasks = self._next(modules, missing) if missing else self._next(modules, self._open(everything))
        while tasks:
            yield from self._measure(tasks, follow=False)
            left = {module.name for module in self.left}
            tasks = self._next(modules, self._open(everything) - left)

    def _next(self, modules: Sequence[Module], still_open: Set[str]) -> list[_Task]:
        """The next looks at those modules that are still open; those for which there is none are left."""
        following = []
        for module in modules:
            if module.name not in still_open:
                continue
            looks = looks_of(*module.shape)
            look = self._looked.get(module.name)
            if look is None:
                known = self._scores.get(module.name)
                # What is known from as many columns is not measured again.
                look = sum(count <= known.columns for count, _ in LOOKS) if known is not None else 0
            if looks == 0 and module.name not in self._looked:
                following.append(_Task(module, None))
            elif look < looks:
                following.append(_Task(module, look))
            else:
                self.left.append(module)
                continue
            self._looked[module.name] = look + 1
        return following

    def _open(self, modules: Sequence[Module]) -> Set[str]:
        """Names of modules of which nothing is known, or that are open and not to be decided by their estimates."""
        unknown = {module.name for module in modules if module.name not in self._scores}
        if self._question is None:
            return unknown
        resolution = self._precision.resolution
        scores = ChainMap(self._scores, dict.fromkeys(unknown, _ANYTHING))
        found = self._question.open_modules(modules, scores)
        return unknown | {
            name for name in found if resolution is None or not _is_within(scores[name], resolution)
        }

    def _measure(self, tasks: Sequence[_Task], *, follow: bool) -> Iterator[tuple[str, Score]]:
        """Takes looks in threads, and all that follow where that is asked for, until each module is settled or left."""
        waiting = deque(tasks)
        done: SimpleQueue[Future[_Sketched | Score]] = SimpleQueue()
        under_way: dict[Future[_Sketched | Score], _Task] = {}
        # torch's precision of products is one for all threads, so an accelerator is used by one.
        count = min(processors(), _MOST_THREADS) if self._device == "cpu" else 1
        executor = ThreadPoolExecutor(count, thread_name_prefix="safemerge-sketch")
        wait = True
        try:
            with one_thread_each():
                while waiting or under_way:
                    while waiting and len(under_way) < _UNDER_WAY * count:
                        task = waiting.popleft()
                        future = executor.submit(self._work, task)
                        under_way[future] = task
                        future.add_done_callback(done.put)
                    ready = [done.get()]
                    # Small modules come in quick succession, and cost less together.
                    time.sleep(_PATIENCE)
                    while not done.empty():
                        ready.append(done.get())
                    settled = [(under_way.pop(future), future.result()) for future in ready]
                    scores = dict(self._scored(settled))
                    self._scores.update(scores)
                    yield from scores.items()
                    if follow:
                        measured = [task.module for task, _ in settled]
                        waiting.extendleft(self._next(measured, self._open(measured)))
        except KeyboardInterrupt:
            wait = False
            raise
        finally:
            self._columns.stop()
            executor.shutdown(wait=wait and not interruption.was_received(), cancel_futures=True)
            self._columns = _engine.Columns(self._precision.seed)

    def _work(self, task: _Task) -> _Sketched | Score:
        opened = OpenedModule.of(self._models, task.module, self._delta_reference)
        if task.look is None:
            return score_small(opened)
        columns, tests = LOOKS[task.look]
        if self._device != "cpu":
            from .sketch_torch import measure

            on_device = measure(
                self._models,
                task.module,
                self._columns,
                look=task.look,
                columns=columns,
                tests=tests,
                delta_reference=self._delta_reference,
                device=self._device,
            )
            return _Sketched(opened, on_device)
        moments = self._columns.measure(
            opened.roles["base"],
            opened.roles["aligned"],
            opened.roles["finetuned"],
            look=task.look,
            columns=columns,
            tests=tests,
            against_base=self._delta_reference == "base",
            transposed=task.module.transposed,
        )
        return _Sketched(opened, moments)

    def _scored(self, found: Sequence[tuple[_Task, _Sketched | Score]]) -> Iterator[tuple[str, Score]]:
        """The scores of what was found; of a module whose columns say nothing there is none."""
        by_look: dict[int, list[_Sketched]] = {}
        for task, result in found:
            if isinstance(result, Score):
                yield task.module.name, result
                continue
            sums = result.moments
            undefined = result.opened.undefined(sums.v_squares, sums.delta_squares, sums.weight_squares)
            if undefined is None and task.look is not None:
                by_look.setdefault(task.look, []).append(result)
            elif undefined is not None:
                score = replace(_norms(result), undefined=undefined.reason, nonfinite=undefined.nonfinite)
                yield task.module.name, score
        for look, results in by_look.items():
            yield from self._estimated(look, results)

    def _estimated(self, look: int, results: Sequence[_Sketched]) -> Iterator[tuple[str, Score]]:
        moments = _together(results)
        estimate, chance = estimate_rho(moments), chance_of(moments)
        failure = failure_at(look, self._precision.failure, self._decided, sides=2)
        half_widths = estimate.half_width(failure)
        for number, result in enumerate(results):
            width, log_rho = float(half_widths[number]), float(estimate.log_rho[number])
            name = result.opened.module.name
            if not math.isfinite(width):
                continue
            low, high = math.exp(log_rho - width), min(1.0, math.exp(log_rho + width))
            before = self._scores.get(name)
            if before is not None and before.rho_low is not None and before.rho_high is not None:
                # Both intervals hold ρ.
                low, high = max(low, before.rho_low), min(high, before.rho_high)
            if low > high:
                # One of them does not: this happens about as often as the probability of failure says.
                continue
            yield (
                name,
                replace(
                    _norms(result),
                    undefined=None,
                    rho=max(low, min(high, math.exp(log_rho))),
                    rho_low=low,
                    rho_high=high,
                    rho_null=_known(chance.rho_null[number]),
                    rho_null_estimated=True,
                    null_sd=_known(chance.deviation[number]),
                    columns=LOOKS[look][0],
                ),
            )


def _norms(result: _Sketched) -> Score:
    """A score without ρ: what the passes give exactly."""
    sums, dtypes = result.moments, result.opened.dtypes
    v_norm, delta_norm = _root(sums.v_squares), _root(sums.delta_squares)
    weight_norm = _root(sums.weight_squares)
    return Score(
        rho=None,
        rho_null=None,
        v_norm=v_norm,
        delta_norm=delta_norm,
        weight_norm=weight_norm,
        v_rounding=v_rounding(dtypes["base"], dtypes["aligned"], weight_norm, v_norm),
        undefined="not measured",
        cos_v_delta=signed_cosine(sums.inner, v_norm, delta_norm),
    )


def _together(results: Sequence[_Sketched]) -> Moments:
    """The moments of several modules as one batch."""
    first = results[0].moments
    columns, tests = first.columns, first.tests
    width = columns + tests
    grams = np.frombuffer(b"".join(result.moments.grams for result in results)).reshape(-1, 3, width, width)
    cross = np.frombuffer(b"".join(result.moments.cross for result in results)).reshape(-1, tests, columns)
    image = np.frombuffer(b"".join(result.moments.image for result in results)).reshape(-1, tests, tests)
    # [Y | P] and [X | KP] beside each other: the products of K's powers are the blocks of one Gram matrix.
    gram = np.empty((len(results), 2 * width, 2 * width))
    gram[:, :width, :width] = grams[:, 0]
    gram[:, :width, width:] = gram[:, width:, :width] = grams[:, 1]
    gram[:, width:, width:] = grams[:, 2]
    # KPᵀY of the very KP that the image is made of.
    gram[:, width + columns :, :columns] = cross
    gram[:, :columns, width + columns :] = cross.swapaxes(1, 2)
    sums = np.array(
        [
            (m.v_squares, m.delta_squares, m.inner, m.weight_squares)
            for m in (result.moments for result in results)
        ]
    )
    shapes = np.array([result.opened.module.shape for result in results])
    return Moments(columns, tests, gram, image.copy(), *sums.T, *shapes.T)


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0.0 else math.nan


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _is_within(score: Score, resolution: float) -> bool:
    if score.rho is None or score.rho_low is None or score.rho_high is None:
        return True
    return score.rho_high <= score.rho * (1.0 + resolution) and score.rho_low >= score.rho * (
        1.0 - resolution
    )
