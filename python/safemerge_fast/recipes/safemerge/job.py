"""What a merge knows before it measures or writes: models, rows, rule, blend and the output's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ... import _engine
from ...analysis.scores import Score, Scores
from ...checkpoint.adapter import Adapter, open_source
from ...checkpoint.model import Model, open_model
from ...decision import Decision, Rule
from ...errors import AdapterError, AnalysisError, PlanError
from ...pairing.rows import Pairing, Row, pair
from ...plan.shards import SINGLE_FILE, Blend, Shard, lay_out, plan_document, plan_shard
from .adapter.layout import require_linear
from .blend import method_parameters, safemerge
from .configuration import MergeConfiguration

__all__ = ["Job", "open_job", "open_models", "require_finite"]


@dataclass(frozen=True, slots=True)
class Job:
    """A merge, ready to start.

    Attributes:
        configuration: What was asked for.
        models: The models by role.
        pairing: One row per output tensor.
        rule: The rule of the decision.
        blend: What merged tensors are made of.
        layout: The output files.
        scores: Scores to reuse, or None if they are to be computed.
    """

    configuration: MergeConfiguration
    models: Mapping[str, Model]
    pairing: Pairing
    rule: Rule
    blend: Blend
    layout: tuple[Shard, ...]
    scores: Scores | None

    @property
    def analysed(self) -> list[Row]:
        """The rows that have, or will have, a score."""
        return [row for row in self.pairing.rows if row.analysed]

    @property
    def host(self) -> Model:
        """The checkpoint that the output is shaped like: the fine-tuned, or the aligned one for an adapter."""
        finetuned = self.models["finetuned"]
        return self.models["aligned"] if isinstance(finetuned, Adapter) else finetuned

    @property
    def writes_adapter(self) -> bool:
        """Whether the output is an adapter, not a checkpoint."""
        return self.configuration.output_format == "adapter" or (
            self.configuration.output_format == "auto"
            and self.configuration.method == "linear"
            and not _checkpoints(self.models)
        )

    def reused_scores(self) -> dict[str, Score]:
        """Those of the given scores that this job needs; the file may hold more.

        Raises:
            AnalysisError: A module has none, or one says that values are not finite and this job does not
                allow that.
        """
        if self.scores is None:
            return {}
        modules = self.scores.modules
        if missing := [row.name for row in self.analysed if row.name not in modules]:
            raise AnalysisError(
                f"{self.configuration.scores} has no score for {missing[0]}; "
                f"write it again with analyze and the same --include and --exclude"
            )
        reused = {row.name: modules[row.name] for row in self.analysed}
        if not self.configuration.allow_nonfinite:
            for name, score in reused.items():
                require_finite(name, score)
        return reused


def open_models(roles: Mapping[str, str]) -> dict[str, Model]:
    """Opens the model of each role; finetuned and safe may be adapters. Errors are those of open_source."""
    return {
        role: (open_source if role in ("finetuned", "safe") else open_model)(role, spec)
        for role, spec in roles.items()
    }


def open_job(configuration: MergeConfiguration) -> Job:
    """Opens the models and pairs their tensors; only headers are read.

    Args:
        configuration: What was asked for.

    Returns:
        The job.

    Raises:
        CheckpointError: A model cannot be found, read or trusted.
        AdapterError: An adapter cannot be merged exactly, or not into an adapter, or base or aligned is one.
        PairingError: The models do not fit together.
        PlanError: A setting is of no use to the output's format.
        AnalysisError: The scores to reuse cannot be read, or are not of these models.
    """
    parameters = method_parameters(
        configuration.method,
        density=configuration.density,
        seed=configuration.seed,
        parameters=configuration.parameters,
    )
    models = open_models(configuration.roles())
    pairing = pair(models, include=configuration.include, exclude=configuration.exclude)
    scores = None
    if configuration.scores is not None:
        scores = _read_scores(configuration.scores, models, configuration.delta_reference)
    job = Job(
        configuration=configuration,
        models=models,
        pairing=pairing,
        rule=configuration.rule(),
        blend=safemerge(
            configuration.alpha,
            safe_role="safe" if "safe" in models else "aligned",
            method=configuration.method,
            parameters=parameters,
        ),
        layout=tuple(
            lay_out(
                pairing.rows,
                dtype=configuration.dtype,
                # The configuration has parsed it already.
                max_shard_size=None
                if configuration.max_shard_size is None
                else int(configuration.max_shard_size),
            )
        ),
        scores=scores,
    )
    _check_output_format(job)
    _check_method(job)
    return job


def _check_output_format(job: Job) -> None:
    """Refuses what the output's format cannot hold, before any long work."""
    configuration = job.configuration
    if job.writes_adapter:
        if whole := _checkpoints(job.models):
            raise AdapterError(
                f"an adapter is made of adapters only, but {whole[0]} is a full checkpoint; "
                f"pass --output-format checkpoint"
            )
        if configuration.max_shard_size is not None:
            raise PlanError("max_shard_size is for checkpoints, but the output is an adapter; leave it out")
        require_linear(job.pairing.rows)
        return
    for name in ("adapter_rank", "compat"):
        if getattr(configuration, name) is not None:
            raise PlanError(
                f"{name} is for adapters, but the output is a checkpoint; leave it out, or give adapters as "
                f"finetuned and safe with output_format adapter"
            )


def _check_method(job: Job) -> None:
    """Lets the engine look at the method's parameters for each tensor that may be merged, before any long work."""
    blend = job.blend
    if blend.base is None:
        return
    roles = {*blend.weights, blend.base}
    rows = tuple(row for row in job.analysed if roles <= row.terms.keys())
    if rows:
        decisions = {row.name: Decision(merge=True, reason="may be merged") for row in rows}
        trial = plan_shard(Shard(SINGLE_FILE, rows), decisions, blend, dtype=job.configuration.dtype)
        _engine.Plan(json.dumps(plan_document(job.models, [trial])))


def _checkpoints(models: Mapping[str, Model]) -> list[str]:
    """Those of the roles that are merged whose model is no adapter."""
    return [
        role for role in ("finetuned", "safe") if role in models and not isinstance(models[role], Adapter)
    ]


def require_finite(name: str, score: Score) -> None:
    """Raises AnalysisError if a module has no score because a model holds NaN or infinity."""
    if score.undefined is not None and score.undefined.startswith("non-finite"):
        raise AnalysisError(
            f"{name} cannot be scored: {score.undefined}; repair that checkpoint, or pass --allow-nonfinite "
            f"to go on without its ρ"
        )


def _read_scores(file: str, models: Mapping[str, Model], delta_reference: str) -> Scores:
    """Reads scores and refuses those of other models or of another definition of Δ."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AnalysisError(f"cannot read the scores {file}: {error}") from error
    try:
        scores = Scores.from_json(text)
    except AnalysisError as error:
        raise AnalysisError(f"{file}: {error}") from error
    if reason := scores.matches(models):
        raise AnalysisError(
            f"the scores {file} are not of these models: {reason}; write them again with analyze"
        )
    if scores.delta_reference != delta_reference:
        raise AnalysisError(
            f"the scores {file} take Δ against the {scores.delta_reference} model, but this merge asks for "
            f"{delta_reference}; pass --delta-reference {scores.delta_reference} or write them again"
        )
    return scores
