"""Model cards: README.md with the front matter that the Hugging Face Hub reads, and the parts that cards share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from .._engine import __version__
from ..checkpoint.adapter import Adapter
from ..checkpoint.model import Model
from ..printable import code, fenced, markdown
from .public_names import Public, hub_name, last_part
from .report import Report
from .tensors import ModuleCount

__all__ = [
    "count_table",
    "display_name",
    "front_matter",
    "program",
    "recipe_card",
    "roles_table",
    "settings_blocks",
    "standing",
]


def front_matter(report: Report, parts: Iterable[Model], tags: Iterable[str] = ()) -> str:
    """The YAML that the Hub reads, and the title.

    Args:
        report: The report.
        parts: The models whose weights are in the output; those known by a name on the Hub are listed.
        tags: Tags beside "merge".
    """
    bases = dict.fromkeys(name for model in parts if (name := hub_name(model)) is not None)
    lines = ["---", "base_model:" + ("".join(f"\n- {name}" for name in bases) or " []")]
    lines += [
        f"base_model_relation: {'merge' if report.adapter is None else 'adapter'}",
        f"library_name: {'transformers' if report.adapter is None else 'peft'}",
        "tags:",
        *(f"- {tag}" for tag in ("merge", *tags)),
        "---",
        "",
        f"# {markdown(last_part(report.output))}",
    ]
    return "\n".join(lines)


def recipe_card(
    report: Report, models: Mapping[str, Model], sentence: str, *, tags: Iterable[str] = ()
) -> str:
    """Writes the card of an output that a recipe without decisions made.

    Args:
        report: The report.
        models: Models and adapters by role.
        sentence: What the output is; a role's name in braces stands for its model.
        tags: Tags beside "merge".

    Returns:
        Markdown with YAML front matter.
    """
    names = {role: display_name(model) for role, model in models.items()}
    for role, name in names.items():
        sentence = sentence.replace(f"{{{role}}}", name)
    return "\n\n".join(
        (
            front_matter(report, models.values(), tags),
            f"{sentence}, made with {program()}.\nWhat each tensor is made of stands in `safemerge_plan.json`, and why "
            f"in `safemerge_report.json`.",
            standing(report),
            roles_table(models),
            settings_blocks(report, models),
        )
    )


def standing(report: Report) -> str:
    """How much was analysed, what to mistrust in the whole, and that nobody has evaluated the output."""
    sentences = [] if report.coverage is None else [f"{_capital(report.coverage.sentence())}."]
    sentences.append(
        "**Not evaluated**: this output was merged; what it refuses, and how well it does its task, was not measured."
    )
    warnings = [warning.message for warning in report.warnings if warning.tensor is None]
    return "\n\n".join(
        [" ".join(sentences), *(f"> **Warning:** {markdown(_capital(warning))}." for warning in warnings)]
    )


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def program() -> str:
    """The program and its version, as a link."""
    return f"[safemerge-fast](https://pypi.org/project/safemerge-fast/) {__version__}"


def roles_table(models: Mapping[str, Model]) -> str:
    """Roles and models as a Markdown table."""
    lines = ["| role | model |", "|---|---|"]
    for role, model in models.items():
        kind = " (LoRA adapter)" if isinstance(model, Adapter) else ""
        lines.append(f"| {markdown(role)} | {display_name(model, in_table=True)}{kind} |")
    return "\n".join(lines)


def settings_blocks(report: Report, models: Mapping[str, Model]) -> str:
    """The command line, and the same as a file's fields, without the paths of this machine."""
    settings = report.configuration
    public = Public(models.values(), report.output)
    document = json.dumps(public(settings.file_fields()), indent=2, ensure_ascii=False)
    return f"{fenced('sh', public.command(settings.command()))}\n\n{fenced('json', document)}\n"


def display_name(model: Model, *, in_table: bool = False) -> str:
    """The name on the Hub, else the last part of the path: a card is published, a home directory is not."""
    name = hub_name(model)
    if name is not None:
        return f"[{name}](https://huggingface.co/{name})"
    return code(model.path.name, in_table=in_table)


def count_table(counts: Iterable[ModuleCount], experts: Iterable[ModuleCount] = ()) -> str:
    """Counts per module type as a Markdown table, and below it those of experts per layer, folded."""
    table = _count_table("module type", counts)
    if not (lines := list(experts)):
        return table
    return f"{table}\n\n<details><summary>Experts by layer</summary>\n\n{_count_table('layer', lines)}\n\n</details>"


def _count_table(title: str, counts: Iterable[ModuleCount]) -> str:
    lines = [
        f"| {title} | analysed | merged | kept | median ρ | median ρ_null |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for count in counts:
        medians = (
            "" if value is None else f"{value:.3f}" for value in (count.median_rho, count.median_rho_null)
        )
        numbers = (str(count.analysed), str(count.merged), str(count.kept), *medians)
        lines.append(f"| {markdown(count.module_type)} | {' | '.join(numbers)} |")
    return "\n".join(lines)
