"""The model card of a SafeMERGE output: the method, what was merged, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoint.adapter import Adapter
from ...checkpoint.model import Model
from ...decision import Rule
from ...decision.selection import Below, Fraction, Lowest, Statistic
from ...plan.methods import known_methods
from ...printable import markdown
from ...report.card import (
    count_table,
    display_name,
    front_matter,
    program,
    roles_table,
    settings_blocks,
    standing,
)
from ...report.report import Report
from .alphas import Alphas
from .settings import SafemergeSettings

__all__ = ["model_card"]

_BODY = """\
{front}

{finetuned}, merged in the weights by [SafeMERGE](https://arxiv.org/abs/2503.17239), a method that is meant to bring
back safety that fine-tuning eroded, as {program} implements it. {summary}

{standing}

## Method

The safety subspace of a weight matrix is spanned by what alignment changed in it, V = W_aligned − W_base.
For each matrix, ρ = cos(V·Vᵀ·Δ, Δ) says how far the fine-tuning update Δ = W_finetuned − W_{reference}
lies in that subspace. {rule} A merged matrix is {blend} (method `{method}`);
all others are the fine-tuned model's.{form}

{roles}

## What was merged

{counts}

ρ_null is the ρ that a random update of the same matrix would have: ρ depends on a matrix's shape, so that one
threshold selects by module type too. Every tensor's ρ, decision and reason stand in `safemerge_report.json`{plan}.

## Configuration

{settings}"""


def model_card(
    report: Report, settings: SafemergeSettings, models: Mapping[str, Model], alphas: Alphas, rule: Rule
) -> str:
    """Writes the card.

    Args:
        report: The report of the merge.
        settings: What was asked for.
        models: The models by role.
        alphas: α of every module.
        rule: Which modules are merged.

    Returns:
        Markdown with YAML front matter. base_model lists the models whose weights are in the output, as far
        as they are known by a name on the Hub.
    """
    blended = ["finetuned", "safe" if "safe" in models else "aligned"]
    # An adapter's weights come on top of the aligned model's.
    parts = [*blended, "aligned"] if any(isinstance(models[role], Adapter) for role in blended) else blended
    if report.adapter is not None:
        # An adapter's base is the one model that it can be loaded on.
        parts = ["aligned"]
    modules = [module for tensor in report.tensors if tensor.analysed for module in tensor.module_reports()]
    merged = sum(module.merged for module in modules)
    return _BODY.format(
        front=front_matter(report, [models[role] for role in parts], ["safemerge"]),
        finetuned=display_name(models["finetuned"]),
        program=program(),
        summary=f"Of {len(modules)} matrices that were analysed, {merged} were merged.",
        standing=standing(report),
        reference=settings.delta_reference,
        rule=_rule(rule),
        blend=_blend(alphas, blended[1], settings.method),
        method=settings.method,
        form="" if report.adapter is None else _form(report.adapter),
        roles=roles_table(models),
        counts=count_table(report.counts, report.experts),
        plan="; what each is made of, in `safemerge_plan.json`" if report.adapter is None else "",
        settings=settings_blocks(report, models),
    )


def _form(adapter: Mapping[str, Any]) -> str:
    """What the adapter is, in sentences that follow on the method."""
    if adapter["combination"] == "peft-linear":
        made = (
            'Factors of merged matrices were added up as PEFT\'s `add_weighted_adapter(…, "linear")` does it, with '
            "weights √(w·s) on A and on B, so that the update has cross terms beside that average."
        )
    elif adapter["relative_errors"]:
        worst = max(adapter["relative_errors"].values())
        made = (
            f"Updates were added up exactly by concatenation of their factors, and truncated to rank "
            f"{adapter['rank']} where that was higher ({len(adapter['relative_errors'])} matrices, with a relative "
            f"error of at most {worst:.2%})."
        )
    else:
        made = "Updates are added up exactly, by concatenation of their factors."
    modules, parameters = adapter["modules"], len(adapter.get("parameters", ()))
    matrices = f"{modules} matrices" if modules or not parameters else ""
    experts = f"each expert of {parameters} stacked parameters" if parameters else ""
    return (
        f"\n\nThis is a LoRA adapter of the aligned model: it adds B·A, of rank {adapter['rank']} (padded with zeros) "
        f"and with scale 1, to {' and to '.join(filter(None, (matrices, experts)))}. {made}"
    )


def _rule(rule: Rule) -> str:
    """The rule of the decision in a sentence."""
    if rule.modules is not None:
        return f"{len(rule.modules)} matrices that were listed by name are merged; ρ decided nothing."
    by = "of each module type, " if rule.per_type else ""
    match rule.selection:
        case Lowest(number):
            return f"The {number} of lowest ρ are merged ({by}counted by {rule.granularity})."
        case Fraction(share):
            return f"The share {share:g} of lowest ρ is merged ({by}counted by {rule.granularity})."
        case Below(statistic, boundary):
            layer = rule.granularity == "layer"
            unit = f"layer, by the mean {statistic.value} of its matrices," if layer else "matrix"
            return f"A {unit} with {_NAMES[statistic].format(boundary)} is merged."


_NAMES = {
    Statistic.RHO: "ρ strictly below τ = {:g}",
    Statistic.RATIO: "ρ strictly below {:g} times what a random update would have, ρ_null,",
    Statistic.Z: "z = (log ρ − log ρ_null)/sd, its distance from chance, strictly below {:g}",
}


def _blend(alphas: Alphas, safe_role: str, method: str) -> str:
    known = known_methods()[method]
    if alphas.others:
        alpha, rest = "α", "(1 − α)"
        with_alpha = f", with α = {markdown(alphas.describe())}"
    else:
        alpha, rest, with_alpha = f"{alphas.usual:g}", f"{1 - alphas.usual:.6g}", ""
    if known.interpolates:
        return f"the point at {alpha} of the arc from W_{safe_role} to W_finetuned{with_alpha}"
    if not known.sums:
        return (
            f"W_aligned plus what the method makes of its updates in the fine-tuned model, with weight {alpha}, and "
            f"in the {safe_role} model, with weight {rest}{with_alpha}"
        )
    return f"{alpha} · W_finetuned + {rest} · W_{safe_role}{with_alpha}"
