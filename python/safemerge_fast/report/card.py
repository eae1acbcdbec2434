"""The output's model card: README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .._engine import __version__
from ..checkpoint.adapter import Adapter
from ..checkpoint.model import Model
from ..printable import code, fenced, markdown
from .merge_report import MergeReport, ModuleCount
from .public_names import Public, hub_name, last_part

__all__ = ["configuration_card", "fold_card", "model_card"]

_CARD = """\
---
base_model:{base_model}
base_model_relation: {relation}
library_name: {library}
tags:
- merge
- safemerge
---

# {title}

{finetuned}, with its safety repaired in the weights by [SafeMERGE](https://arxiv.org/abs/2503.17239), as
[safemerge-fast](https://pypi.org/project/safemerge-fast/) {version} implements it. {summary}

## Method

The safety subspace of a weight matrix is spanned by what alignment changed in it, V = W_aligned − W_base.
For each matrix, ρ = cos(V·Vᵀ·Δ, Δ) says how far the fine-tuning update Δ = W_finetuned − W_{reference}
lies in that subspace. {rule} A merged matrix is {blend} (method `{method}`);
all others are the fine-tuned model's.{form}

| role | model |
|---|---|
{roles}

## What was merged

{counts}

ρ_null is the ρ that a random update of the same matrix would have: ρ depends on a matrix's shape, so that one
threshold selects by module type too. Every tensor's ρ, decision and reason stand in `safemerge_report.json`{plan}.

## Configuration

{command}

{configuration}
"""


_FOLD_CARD = """\
---
base_model:{base_model}
base_model_relation: merge
library_name: transformers
tags:
- merge
---

# {title}

{model} with the LoRA adapter {adapter} folded into its weights by
[safemerge-fast](https://pypi.org/project/safemerge-fast/) {version}. What each tensor is made of stands in
`safemerge_plan.json`.

{settings}

{command}
"""


_CONFIGURATION_CARD = """\
---
base_model:{base_model}
base_model_relation: merge
library_name: transformers
tags:
- merge
- mergekit
---

# {title}

A merge of {models} by the method `{method}`, made with
[safemerge-fast](https://pypi.org/project/safemerge-fast/) {version} from a configuration in the format of mergekit.
What each tensor is made of stands in `safemerge_plan.json`.

{configuration}

{command}
"""


def configuration_card(
    output: str, method: str, configuration: Mapping[str, Any], command: str, models: Mapping[str, Model]
) -> str:
    """Writes the card of a checkpoint that was merged as a configuration in mergekit's format says.

    Args:
        output: The output directory.
        method: The merge method.
        configuration: The configuration's fields.
        command: The command line.
        models: Models and adapters by role.

    Returns:
        Markdown with YAML front matter.
    """
    import yaml

    public = Public(models.values(), output)
    bases = [name for model in models.values() if (name := hub_name(model)) is not None]
    return _CONFIGURATION_CARD.format(
        base_model="".join(f"\n- {name}" for name in bases) or " []",
        title=markdown(last_part(output)),
        models=", ".join(_display_name(model) for model in models.values()),
        method=method,
        version=__version__,
        configuration=fenced(
            "yaml", yaml.safe_dump(public(dict(configuration)), sort_keys=False, allow_unicode=True)
        ),
        command=fenced("sh", public.command(command)),
    )


def fold_card(output: str, settings: Mapping[str, Any], command: str, models: Mapping[str, Model]) -> str:
    """Writes the card of a checkpoint that an adapter was folded into.

    Args:
        output: The output directory.
        settings: The recipe, by field.
        command: The command line.
        models: "model" and "adapter".

    Returns:
        Markdown with YAML front matter.
    """
    public = Public(models.values(), output)
    bases = [name for model in models.values() if (name := hub_name(model)) is not None]
    return _FOLD_CARD.format(
        base_model="".join(f"\n- {name}" for name in bases) or " []",
        title=markdown(last_part(output)),
        model=_display_name(models["model"]),
        adapter=_display_name(models["adapter"]),
        version=__version__,
        # JSON's strings and numbers are YAML's too.
        settings=fenced(
            "yaml",
            "\n".join(f"{name}: {json.dumps(value)}" for name, value in public(dict(settings)).items()),
        ),
        command=fenced("sh", public.command(command)),
    )


def model_card(report: MergeReport, models: Mapping[str, Model]) -> str:
    """Writes the card.

    Args:
        report: The report of the merge.
        models: The models by role.

    Returns:
        Markdown with YAML front matter. base_model lists the models whose weights are in the output, as far
        as they are known by a name on the Hub.
    """
    configuration = report.configuration
    public = Public(models.values(), report.output)
    blended = ["finetuned", "safe" if "safe" in models else "aligned"]
    # An adapter's weights come on top of the aligned model's.
    parts = [*blended, "aligned"] if any(isinstance(models[role], Adapter) for role in blended) else blended
    if report.adapter is not None:
        # An adapter's base is the one model that it can be loaded on.
        parts = ["aligned"]
    bases = list(dict.fromkeys(name for role in parts if (name := hub_name(models[role])) is not None))
    analysed = sum(tensor.analysed for tensor in report.tensors)
    return _CARD.format(
        base_model="".join(f"\n- {name}" for name in bases) or " []",
        relation="merge" if report.adapter is None else "adapter",
        library="transformers" if report.adapter is None else "peft",
        form="" if report.adapter is None else _form(report.adapter),
        plan="; what each is made of, in `safemerge_plan.json`" if report.adapter is None else "",
        title=markdown(last_part(report.output)),
        finetuned=_display_name(models["finetuned"]),
        version=report.versions["safemerge-fast"],
        summary=f"Of {analysed} matrices that were analysed, "
        f"{sum(tensor.analysed and tensor.merged for tensor in report.tensors)} were merged.",
        reference=configuration.delta_reference,
        rule=_rule(report),
        blend=_blend(configuration.alpha, blended[1], configuration.method),
        method=configuration.method,
        roles="\n".join(
            f"| {role} | {_display_name(model, in_table=True)}{_kind(model)} |"
            for role, model in models.items()
        ),
        counts=_count_table(report.counts),
        command=fenced("sh", public.command(configuration.command())),
        configuration=fenced(
            "json", json.dumps(public(configuration.settings()), indent=2, ensure_ascii=False)
        ),
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
    return (
        f"\n\nThis is a LoRA adapter of the aligned model: it adds B·A, of rank {adapter['rank']} (padded with zeros) "
        f"and with scale 1, to {adapter['modules']} matrices. {made}"
    )


def _display_name(model: Model, *, in_table: bool = False) -> str:
    """The name on the Hub, else the last part of the path: a card is published, a home directory is not."""
    name = hub_name(model)
    if name is not None:
        return f"[{name}](https://huggingface.co/{name})"
    return code(model.path.name, in_table=in_table)


def _kind(model: Model) -> str:
    return " (LoRA adapter of the aligned model)" if isinstance(model, Adapter) else ""


def _rule(report: MergeReport) -> str:
    """The rule of the decision in a sentence."""
    configuration = report.configuration
    unit = "matrix" if configuration.granularity == "module" else "layer, by the mean ρ of its matrices,"
    kind, _, amount = configuration.select.partition(":")
    match kind:
        case "lowest":
            return f"The {amount} of lowest ρ are merged (counted by {configuration.granularity})."
        case "fraction":
            return f"The share {amount} of lowest ρ is merged (counted by {configuration.granularity})."
        case _:
            return f"A {unit} with ρ strictly below τ = {configuration.threshold:g} is merged."


def _blend(alpha: float, safe_role: str, method: str) -> str:
    if method == "slerp":
        return f"the point at {alpha:g} of the arc from W_{safe_role} to W_finetuned"
    if method != "linear":
        return (
            f"W_aligned plus what the method makes of its updates in the fine-tuned model, with weight {alpha:g}, and "
            f"in the {safe_role} model, with weight {1 - alpha:.6g}"
        )
    return f"{alpha:g} · W_finetuned + {1 - alpha:.6g} · W_{safe_role}"


def _count_table(counts: Iterable[ModuleCount]) -> str:
    """Counts per module type as a Markdown table."""
    lines = [
        "| module type | analysed | merged | kept | median ρ | median ρ_null |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for count in counts:
        medians = (
            "" if value is None else f"{value:.3f}" for value in (count.median_rho, count.median_rho_null)
        )
        numbers = (str(count.analysed), str(count.merged), str(count.kept), *medians)
        lines.append(f"| {markdown(count.module_type)} | {' | '.join(numbers)} |")
    return "\n".join(lines)
