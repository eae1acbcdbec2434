"""The page of a finished merge; it says nothing of where the models lie on this machine."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ...checkpoint.model import Model
from ...decision import Rule
from ...settings import Settings, fields_of
from ..public_names import Public, last_part
from ..report import ModuleWarning, Report
from ..tensors import TensorReport
from .columns import ModuleColumns
from .head import head, measurement_facts, roles, rule_record, sentences, summary, version_fact
from .page import compose

__all__ = ["report_page"]

# Settings that say which modules are merged; the page puts its own choice in their place.
_OF_THE_RULE = frozenset(("threshold", "select", "per_type", "granularity", "on_undefined", "modules"))


def report_page(report: Report, models: Mapping[str, Model], rule: Rule) -> Iterator[bytes]:
    """The page, in pieces.

    Args:
        report: The report.
        models: The models by role.
        rule: The rule that decided.
    """
    public = Public(models.values(), report.output)
    settings = report.configuration
    columns = ModuleColumns(
        module for tensor in report.tensors if tensor.analysed for module in tensor.module_reports()
    )
    title = f"Merge of {last_part(report.output)}"
    facts = {
        "Device": report.device,
        **measurement_facts(
            columns,
            getattr(settings, "estimator", None),
            getattr(settings, "failure", None),
            getattr(settings, "seed", None) or 0,
        ),
        "Seconds": ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items()),
        "Bytes": f"{report.bytes_read:,} read, {report.bytes_written:,} written",
        "Tensors": f"{len(report.tensors):,}, {report.merged:,} of them merged",
        "Coverage": None if report.coverage is None else report.coverage.sentence(),
        "Identity of the job": report.identity,
        **version_fact(report.versions),
    }
    document = {
        **head("merge", title, facts, settings, public, type(settings)),
        "roles": roles(
            {role: {**source, "model": public(source["spec"])} for role, source in report.inputs.items()}
        ),
        "reference": getattr(settings, "delta_reference", "aligned"),
        "rule": rule_record(rule),
        "command": _other_command(settings, public, last_part(report.output)),
        "repeat": public.command(settings.command()),
        "warnings": sentences(map(_sentence, report.warnings)),
        "notes": sentences(report.notes),
        "survival": _survival([tensor for tensor in report.tensors if tensor.survival is not None]),
    }
    return compose(document, title=title, summary=summary(columns), modules=columns.pieces())


def _other_command(settings: Settings, public: Public, output: str) -> list[str]:
    """The command without a rule, and its end: the same merge by another rule, beside this output."""
    defaults = {
        field.name: field.default for field in fields_of(type(settings)) if field.name in _OF_THE_RULE
    }
    plain = msgspec.structs.replace(settings, **defaults, output=f"{output}-2")
    words = shlex.split(public.command(plain.command()))
    place = words.index("--output")
    return [shlex.join(words[:place] + words[place + 2 :]), shlex.join(words[place : place + 2])]


def _sentence(warning: ModuleWarning) -> str:
    named = warning.tensor is None or warning.tensor in warning.message
    return warning.message if named else f"{warning.tensor}: {warning.message}"


def _survival(tensors: Sequence[TensorReport]) -> dict[str, Any] | None:
    """What is stored of the changes of tensors that were quantised again, in columns."""
    if not tensors:
        return None
    return {
        "names": [tensor.name for tensor in tensors],
        "types": [tensor.module_type for tensor in tensors],
        "formats": [tensor.encoding or tensor.dtype for tensor in tensors],
        "merged": [tensor.merged for tensor in tensors],
        "shares": [tensor.survival for tensor in tensors],
    }
