"""Safe LoRA as a job: modules scored and decided as SafeMERGE scores them, then projections computed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ... import _engine
from ...analysis import analyze_rows, low_rank_update
from ...analysis.accelerator import device_name
from ...analysis.precision import Precision
from ...analysis.score import Score
from ...analysis.scores import Scores
from ...checkpoint.adapter import Adapter
from ...checkpoint.model import Model
from ...decision import Decision, decide, decision_of, uncertified
from ...errors import AdapterError, AnalysisError, PlanError
from ...execution.companions import companion_files
from ...execution.derived import DERIVED, DERIVED_DIRECTORY, DerivedTensors, Outline, Shapes, derived_bytes
from ...execution.inputs import job_identity
from ...pairing.coverage import coverage_of
from ...pairing.module import Module, modules_of_rows
from ...pairing.operand import LowRank, Operand
from ...pairing.rows import pair
from ...plan.checkpoint import plan_checkpoint
from ...plan.encoding import Encode
from ...plan.pieces import compose_row
from ...plan.projected import Projected, product_names, update_name, update_operand
from ...progress import ProgressCallback, ProgressEvent
from ...report.card import count_table, recipe_card
from ...report.report import ModuleWarning, Report
from ...sizes import format_size
from ..base import CheckpointContents, Contents, Job, Measurement
from ..role_check import refuse_or_warn
from ..roles import access_of, open_roles, shape_of_repair
from ..safemerge.evidence import ScoreLog
from ..safemerge.given import given_scores
from ..safemerge.scoring import judge_scores, require_finite, wrong_before_measuring
from ..shape import OutputShape
from .adapter import ProjectedAdapter, is_plain, plan_adapter
from .settings import SafeLoraSettings

__all__ = ["SafeLoraJob"]

# Blocks of the analysis: elements of a block, and how many there are; and torch itself, as measured.
_BLOCK_BYTES = 4 * 4 * (4 << 20)
_TORCH_BYTES = 400_000_000
_BESIDE = {DERIVED: DERIVED_DIRECTORY}


class SafeLoraJob(Job[SafeLoraSettings]):
    """A projection, ready to start."""

    def __init__(self, settings: SafeLoraSettings) -> None:
        """Opens the models and pairs their tensors; only headers are read.

        Raises:
            CheckpointError: A model cannot be found, read or trusted.
            AdapterError: An adapter cannot be merged exactly, or not projected as one.
            PairingError: The models do not fit together.
            PlanError: A setting is of no use to the output's format.
            AnalysisError: The scores to reuse cannot be read, or are not of these models.
            RoleError: Two roles are one model, finetuned is a part of a model, or nothing is analysed.
        """
        self.settings = settings
        roles = {"base": settings.base, "aligned": settings.aligned, "finetuned": settings.finetuned}
        self.models = open_roles(roles, access_of(settings))
        self.shape = OutputShape.of(settings)
        self.pairing = pair(
            self.models,
            include=settings.include,
            exclude=settings.exclude,
            missing=self.shape.missing,
            untie=self.shape.untie,
        )
        self.unused, self.coverage = self.pairing.unused, coverage_of(self.pairing.rows)
        self.notes = self.pairing.notes
        self.scores: Scores | None = None
        if settings.scores is not None:
            self.scores = given_scores(settings.scores, self.models, "aligned")
        self.warnings = refuse_or_warn(
            wrong_before_measuring(self.models, self.pairing, force=settings.force), force=settings.force
        )
        self.rule = settings.rule()
        self.rule.check_units(self.pairing.rows)
        self.modules = list(modules_of_rows(self.pairing.rows))
        self._derived: DerivedTensors | None = None
        self._check_output_format()

    @property
    def host(self) -> Model:
        """The checkpoint that the output is shaped like: the fine-tuned, or the aligned one for an adapter."""
        return shape_of_repair(self.models)

    @property
    def tokenizer(self) -> Model:
        """The fine-tuned model, which may have tokens of its own."""
        return self.models["finetuned"]

    @property
    def keeps_formats(self) -> bool:
        """Whether quantised tensors stay so."""
        return self.shape.encode is Encode.KEEP

    @cached_property
    def products(self) -> Mapping[str, tuple[LowRank, ...]]:
        """By module, the products that its update is the sum of; none if it is anything else."""
        return {module.name: low_rank_update(module, "aligned") for module in self.modules}

    @cached_property
    def writes_adapter(self) -> bool:
        """Whether the output is an adapter, not a checkpoint."""
        wanted = self.settings.output_format
        return wanted == "adapter" or (wanted == "auto" and self._why_no_adapter() is None)

    def identity(self) -> str:
        """A digest of settings, inputs and, where they are given, scores."""
        extra = None if self.scores is None else self.scores.to_json()
        return job_identity(self.settings.recipe, self.settings.deciding(), self.models, extra)

    def companions(self) -> list[Any]:
        """Files to copy; beside an adapter lie its own."""
        if self.writes_adapter:
            return companion_files(self.models["finetuned"])
        return super().companions()

    def measure(self, directory: _engine.JobDirectory, tell: ProgressCallback) -> Measurement:
        """Scores what is analysed, decides, and projects; what an earlier run did is used again."""
        started = time.perf_counter()
        known = self.known_measurement()
        scores = self._measured(directory, tell) if known is None else known.scores
        warnings = self._warnings(scores)
        self._derived = DerivedTensors(directory, self._shapes(self._decide(scores)))
        self._project(self._derived, tell)
        device = device_name(self.settings.device)
        return Measurement(scores, device, time.perf_counter() - started, warnings)

    def known_measurement(self) -> Measurement | None:
        """The scores that were given, if they settle all decisions."""
        if self.scores is None:
            return None
        scores = self._reused(self.scores)
        if self.settings.estimator != "sketch" and self.rule.open_modules(self.modules, scores):
            return None
        return Measurement(scores, self.scores.device, 0.0, self._warnings(scores))

    @property
    def analysis_bytes(self) -> tuple[int, int]:
        """Bytes that scoring and projecting read once each, and Gram matrices, blocks and torch."""
        read = {
            (operand.source, operand.tensor)
            for module in self.modules
            for role in ("base", "aligned", "finetuned")
            for term in module.terms[role]
            for operand in (term.operand,)
        }
        total = sum(self.models[source].headers.tensor(name).nbytes for source, name in read)
        gram = max((4 * min(module.stored) ** 2 * 2 for module in self.modules), default=0)
        return total, _TORCH_BYTES + gram + _BLOCK_BYTES

    def derived_bytes(self, measurement: Measurement | None) -> int:
        """Bytes of the projections."""
        return derived_bytes(self._shapes(self._decided(measurement)))

    def contents(self, measurement: Measurement | None) -> Contents:
        """The checkpoint, or the adapter, with what was projected beside it."""
        decisions = self._decided(measurement)
        shapes = self._shapes(decisions)
        derived = self._derived or Outline(shapes)
        models = {**self.models, DERIVED: derived.model()} if shapes else self.models
        composer = self._composer(decisions)
        rows, settings = self.pairing.rows, self.settings
        remarks = self._remarks(decisions, shapes)
        finetuned = self.models["finetuned"]
        if self.writes_adapter and isinstance(finetuned, Adapter):
            b_of = {
                self.products[name][0].b: Operand(DERIVED, product_names(name, 0)[1])
                for name, decision in decisions.items()
                if decision.merge
            }
            return ProjectedAdapter(
                plan_adapter(models, finetuned, b_of, dtype=settings.dtype, beside=_BESIDE),
                lambda row: decision_of(row, decisions),
                finetuned,
                None,
                read_backend=settings.read_backend,
                remarks=remarks,
                module_decisions=decisions,
                derived=derived if shapes else None,
                rows=rows,
                composer=composer,
                ranks={name: products[0].rank for name, products in self.products.items()},
            )
        plan, config = plan_checkpoint(
            models,
            rows,
            lambda row: compose_row(composer, row, decisions),
            host=self.host,
            dtype=settings.dtype,
            max_shard_size=self.shape.max_shard_size,
            encode=self.shape.encode,
            config=self.pairing.config,
            beside=_BESIDE,
        )
        return CheckpointContents(
            plan,
            lambda row: decision_of(row, decisions),
            self.host,
            config,
            read_backend=settings.read_backend,
            remarks=remarks,
            module_decisions=decisions,
            derived=derived if shapes else None,
        )

    def card(self, report: Report) -> str:
        """The model card."""
        modules = [m for tensor in report.tensors if tensor.analysed for m in tensor.module_reports()]
        done = "B ← C·B" if report.adapter is not None else "Δ ← C·Δ"
        kind, _, amount = self.settings.select.partition(":")
        rule = {
            "lowest": f"the {amount} of lowest cos(C·Δ, Δ)",
            "fraction": f"the share {amount} of lowest cos(C·Δ, Δ)",
            "null": f"those whose cos(C·Δ, Δ) is at most {amount} times what chance gives",
            "z": f"those whose cos(C·Δ, Δ) is at most {amount} standard deviations of chance from what chance gives",
        }.get(kind, f"those with cos(C·Δ, Δ) ≤ {self.settings.threshold:g}")
        sentence = (
            f"{{finetuned}}, whose update Δ of {{aligned}} is projected onto the safety subspace ({done} with "
            f"C = V·Vᵀ/‖V‖ and V = W_aligned − W_base) in {sum(m.merged for m in modules)} of {len(modules)} matrices, "
            f"{rule} ([Safe LoRA](https://arxiv.org/abs/2405.16833))"
        )
        return recipe_card(report, self.models, sentence, tags=["safe-lora"], more=count_table(report.counts))

    def _decide(self, scores: Mapping[str, Score]) -> dict[str, Decision]:
        return decide(self.pairing.rows, scores, self.rule)

    def _decided(self, measurement: Measurement | None) -> dict[str, Decision]:
        """What is decided; where nothing is measured yet, the most that can be projected."""
        if measurement is not None:
            return self._decide(measurement.scores)
        decisions = {module.name: Decision(True, module.row.reason) for module in self.modules}
        rest = (row for row in self.pairing.rows if not row.analysed)
        return decisions | {row.name: Decision(False, row.reason) for row in rest}

    def _projected(self, decisions: Mapping[str, Decision]) -> list[Module]:
        return [module for module in self.modules if decisions[module.name].merge]

    def _shapes(self, decisions: Mapping[str, Decision]) -> Shapes:
        """What is derived with these decisions."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module in self._projected(decisions):
            d_out, d_in = module.shape
            for number, product in enumerate(self.products[module.name]):
                a, b = product_names(module.name, number)
                shapes |= {a: (product.rank, d_in), b: (d_out, product.rank)}
            if not self.products[module.name]:
                # Whichever way its rows are made.
                shapes[update_name(module.name)] = (d_in, d_out) if d_in > d_out else (d_out, d_in)
        return shapes

    def _composer(self, decisions: Mapping[str, Decision]) -> Projected:
        products, updates = {}, {}
        for module in self._projected(decisions):
            if not self.products[module.name]:
                d_out, d_in = module.shape
                updates[module.name] = update_operand(DERIVED, module, turned=d_in > d_out)
                continue
            products[module.name] = [
                LowRank(
                    DERIVED,
                    *product_names(module.name, number),
                    product.scale,
                    product.rank,
                    transpose=module.transposed,
                )
                for number, product in enumerate(self.products[module.name])
            ]
        return Projected("aligned", products, updates)

    def _project(self, derived: DerivedTensors, tell: ProgressCallback) -> None:
        """Computes what an earlier run has not."""
        missing = set(derived.missing)
        if not missing:
            return
        from ...analysis.projection import open_workspace, project_product, project_update

        workspace = open_workspace(self.settings.device)
        waiting = [
            module
            for module in self.modules
            if not missing.isdisjoint({update_name(module.name), product_names(module.name, 0)[1]})
            or any(
                set(product_names(module.name, n)) & missing for n in range(len(self.products[module.name]))
            )
        ]
        for number, module in enumerate(waiting):
            tell(ProgressEvent("analysis", number, len(waiting), module.name))
            products = self.products[module.name]
            if not products:
                rows = project_update(self.models, module, workspace=workspace)
                derived.append(
                    update_name(module.name), (part.contiguous().numpy().tobytes() for part in rows)
                )
                continue
            found = project_product(self.models, module, products, workspace=workspace)
            for place, factors in enumerate(found):
                for name, numbers in zip(product_names(module.name, place), factors, strict=True):
                    if name in missing:
                        derived.append(name, (numbers.contiguous().numpy().tobytes(),))

    def _reused(self, given: Scores) -> dict[str, Score]:
        if absent := [module.name for module in self.modules if module.name not in given.modules]:
            raise AnalysisError(
                f"{self.settings.scores} has no score for {absent[0]}; "
                f"write it again with analyze and the same --include and --exclude"
            )
        reused = {module.name: given.modules[module.name] for module in self.modules}
        for name, score in reused.items():
            if not self.settings.allow_nonfinite:
                require_finite(name, score)
        return reused

    def _measured(self, directory: _engine.JobDirectory, tell: ProgressCallback) -> dict[str, Score]:
        precision = Precision(self.settings.estimator)
        log = ScoreLog(directory, self.models, delta_reference="aligned", precision=precision)
        names = [module.name for module in self.modules]
        # What was given, and what an earlier run measured beyond it.
        scores = {} if self.scores is None else self._reused(self.scores)
        scores |= {name: log.known[name] for name in names if name in log.known}
        for name, score in scores.items():
            if not self.settings.allow_nonfinite:
                require_finite(name, score)
        tell(ProgressEvent("analysis", len(scores), len(names), ""))
        for name, score in analyze_rows(
            self.models,
            [row for row in self.pairing.rows if row.analysed],
            known=scores,
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
        found = judge_scores(self.models, scores, "aligned")
        open_decisions = uncertified(self.pairing.rows, scores, self.rule)
        return (
            *(() if open_decisions is None else (ModuleWarning(None, open_decisions),)),
            *refuse_or_warn(found.wrong, force=self.settings.force),
            *(ModuleWarning(None, sentence) for sentence in found.unknown),
        )

    def _remarks(self, decisions: Mapping[str, Decision], shapes: Shapes) -> tuple[str, ...]:
        if not any(decision.merge for decision in decisions.values()):
            return ("no update was projected: the output holds the fine-tuned weights as they are",)
        kept = f"{DERIVED_DIRECTORY} holds the projections for verify, {format_size(derived_bytes(shapes))}"
        large = any(not self.products[module.name] for module in self._projected(decisions))
        if large:
            return (
                f"{kept}: C·Δ of a full update is as large as its matrix; delete it once the output is verified",
            )
        return (kept,)

    def _why_no_adapter(self) -> str | None:
        """Why the output can be no adapter, in words; None if it can."""
        if not isinstance(self.models["finetuned"], Adapter):
            return "finetuned is a full checkpoint"
        for module in self.modules:
            if not is_plain(self.products[module.name], "finetuned"):
                return f"{module.name} is adapted by more than one plain product B·A (DoRA, experts, replaced tensors)"
        return None

    def _check_output_format(self) -> None:
        """Refuses what the output's format cannot hold, before any long work."""
        why = self._why_no_adapter()
        if self.settings.output_format == "adapter" and why is not None:
            raise AdapterError(
                f"the output cannot be an adapter, since {why}; pass --output-format checkpoint"
            )
        if self.settings.output_format == "auto" and why and isinstance(self.models["finetuned"], Adapter):
            self.notes = (*self.notes, f"the output is a checkpoint, since {why}")
        if self.writes_adapter:
            for name in ("max_shard_size", "allow_missing", "fill_from", "untie"):
                if getattr(self.settings, name) not in (None, False):
                    raise PlanError(f"{name} is for checkpoints, but the output is an adapter; leave it out")
