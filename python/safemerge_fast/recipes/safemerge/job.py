"""SafeMERGE as a job: models opened and paired, modules scored and decided, and what the output is made of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ... import _engine
from ...analysis import analyze_rows
from ...analysis.accelerator import device_name
from ...analysis.rounding import rounding_warning
from ...analysis.score import Score
from ...analysis.scores import Scores, describe_source
from ...checkpoint.adapter import Adapter
from ...checkpoint.identical import same_weights
from ...checkpoint.model import Model
from ...decision import Decision, decide, decision_of, uncertified
from ...decision.outlook import outcome, shrinks_all
from ...errors import AdapterError, PlanError
from ...execution.companions import companion_files
from ...execution.inputs import describe_inputs, job_identity
from ...pairing.coverage import coverage_of
from ...pairing.module import Module, modules_of_rows
from ...pairing.row import Row
from ...pairing.rows import Pairing, pair
from ...plan.blend import Blends, Composer, Summing
from ...plan.checkpoint import plan_checkpoint
from ...plan.encoding import Encode
from ...plan.layout import SINGLE_FILE, Shard
from ...plan.masked import Masked
from ...plan.methods import known_methods
from ...plan.pieces import compose_row
from ...plan.plan import build_plan
from ...progress import ProgressCallback, ProgressEvent
from ...report.report import ModuleWarning, Report
from ..base import CheckpointContents, Contents, Job, Measurement
from ..mask import MASK, MaskFile, open_mask
from ..role_check import refuse_or_warn
from ..roles import access_of, open_roles, shape_of_repair
from ..shape import OutputShape
from .adapter.contents import AdapterContents
from .adapter.experts import require_parameters
from .adapter.layout import lay_out_adapter, require_linear
from .alphas import open_alphas
from .blend import method_parameters, safemerge
from .card import model_card
from .evidence import ScoreLog
from .given import given_scores, needed_scores
from .rule import read_modules
from .scoring import judge_scores, require_finite, wrong_before_measuring
from .settings import SafemergeSettings, precision_of

__all__ = ["SafemergeJob"]

# Blocks of the analysis: elements of a block, and how many there are; and torch itself, as measured.
_BLOCK_BYTES = 3 * 4 * (4 << 20)
_TORCH_BYTES = 400_000_000


class SafemergeJob(Job[SafemergeSettings]):
    """A merge, ready to start.

    Attributes:
        pairing: One row per output tensor.
        shape: What a checkpoint's tensors and files are like.
        rule: The rule of the decision.
        alphas: α of every module.
        blend: What merged tensors are made of, with the usual α.
        unmasked: What each tensor is made of, with its own α.
        composer: The same, under a mask if there is one.
        scores: Scores to reuse, or None if they are to be computed.
        mask: How much of each element is merged; None for all of it.
    """

    _not_in_the_mask: tuple[str, ...] = ()

    def __init__(self, settings: SafemergeSettings) -> None:
        """Opens the models and pairs their tensors; only headers are read.

        Raises:
            CheckpointError: A model cannot be found, read or trusted.
            AdapterError: An adapter cannot be merged exactly, or not into an adapter, or base or aligned is one.
            PairingError: The models do not fit together.
            PlanError: A setting is of no use to the output's format.
            AnalysisError: The scores to reuse cannot be read, or are not of these models.
            RoleError: Two roles are one model, finetuned is a part of a model, or nothing is analysed.
        """
        self.settings = settings
        parameters = method_parameters(
            settings.method, density=settings.density, seed=settings.seed, parameters=settings.parameters
        )
        self.models = open_roles(settings.roles(), access_of(settings))
        self.shape = OutputShape.of(settings)
        self.pairing: Pairing = pair(
            self.models,
            include=settings.include,
            exclude=settings.exclude,
            missing=self.shape.missing,
            untie=self.shape.untie,
        )
        self.unused = self.pairing.unused
        self.coverage = coverage_of(self.pairing.rows)
        self.scores: Scores | None = None
        if settings.scores is not None:
            self.scores = given_scores(settings.scores, self.models, settings.delta_reference)
        self.warnings = refuse_or_warn(
            wrong_before_measuring(self.models, self.pairing, force=settings.force), force=settings.force
        )
        self.rule = settings.rule()
        if settings.modules is not None:
            self.rule = replace(self.rule, modules=read_modules(settings.modules, self.pairing.rows))
        self.rule.check_units(self.pairing.rows)
        self.alphas = open_alphas(settings.alpha, settings.alpha_file, self.pairing.rows)
        make = partial(
            safemerge,
            safe_role="safe" if "safe" in self.models else "aligned",
            method=settings.method,
            parameters=parameters,
        )
        self.blend = make(self.alphas.usual)
        self.unmasked: Summing = self.blend
        if self.alphas.others:
            self.unmasked = Blends(self.alphas.of, make, kept=self.blend.kept)
        self.composer: Composer = self.unmasked
        idle = () if self.rule.idle is None else (self.rule.idle,)
        self.notes = (*self.pairing.notes, *idle, *self._role_notes())
        self.mask: MaskFile | None = None
        if settings.mask is not None:
            self.mask = open_mask(settings.mask, self.pairing.rows, access_of(settings))
            self.models = {**self.models, MASK: self.mask.model}
            self.composer = Masked(self.composer, MASK)
            self.notes = (*self.notes, *self.mask.notes)
            self.unused = {**self.unused, MASK: self.mask.unused}
        self._check_output_format()
        self._check_method()

    @property
    def analysed(self) -> list[Row]:
        """The rows whose modules have, or will have, a score."""
        return [row for row in self.pairing.rows if row.analysed]

    @property
    def modules(self) -> list[Module]:
        """The modules that have, or will have, a score."""
        return list(modules_of_rows(self.pairing.rows))

    @property
    def host(self) -> Model:
        """The checkpoint that the output is shaped like: the fine-tuned, or the aligned one for an adapter."""
        return shape_of_repair(self.models)

    @property
    def tokenizer(self) -> Model:
        """The fine-tuned model, which may have tokens of its own."""
        return self.models["finetuned"]

    @property
    def writes_adapter(self) -> bool:
        """Whether the output is an adapter, not a checkpoint."""
        return self.settings.output_format == "adapter" or (
            self.settings.output_format == "auto"
            and known_methods()[self.settings.method].sums
            and self.settings.mask is None
            and not self._checkpoints()
        )

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters among the models, the fine-tuned one first."""
        found = ((role, self.models.get(role)) for role in ("finetuned", "safe"))
        return {role: model for role, model in found if isinstance(model, Adapter)}

    def identity(self) -> str:
        """A digest of settings, inputs and, where they are given, scores; of what files hold, not of their names."""
        named = ("modules", "alpha", "alpha_file")
        deciding = {name: value for name, value in self.settings.deciding().items() if name not in named}
        extra = {
            "scores": None if self.scores is None else self.scores.to_json(),
            "modules": None if self.rule.modules is None else sorted(self.rule.modules),
            "alpha": self.alphas.to_json(),
        }
        return job_identity(self.settings.recipe, deciding, self.models, extra)

    def describe_inputs(self) -> dict[str, dict[str, Any]]:
        """Also which weights were measured, so that the report's scores can be used again."""
        described = describe_inputs(self.models)
        for role in ("base", "aligned", "finetuned"):
            described[role]["sample"] = describe_source(self.models[role])["sample"]
        return described

    @property
    def keeps_formats(self) -> bool:
        """Whether quantised tensors stay so."""
        return self.shape.encode is Encode.KEEP

    def companions(self) -> list[Any]:
        """Files to copy; beside an adapter lie its own."""
        if self.writes_adapter:
            return companion_files(self.models["finetuned"])
        return super().companions()

    def measure(self, directory: _engine.JobDirectory, tell: ProgressCallback) -> Measurement:
        """Scores what is analysed; scores that an earlier run measured, or that were given, are used again."""
        if (known := self.known_measurement()) is not None:
            return known
        started = time.perf_counter()
        scores = self._measured(directory, tell)
        device = device_name(self.settings.device) if self.analysed else None
        return Measurement(scores, device, time.perf_counter() - started, self._warnings(scores))

    def known_measurement(self) -> Measurement | None:
        """The scores that were given, if they settle all decisions."""
        if self.scores is None:
            return None
        scores = self._reused_scores()
        if self._wants_more(scores):
            return None
        return Measurement(scores, self.scores.device, 0.0, self._warnings(scores))

    @property
    def analysis_bytes(self) -> tuple[int, int]:
        """Bytes that the analysis reads once, and its Gram matrices, blocks and torch."""
        modules = self.modules
        if self.scores is not None or not modules:
            return 0, 0
        read = {
            (operand.source, operand.tensor)
            for module in modules
            for role in ("base", "aligned", "finetuned")
            for term in module.terms[role]
            for operand in (term.operand,)
        } | {
            (product.source, factor)
            for module in modules
            for term in module.terms["finetuned"]
            for product in term.operand.low_rank
            for factor in (product.a, product.b)
        }
        total = sum(self.models[source].headers.tensor(name).nbytes for source, name in read)
        # float32, the smaller side squared; a tall module needs two of them.
        gram = max(
            4 * min(rows, columns) ** 2 * (1 if rows <= columns else 2)
            for rows, columns in {module.stored for module in modules}
        )
        return total, _TORCH_BYTES + gram + _BLOCK_BYTES

    def contents(self, measurement: Measurement | None) -> Contents:
        """The merged checkpoint, or the merged adapter."""
        rows = self.pairing.rows
        if measurement is None:
            # Not known yet: assume the most that can be read.
            unknown = {reason: Decision(False, reason) for reason in {row.reason for row in rows}}
            decisions = {row.name: unknown[row.reason] for row in rows if not row.analysed}
            decisions |= {module.name: Decision(True, module.row.reason) for module in modules_of_rows(rows)}
        else:
            decisions = dict(self.decisions(measurement))
        return self.decided(decisions if self.mask is None else self._masked(decisions, self.mask))

    def decisions(self, measurement: Measurement) -> Mapping[str, Decision]:
        """What becomes of every module, and of tensors that have none, by name."""
        return decide(self.pairing.rows, measurement.scores, self.rule)

    def decided(self, decisions: Mapping[str, Decision]) -> Contents:
        """The output with these decisions, by the names of modules, and of tensors that have none."""
        rows, settings = self.pairing.rows, self.settings
        if self.writes_adapter:
            adapters = self.adapters
            layout = lay_out_adapter(rows, decisions, self.unmasked, adapters, self.models["aligned"])
            return AdapterContents(
                self.models, self.pairing, [*adapters.values()], layout, decisions, settings
            )
        plan, config = plan_checkpoint(
            self.models,
            rows,
            lambda row: compose_row(self.composer, row, decisions),
            host=self.host,
            dtype=settings.dtype,
            max_shard_size=self.shape.max_shard_size,
            encode=self.shape.encode,
            config=self.pairing.config,
        )
        remarks = self._not_in_the_mask
        if not any(decision.merge for decision in decisions.values()):
            remarks = (
                *remarks,
                "no tensor was merged: the output holds the fine-tuned weights as they are",
            )
        return CheckpointContents(
            plan,
            lambda row: decision_of(row, decisions),
            self.host,
            config,
            read_backend=settings.read_backend,
            remarks=remarks,
            module_decisions=decisions,
        )

    def _masked(self, decisions: Mapping[str, Decision], mask: MaskFile) -> Mapping[str, Decision]:
        """The decisions, but that what the mask does not have is kept."""
        owner = {module.name: module.row.name for module in self.modules}
        absent = {
            name: owner.get(name, name)
            for name, decision in decisions.items()
            if decision.merge and owner.get(name, name) not in mask.names
        }
        self._not_in_the_mask = mask.without(absent.values())
        kept = {name: Decision(False, f"kept: not in the mask ({decisions[name].reason})") for name in absent}
        return {**decisions, **kept}

    def card(self, report: Report) -> str:
        """The model card."""
        return model_card(report, self.settings, self.models, self.alphas, self.rule)

    def page(self, report: Report) -> Iterable[bytes]:
        """The report as an HTML file."""
        from ...report.html.merge import report_page

        return report_page(report, self.models, self.rule)

    def _reused_scores(self) -> dict[str, Score]:
        """Those of the given scores that this job needs; the file may hold more."""
        if self.scores is None:
            return {}
        return needed_scores(
            self.scores,
            [module.name for module in self.modules],
            self.settings.scores or "",
            allow_nonfinite=self.settings.allow_nonfinite,
        )

    def _wants_more(self, scores: Mapping[str, Score]) -> bool:
        """Whether given scores do not do: an interval leaves a decision open, or ρ itself was asked for."""
        if self.settings.estimator == "exact":
            return any(score.columns for score in scores.values())
        return self.settings.estimator == "auto" and bool(self.rule.open_modules(self.modules, scores))

    def _measured(self, directory: _engine.JobDirectory, tell: ProgressCallback) -> dict[str, Score]:
        precision = precision_of(self.settings)
        log = ScoreLog(
            directory, self.models, delta_reference=self.settings.delta_reference, precision=precision
        )
        names = [module.name for module in self.modules]
        # What was given, and what an earlier run measured beyond it.
        scores = self._reused_scores()
        scores |= {name: log.known[name] for name in names if name in log.known}
        if not self.settings.allow_nonfinite:
            for name, score in scores.items():
                require_finite(name, score)
        tell(ProgressEvent("analysis", len(scores), len(names), ""))
        for name, score in analyze_rows(
            self.models,
            self.analysed,
            known=scores,
            delta_reference=self.settings.delta_reference,
            device=self.settings.device,
            precision=precision,
            question=self.rule,
        ):
            if not self.settings.allow_nonfinite:
                require_finite(name, score)
            log.append(name, score)
            scores[name] = score
            tell(ProgressEvent("analysis", len(scores), len(names), name))
        return {name: scores[name] for name in names}

    def _warnings(self, scores: Mapping[str, Score]) -> tuple[ModuleWarning, ...]:
        """What the scores say of the roles, and task vectors near the dtype's resolution.

        Raises:
            RoleError: The models are not what their roles say.
        """
        found = judge_scores(self.models, scores, self.settings.delta_reference)
        rounding = ((name, rounding_warning(name, score)) for name, score in scores.items())
        return (
            *refuse_or_warn(found.wrong, force=self.settings.force),
            *(ModuleWarning(None, sentence) for sentence in found.unknown),
            *self._rule_warnings(scores),
            *(ModuleWarning(name, message) for name, message in rounding if message is not None),
        )

    def _rule_warnings(self, scores: Mapping[str, Score]) -> list[ModuleWarning]:
        """What intervals do not settle, and a rule that does no more than shrink all of the update."""
        said = [uncertified(self.pairing.rows, scores, self.rule)]
        if "safe" not in self.models:
            said.append(shrinks_all(outcome(self.modules, scores, self.rule)))
        return [ModuleWarning(None, sentence) for sentence in said if sentence is not None]

    def _role_notes(self) -> list[str]:
        if "safe" in self.models and not same_weights(
            self.models["safe"], self.models["aligned"], read=not self.settings.force
        ):
            return []
        given = "the safe model is the aligned one" if "safe" in self.models else None
        return [
            f"{given or 'no safe model was given, so the aligned one plays it'}: merging shrinks a module's update "
            f"to {self.alphas.describe()} of itself"
        ]

    def _checkpoints(self) -> list[str]:
        """Those of the roles that are merged whose model is no adapter."""
        return [role for role in ("finetuned", "safe") if role in self.models and role not in self.adapters]

    def _check_output_format(self) -> None:
        """Refuses what the output's format cannot hold, before any long work."""
        settings = self.settings
        if self.writes_adapter:
            if whole := self._checkpoints():
                raise AdapterError(
                    f"an adapter is made of adapters only, but {whole[0]} is a full checkpoint; "
                    f"pass --output-format checkpoint"
                )
            for name in ("max_shard_size", "allow_missing", "fill_from", "untie"):
                if getattr(settings, name) not in (None, False):
                    raise PlanError(f"{name} is for checkpoints, but the output is an adapter; leave it out")
            require_linear(self.pairing.rows)
            require_parameters(self.adapters, self.models["aligned"], compat=settings.compat)
            return
        for name in ("adapter_rank", "compat"):
            if getattr(settings, name) is not None:
                raise PlanError(
                    f"{name} is for adapters, but the output is a checkpoint; leave it out, or give adapters as "
                    f"finetuned and safe with output_format adapter"
                )

    def _check_method(self) -> None:
        """Lets the engine look at the method's parameters for each tensor that may be merged, before any long work."""
        blend = self.blend
        if blend.base is None:
            return
        rows = tuple(
            row
            for row in self.analysed
            if all(row.has(role) for role in blend.roles)
            and (self.mask is None or row.name in self.mask.names)
        )
        if rows:
            merged = Decision(merge=True, reason="may be merged")
            trial = build_plan(
                self.models,
                [Shard(SINGLE_FILE, rows)],
                lambda row: compose_row(self.composer, row, lambda _: merged),
                anchor=self.host.role,
                dtype=self.settings.dtype,
            )
            sources = {role: model.headers for role, model in self.models.items()}
            _engine.Plan(trial.to_json(), sources=sources, read_backend=self.settings.read_backend)
