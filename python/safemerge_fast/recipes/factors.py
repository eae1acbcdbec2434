"""Recipes that add to matrices what is left of a difference of two models when its rank is cut: W + κ·SVD_k(X - Y)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Generic, TypeVar

import msgspec

from .. import _engine
from ..checkpoint.model import FLOATS, Model
from ..decision import Decision
from ..errors import PairingError
from ..execution.derived import DERIVED, DERIVED_DIRECTORY, DerivedTensors, Outline, Shapes, derived_bytes
from ..pairing.coverage import why_nothing_is_analysed
from ..pairing.missing import FILLED
from ..pairing.module import Module, slices_of
from ..pairing.row import Row
from ..pairing.rows import pair
from ..plan.checkpoint import plan_checkpoint
from ..plan.corrected import Corrected, factor_names
from ..plan.operation import Operation
from ..plan.pieces import Pieces, compose_row
from ..progress import ProgressCallback, ProgressEvent
from ..report.report import ModuleWarning
from ..settings import RunSettings, Setting
from .base import CheckpointContents, Contents, Measurement
from .planned import PlannedJob
from .role_check import incomplete_model, refuse_or_warn, same_models
from .roles import access_of, open_roles
from .shape import OutputShape

__all__ = ["FactorJob", "Iterations", "Rank"]

Rank = Annotated[int, Setting("k: the largest singular values and their vectors that are taken.", least=1)]
Iterations = Annotated[
    int,
    Setting(
        "Most power iterations of the randomized SVD; a matrix whose SVD is not settled by then is warned about.",
        least=1,
        most=1000,
    ),
]

_Settings = TypeVar("_Settings", bound=RunSettings)

# torch itself, as measured.
_TORCH_BYTES = 400_000_000
# A part of the product that is missing beyond this is told of.
_UNSETTLED = 1e-5


class FactorJob(PlannedJob[_Settings], Generic[_Settings]):
    """A job of such a recipe.

    Attributes:
        minuend: X, a role.
        subtrahend: Y, likewise.
        kept: W, the role that the output is shaped like.
        scale: κ.
        rank: k at most, where a matrix has that many singular values.
        iterations: Power iterations at most.
        device: Where the factors are computed.
        changed: What is done to a tensor, in words for the report.
        selected: Names of the tensors that are changed.
    """

    minuend: str
    subtrahend: str
    kept: str
    scale: float
    rank: int
    iterations: int
    device: str
    changed: str
    selected: frozenset[str]
    _derived: DerivedTensors | Outline | None = None

    def open(
        self,
        settings: _Settings,
        roles: Mapping[str, str],
        shape: OutputShape,
        *,
        include: str | None,
        exclude: str | None,
        force: bool,
    ) -> None:
        """Opens the models and pairs their tensors; only headers are read. The attributes above are set before.

        Args:
            settings: What was asked for.
            roles: What was given for each role.
            shape: What the output's tensors and files are like.
            include: Tensors that are changed too, as the pairing takes it.
            exclude: Tensors that are left alone.
            force: Whether two roles may be one model.

        Raises:
            CheckpointError: A model cannot be found, read or trusted.
            AdapterError: An adapter does not fit the aligned model.
            PairingError: The models do not fit together, or there is no matrix to change.
            RoleError: Two roles are one model, or one is a part of a model.
        """
        self.settings = settings
        self.models = open_roles(roles, access_of(settings))
        pairing = pair(
            self.models,
            include=include,
            exclude=exclude,
            missing=shape.missing,
            untie=shape.untie,
            shaped_like=self.kept,
        )
        wrong = same_models(self.models, force=force)
        if "finetuned" in self.models:
            wrong = (*wrong, *incomplete_model(self.models, pairing.unused))
        self.warnings = refuse_or_warn(wrong, force=force)
        if not any(row.analysed for row in pairing.rows):
            raise PairingError(f"nothing to change: {why_nothing_is_analysed(pairing.rows)}")
        self.selected = frozenset(row.name for row in pairing.rows if row.analysed)
        # Nothing of them is measured for the report.
        self.rows = tuple(
            msgspec.structs.replace(row, analysed=False) if row.analysed else row for row in pairing.rows
        )
        self.unused, self.notes, self.config = pairing.unused, pairing.notes, pairing.config
        self.dtype, self.max_shard_size, self.encode = shape.dtype, shape.max_shard_size, shape.encode

    @property
    def tokenizer(self) -> Model:
        """The model that is changed, which may have tokens of its own."""
        return self.models[self.kept]

    @property
    def modules(self) -> Iterator[Module]:
        """The matrices that are changed."""
        for row in self.rows:
            if row.name in self.selected:
                yield from slices_of(row)

    def decision(self, row: Row) -> Decision:
        """The selected matrices are changed."""
        if row.name in self.selected:
            return Decision(True, self.changed)
        if row.reason == FILLED:
            return Decision(False, FILLED)
        if row.dtype not in FLOATS:
            return Decision(False, f"{row.dtype} cannot be changed: kept")
        return Decision(False, f"{row.reason}: kept")

    def operation(self, row: Row) -> Operation | Pieces:
        """The tensor with its product, or a copy."""
        return compose_row(self._corrected, row, self.decision)

    def measure(self, directory: _engine.JobDirectory, tell: ProgressCallback) -> Measurement:
        """Computes the factors that an earlier run has not."""
        started = time.perf_counter()
        derived = DerivedTensors(directory, self._shapes)
        missing = set(derived.missing)
        device = None
        if missing:
            device = self._compute(derived, missing, tell)
        self._derived = derived
        return Measurement({}, device, time.perf_counter() - started, self._unsettled(derived))

    @property
    def analysis_bytes(self) -> tuple[int, int]:
        """Bytes of the two models' matrices, and what a decomposition and torch take."""
        from_roles = (self.minuend, self.subtrahend)
        read = {
            (operand.source, operand.tensor)
            for module in self.modules
            for role in from_roles
            for term in module.terms[role]
            for operand in (term.operand,)
        }
        total = sum(self.models[source].headers.tensor(name).nbytes for source, name in read)
        # Whichever is smaller: a matrix that is kept whole, or the blocks of a large one.
        largest = max(module.stored[0] * module.stored[1] for module in self.modules)
        return total, _TORCH_BYTES + 4 * min(largest, 64 << 20)

    def derived_bytes(self, measurement: Measurement | None) -> int:
        """Bytes of the factors."""
        return derived_bytes(self._shapes)

    def contents(self, measurement: Measurement | None) -> Contents:
        """The checkpoint that the plan makes, with the factors beside it."""
        if self._derived is None:
            self._derived = Outline(self._shapes)
        plan, config = plan_checkpoint(
            {**self.models, DERIVED: self._derived.model()},
            self.rows,
            self.operation,
            host=self.host,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            encode=self.encode,
            config=self.config,
            beside={DERIVED: DERIVED_DIRECTORY},
        )
        return CheckpointContents(
            plan,
            self.decision,
            self.host,
            config,
            read_backend=self.settings.read_backend,
            derived=self._derived,
        )

    @cached_property
    def _ranks(self) -> dict[str, int]:
        """By module, the rank of its product."""
        return {module.name: min(self.rank, *module.stored) for module in self.modules}

    @cached_property
    def _shapes(self) -> Shapes:
        """Of each matrix the factors, and what is missing of their product."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module in self.modules:
            a, b = factor_names(module.name)
            (d_out, d_in), rank = module.shape, self._ranks[module.name]
            shapes |= {a: (rank, d_in), b: (d_out, rank), f"{module.name}{_ERROR}": (1,)}
        return shapes

    @cached_property
    def _corrected(self) -> Corrected:
        plain = self.kept if self.host.role == self.kept else self.host.role
        return Corrected(self.kept, DERIVED, self.scale, self._ranks, plain)

    def _compute(self, derived: DerivedTensors, missing: set[str], tell: ProgressCallback) -> str:
        names = [module.name for module in self.modules]
        total = len(names)
        tell(ProgressEvent("analysis", 0, total, ""))
        # torch is imported here, and not to plan a job.
        from ..analysis.truncated_svd import open_workspace, truncate

        workspace = open_workspace(self.device)
        for number, module in enumerate(self.modules, start=1):
            a, b = factor_names(module.name)
            error = f"{module.name}{_ERROR}"
            if error in missing:
                found = truncate(
                    self.models,
                    module,
                    self._ranks[module.name],
                    minuend=self.minuend,
                    subtrahend=self.subtrahend,
                    workspace=workspace,
                    iterations=self.iterations,
                )
                for name, numbers in ((a, found.a), (b, found.b), (error, found.missing())):
                    if name in missing:
                        derived.append(name, (numbers.contiguous().numpy().tobytes(),))
            tell(ProgressEvent("analysis", number, total, module.name))
        return str(workspace.device)

    def _unsettled(self, derived: DerivedTensors) -> tuple[ModuleWarning, ...]:
        """Matrices whose decomposition was given up."""
        errors = {module.name: derived.first(f"{module.name}{_ERROR}") for module in self.modules}
        worst = sorted((error, name) for name, error in errors.items() if error > _UNSETTLED)
        return tuple(
            ModuleWarning(
                name,
                f"{name}: its singular values are too close for {self.iterations} iterations: about {error:.1e} of the "
                f"product of rank {self._ranks[name]} is missing; raise iterations, or take another rank",
            )
            for error, name in reversed(worst)
        )


_ERROR = ".error"
