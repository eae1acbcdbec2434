"""What a recipe is: settings, and a job that opens models, may measure, and says what tensors are made of."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from .. import _engine
from ..analysis.score import Score
from ..checkpoint.model import Model
from ..decision import Decision
from ..execution.companions import companion_files, configuration_file
from ..execution.derived import DERIVED_FILE, DerivedTensors, Outline
from ..execution.executor import Executor
from ..execution.inputs import describe_inputs, job_identity
from ..execution.local import check_plan
from ..execution.written import Written
from ..pairing.coverage import Coverage
from ..pairing.row import Row
from ..plan.layout import INDEX_FILE, output_dtype
from ..plan.pieces import Pieces
from ..plan.plan import PLAN_FILE, Plan
from ..progress import ProgressCallback
from ..report.modules import module_records
from ..report.report import ModuleWarning, Report
from ..report.tensors import TensorReport, TensorReports, tensor_report
from ..settings import RunSettings, Settings, fields_of

__all__ = ["CheckpointContents", "Contents", "Job", "Measurement", "Recipe", "entry"]

_Settings = TypeVar("_Settings", bound=RunSettings)
_Record = TypeVar("_Record", bound=Settings)
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class Contents(Protocol):
    """What an output consists of: weights, and the small files that make them loadable."""

    @property
    def weight_files(self) -> Sequence[str]:
        """Names of the files of weights."""

    @property
    def bytes_read(self) -> int:
        """Bytes of the models that are read."""

    @property
    def bytes_written(self) -> int:
        """Bytes of the weights."""

    def memory(self, run: RunSettings) -> int:
        """Bytes that writing takes at its peak, Python itself apart."""

    def write(
        self,
        directory: _engine.JobDirectory,
        run: RunSettings,
        tell: ProgressCallback,
        executor: Executor,
    ) -> Written:
        """Writes the weights.

        Args:
            directory: Where to.
            run: How to work.
            tell: Called with ProgressEvents.
            executor: Who executes a plan.
        """

    def handed_out(self) -> Plan | None:
        """The plan, if others may execute it; None where there is nothing to hand out."""

    def small_files(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Name and bytes, in pieces, of every small file."""

    def tensors(self, scores: Mapping[str, Score], written: Written | None = None) -> Sequence[TensorReport]:
        """What the report says of the tensors."""

    def adapter(self) -> Mapping[str, Any] | None:
        """What the report says of an adapter; None for a checkpoint."""

    def notes(self) -> Sequence[str]:
        """What a person should know of them, once they are written."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a job found out by reading weights, before it decides.

    Attributes:
        scores: Scores by module name.
        device: Where they were computed, or None.
        seconds: How long that took in this run.
        warnings: What to mistrust.
    """

    scores: Mapping[str, Score]
    device: str | None = None
    seconds: float = 0.0
    warnings: tuple[ModuleWarning, ...] = ()


class Job(ABC, Generic[_Settings]):
    """One run of a recipe, its models opened and their tensors paired; nothing is read but headers.

    Attributes:
        settings: What was asked for.
        models: The models by role.
        notes: What a person should know, in sentences.
        unused: By role, tensors that nothing is made of.
        warnings: What to mistrust, as far as that is known before anything is measured.
        coverage: How much of the model is analysed; None where nothing is measured.
    """

    settings: _Settings
    models: Mapping[str, Model]
    notes: tuple[str, ...] = ()
    unused: Mapping[str, tuple[str, ...]] = {}
    warnings: tuple[ModuleWarning, ...] = ()
    coverage: Coverage | None = None

    @property
    @abstractmethod
    def host(self) -> Model:
        """The model that the output is shaped like; its configuration and other files are taken over."""

    @property
    def tokenizer(self) -> Model:
        """The model whose tokenizer wins, if it has one."""
        return self.host

    @property
    def keeps_formats(self) -> bool:
        """Whether quantised tensors stay so."""
        return False

    def identity(self) -> str:
        """A digest of all that decides the output."""
        return job_identity(self.settings.recipe, self.settings.deciding(), self.models)

    def describe_inputs(self) -> dict[str, dict[str, Any]]:
        """What the report says of the models, by role."""
        return describe_inputs(self.models)

    def companions(self) -> list[tuple[Path, str]]:
        """Files to copy, and their names in the output."""
        return companion_files(self.host, self.tokenizer, keeps_formats=self.keeps_formats)

    def measure(self, directory: _engine.JobDirectory, tell: ProgressCallback) -> Measurement:
        """Reads what the decisions depend on; most recipes decide nothing.

        Args:
            directory: Holds what an earlier, unfinished run measured, and is told what this one does.
            tell: Called with ProgressEvents.
        """
        return Measurement({})

    def known_measurement(self) -> Measurement | None:
        """What measure would return, if that is known without reading weights; else None."""
        return Measurement({})

    @property
    def analysis_bytes(self) -> tuple[int, int]:
        """Bytes that measuring would read, and memory that it would take."""
        return 0, 0

    def derived_bytes(self, measurement: Measurement | None) -> int:
        """Bytes of what is computed from the models and carried by the output; the argument is as for contents."""
        return 0

    @abstractmethod
    def contents(self, measurement: Measurement | None) -> Contents:
        """Says what the output consists of.

        Args:
            measurement: What measure returned; None assumes the most that could be written, before anything is
                measured.
        """

    @abstractmethod
    def card(self, report: Report) -> str:
        """The model card, README.md."""

    def page(self, report: Report) -> Iterable[bytes] | None:
        """The report as an HTML file, in pieces; None where nothing is decided by measurements."""
        return None


@dataclass(frozen=True, slots=True)
class Recipe(Generic[_Settings]):
    """Something that can be made.

    Attributes:
        name: Its name in files.
        summary: What it does, in a sentence or two.
        settings: The record of its settings.
        open: Opens the models and pairs their tensors.
        read: Makes settings of a document that names no recipe but is one of this one's, given the document and
            the settings of the run; None if such a document is not this one's. Recipes that are named have none.
    """

    name: str
    summary: str
    settings: type[_Settings]
    open: Callable[[_Settings], Job[_Settings]]
    read: Callable[[str, Mapping[str, Any], Mapping[str, Any]], _Settings | None] | None = None


def entry(
    settings: Callable[_Parameters, _Record], run: Callable[[_Record], _Result], name: str, doc: str
) -> Callable[_Parameters, _Result]:
    """Makes the function of the Python API that takes settings as its arguments.

    Args:
        settings: The record's class, whose signature becomes the function's.
        run: What is done with a record.
        name: The function's name.
        doc: The beginning of its docstring; the arguments follow.
    """

    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        return run(settings(*args, **kwargs))

    call.__name__ = call.__qualname__ = name
    call.__signature__ = inspect.signature(settings)  # type: ignore[attr-defined]
    arguments = (
        f"    {field.name}: {field.setting.help}"
        + (f" None: {field.setting.default}." if field.setting.default else "")
        for field in fields_of(cast("type[Settings]", settings))
    )
    call.__doc__ = "\n".join([doc, "", "Args:", *arguments])
    return call


@dataclass(frozen=True, slots=True)
class CheckpointContents:
    """A checkpoint: a plan's shards, their index, the plan itself and config.json.

    Attributes:
        plan: The plan.
        decisions: Why each tensor is made as it is, by the row.
        module_decisions: Why each expert is that a tensor holds, by its name.
        host: The model whose config.json is taken over.
        config: What config.json says in place of the host's, if it is not to be that.
        read_backend: How inputs are read.
        remarks: What a person should know of them.
        derived: Tensors that were computed for the plan, which the output carries; an outline of them is not written.
    """

    plan: Plan
    decisions: Callable[[Row], Decision]
    host: Model
    config: Mapping[str, Any] | None = None
    read_backend: str = "auto"
    remarks: tuple[str, ...] = ()
    module_decisions: Mapping[str, Decision] = field(default_factory=dict)
    derived: DerivedTensors | Outline | None = None
    _plans: list[_engine.Plan] = field(default_factory=list, compare=False, repr=False)

    @property
    def weight_files(self) -> Sequence[str]:
        """Names of the files of weights."""
        return self.plan.files

    @property
    def bytes_read(self) -> int:
        """Bytes of the models that are read."""
        return self._checked().bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes of the weights."""
        return self._checked().bytes_written

    def memory(self, run: RunSettings) -> int:
        """Bytes that the engine takes at its peak."""
        budget = None if run.memory_budget is None else int(run.memory_budget)
        return self._checked().memory(threads=run.threads, memory_budget=budget)

    def write(
        self,
        directory: _engine.JobDirectory,
        run: RunSettings,
        tell: ProgressCallback,
        executor: Executor,
    ) -> Written:
        """Has the plan executed."""
        return executor.execute(self.plan, self._checked(), directory, run, tell)

    def handed_out(self) -> Plan | None:
        """The plan."""
        return self.plan

    def small_files(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """The plan, what was derived for it, config.json and the index."""
        yield PLAN_FILE, self.plan.pieces(published=True)
        if isinstance(self.derived, DerivedTensors):
            yield DERIVED_FILE, self.derived.pieces()
        configuration = configuration_file(self.host, self.plan.dtype, self.config)
        if configuration is not None:
            yield "config.json", (configuration,)
        if len(self.plan.layout) > 1:
            yield INDEX_FILE, self.plan.index_pieces()

    def tensors(self, scores: Mapping[str, Score], written: Written | None = None) -> Sequence[TensorReport]:
        """A record per output tensor, in the order of the files."""
        plan = self.plan
        descriptions = {operation: operation.describe() for operation in plan.operations}

        def make(start: int, stop: int) -> Iterator[TensorReport]:
            for shard, row, operation in plan.tensors(start, stop):
                yield tensor_report(
                    row,
                    file=shard.file,
                    dtype=output_dtype(row, plan.dtype),
                    operation=operation,
                    description=operation.describe()
                    if isinstance(operation, Pieces)
                    else descriptions[operation],
                    decision=self.decisions(row),
                    score=scores.get(row.name),
                    survival=None if written is None else written.survival.get(row.name),
                    retained=None if written is None else written.retained.get(row.name),
                    modules=module_records(row, self.module_decisions, scores),
                )

        return TensorReports(plan.count, make)

    def adapter(self) -> Mapping[str, Any] | None:
        """It is none."""
        return None

    def notes(self) -> Sequence[str]:
        """The remarks, and whether there is a configuration."""
        if configuration_file(self.host, "auto") is None:
            return (
                *self.remarks,
                f"the {self.host.role} model has no config.json, so the output has none either",
            )
        return self.remarks

    def _checked(self) -> _engine.Plan:
        """The plan as the engine has checked it, once."""
        if not self._plans:
            self._plans.append(check_plan(self.plan.to_json(), self.plan.models, self.read_backend))
        return self._plans[0]
