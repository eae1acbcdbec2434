"""The page of an analysis: nothing is merged yet, and the page helps to choose what is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...analysis.scores import Scores
from ...checkpoint.model import Model
from ...decision import Rule, decide
from ...pairing.coverage import coverage_of
from ...pairing.module import modules_of_rows
from ...pairing.rows import Pairing
from ...settings import Settings, fields_of
from ..environment import versions
from ..modules import ModuleReport, measured
from ..public_names import last_part
from .columns import ModuleColumns
from .head import head, measurement_facts, roles, rule_record, sentences, summary, version_fact
from .page import compose

__all__ = ["AnalysisPage"]

# What the command to copy needs so that it measures what the analysis did.
_REPEATED = (
    "delta_reference",
    "include",
    "exclude",
    "expert_lora_layout",
    "estimator",
    "failure",
    "seed",
    "resolution",
)


@dataclass(frozen=True, slots=True)
class AnalysisPage:
    """What the page is made of.

    Attributes:
        models: The models by role.
        pairing: The pairing whose modules were scored.
        scores: What was measured.
        settings: What was asked for.
        rule: The rule that the page begins with.
        merge: The record of a merge's settings.
        warnings: What to mistrust, in sentences.
        scores_file: Where the scores were written, if they were.
    """

    models: Mapping[str, Model]
    pairing: Pairing
    scores: Scores
    settings: Settings
    rule: Rule
    merge: type[Settings]
    warnings: Sequence[str] = ()
    scores_file: Path | None = None

    def pieces(self) -> Iterator[bytes]:
        """The page in pieces."""
        scores = self.scores
        columns = ModuleColumns(self._modules())
        title = f"Safety-subspace analysis of {last_part(self.models['finetuned'].spec)}"
        facts = {
            "Device": scores.device,
            **measurement_facts(columns, scores.estimator, scores.failure, scores.seed),
            "Seconds": f"{scores.seconds:.1f}",
            "Coverage": coverage_of(self.pairing.rows).sentence(),
            **version_fact(versions()),
        }
        document = {
            **head("analysis", title, facts, self.settings, merge=self.merge),
            "roles": roles(
                {role: {**source, "model": self.models[role].spec} for role, source in scores.sources.items()}
            ),
            "reference": scores.delta_reference,
            "rule": rule_record(self.rule),
            "command": [self._command(), "-o repaired"],
            "warnings": sentences(self.warnings),
            "notes": sentences(self.pairing.notes),
        }
        return compose(document, title=title, summary=summary(columns), modules=columns.pieces())

    def _modules(self) -> Iterator[ModuleReport]:
        decisions = decide(self.pairing.rows, self.scores.modules, self.rule)
        for module in modules_of_rows(self.pairing.rows):
            decision = decisions[module.name]
            yield ModuleReport(
                module.name,
                module.module_type,
                module.layer,
                decision.merge,
                decision.reason,
                *measured(self.scores.modules[module.name]),
            )

    def _command(self) -> str:
        """The beginning of a merge's command line; the page adds the rule."""
        words = ["safemerge-fast", "merge"]
        for role in ("base", "aligned", "finetuned"):
            words += [f"--{role}", self.models[role].spec]
        words += ["--safe", "SAFE_MODEL"]
        for field in fields_of(type(self.settings)):
            value = getattr(self.settings, field.name)
            if field.name in _REPEATED and value != field.default:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        if self.scores_file is not None:
            words += ["--scores", str(self.scores_file)]
        return shlex.join(words)
